"""The commands `sandbox …` and `search-index`."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from autotraj.config.run import load_section
from autotraj.errors import UserError
from tool_sandbox import bench as sandbox_bench
from tool_sandbox import build as image_build
from tool_sandbox import server
from tool_sandbox.client import SandboxClient
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.search.index import build_index


def serve(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj sandbox serve`: a gateway in the foreground."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    try:
        server.run(config)
    except SandboxError as error:
        raise UserError(str(error)) from error
    return 0


def build(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj sandbox build`: make the image unless it exists."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    try:
        image_build.ensure_image(config)
    except SandboxError as error:
        raise UserError(str(error)) from error
    return 0


def bench(config_path: str | None, overrides: Sequence[str], seconds: float) -> int:
    """`python -m autotraj sandbox bench`: measure this machine and print the table as Markdown."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    try:
        image_build.check_ready(config)
        print(sandbox_bench.HEADER, flush=True)
        rows = asyncio.run(
            sandbox_bench.table(config, seconds, lambda row: print(sandbox_bench.render_row(row), flush=True))
        )
    except SandboxError as error:
        raise UserError(str(error)) from error
    print("\n" + "\n".join(sandbox_bench.ratios(rows)))
    return 0


def stats(config_path: str | None, overrides: Sequence[str]) -> int:
    """`python -m autotraj sandbox stats`: the figures of the gateway at `sandbox.address`, as JSON."""
    config = load_section(SandboxConfig, "sandbox", config_path, overrides)
    if config.address.endswith(":0"):
        raise UserError("sandbox.address: port 0 is no address to ask; set sandbox.address=HOST:PORT of the gateway")
    try:
        with SandboxClient(config.address, token=config.token, tls=config.tls) as client:
            print(client.stats().model_dump_json(indent=2))
    except SandboxError as error:
        raise UserError(str(error)) from error
    return 0


def search_index(corpus: str, out: str) -> int:
    """`python -m autotraj search-index`: a BM25 index for `sandbox.search.index`."""
    try:
        num_documents = build_index(Path(corpus), Path(out))
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(
        f"{num_documents} documents indexed in {out}; use it with sandbox.search.kind=bm25 sandbox.search.index={out}"
    )
    return 0
