"""A run that is kept on S3 (moto's API over HTTP): trained, out of credentials, resumed on another machine. Real parts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgpack
import numpy as np
import pytest
from object_store import Proxy, client, environment, objects, proxied
from tiny_run import ROOT, TINY

from cluster.exit_codes import EXIT_FAILED, EXIT_OK
from trajectory.log import read_log

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.docker, pytest.mark.timeout(900), pytest.mark.slow]

BUCKET = "runs"
RUN = f"s3://{BUCKET}/tiny"
SMALL = [
    f'model="{ROOT / "examples/tiny/base"}"',
    "data.limit=200",
    "eval.data.limit=16",
    "grpo.groups_per_step=4",
    "rollout.group_size=4",
    "grpo.checkpoint_every=1",
    "storage_retry_s=3",
]


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(BUCKET) as made:
        yield made


def autotraj(proxy: Proxy, machine: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line on a machine whose home folder and cache are below `machine`."""
    settings = environment(proxy.address, machine / "cache") | {"HOME": str(machine)}
    machine.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "autotraj", *words],
        cwd=ROOT,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def steps(proxy: Proxy) -> list[int]:
    body = client(proxy.address).get_object(Bucket=BUCKET, Key="tiny/metrics.jsonl")["Body"].read()
    return [json.loads(line)["step"] for line in body.splitlines()]


def checkpoints(proxy: Proxy) -> set[str]:
    return {name for name in objects(proxy.address, BUCKET, "tiny/checkpoints") if "/" not in name}


def test_train_expire_resume_elsewhere(proxy: Proxy, tmp_path: Path) -> None:
    # Credentials run out when the checkpoint of step 2 is on its way, between its first request and its shards.
    proxy.refuses = lambda method, path, key: "step-000002/" in path and method in ("PUT", "POST")
    first = autotraj(
        proxy, tmp_path / "one", "grpo", "--config", str(TINY), f"run_dir={RUN}", "grpo.num_steps=3", *SMALL
    )
    assert first.returncode == EXIT_FAILED, first.stdout + first.stderr
    said = " ".join(first.stderr.split())
    assert f"failed: run_dir {RUN}: the checkpoint of step 2 could not be written:" in said
    assert "the credentials have expired" in said
    assert "ExpiredToken" in said
    assert "The last complete checkpoint is of step 1;" in said
    assert f"go on with python -m autotraj grpo --resume {RUN}" in said
    assert "Traceback" not in said
    assert checkpoints(proxy) == {"step-000001.json"}
    working = tmp_path / "one/cache/autotraj/s3" / BUCKET / "tiny"
    assert list(read_log(working / "trajectories.log"))

    # Renewed, on another machine. A cut-off upload left objects of step 2, and nothing takes them for a checkpoint.
    proxy.refuses = lambda method, path, key: False
    client(proxy.address).put_object(Bucket=BUCKET, Key="tiny/checkpoints/step-000002/leftover", Body=b"x")
    second = autotraj(proxy, tmp_path / "two", "grpo", "--resume", RUN)
    assert second.returncode == EXIT_OK, second.stdout + second.stderr
    assert "resumed at step 1" in second.stdout
    assert steps(proxy) == [1, 2, 3]  # each once
    assert checkpoints(proxy) == {"step-000002.json", "step-000003.json"}
    held = objects(proxy.address, BUCKET, "tiny")
    assert {"config.toml", "trajectories.log", "policy/config.json", "policy/model.safetensors"} <= held
    assert not [name for name in held if "step-000001" in name or "leftover" in name or "status.json" in name]
    assert not list((tmp_path / "two/cache/autotraj").glob("scratch-*"))
    assert_every_prompt_is_in_one_state(proxy)


def assert_every_prompt_is_in_one_state(proxy: Proxy) -> None:
    """Of the 200, 3 steps of 4 are trained on; none is lost or there twice."""
    state = client(proxy.address).get_object(Bucket=BUCKET, Key="tiny/checkpoints/step-000003/autotraj_state.msgpack")
    ledger = msgpack.unpackb(state["Body"].read(), strict_map_key=False)["ledger"]
    assert (ledger["trained"], ledger["last_step"], ledger["epoch"]) == (12, 3, 0)
    pending = np.frombuffer(ledger["order"], "<i4").tolist() + [index for _, index, *_ in ledger["returned"]]
    waiting = pending + [index for _, index, *_ in ledger["in_flight"]]
    assert len(waiting) == len(set(waiting)) == 200 - 12 - sum(ledger["drop_reasons"].values())
