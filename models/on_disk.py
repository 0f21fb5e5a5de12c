"""The names, shapes and type of a checkpoint folder's weights, read from its configuration and the headers of its files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open


def tensor_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the folder's safetensors files. Raises ValueError if there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"engine.model: no *.safetensors files in {model}")
    return shapes


def is_half_precision(model: str) -> bool:
    """Whether the folder's config.json says that its weights are float16 (not bfloat16)."""
    config = json.loads((Path(model) / "config.json").read_text())
    text = config.get("text_config") or {}
    found = (held.get("dtype", held.get("torch_dtype")) for held in (text, config))
    return next((dtype for dtype in found if dtype), "") in ("float16", "torch.float16")
