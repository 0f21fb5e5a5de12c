"""What the settings refuse, which zygote runs what, and what the container is started with."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.docker_command import UID_STRIDE, docker_command
from tool_sandbox.errors import ContainerEngineError
from tool_sandbox.python_tool import zygote_for

IDS = range(1_000_000, 35_000_000)


@pytest.fixture
def engine_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """A `docker` whose `info` is what the test says: one machine has one kind of engine."""

    def say(info: object) -> None:
        (tmp_path / "info.json").write_text(json.dumps(info))
        command = tmp_path / "docker"
        command.write_text(f'#!/bin/sh\n[ "$1" = info ] && exec cat {tmp_path}/info.json\n')
        command.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return say


@pytest.mark.parametrize("address", ["0.0.0.0:50051", "[::]:50051", "sandbox.example:50051"])
def test_an_address_that_others_reach_needs_a_token(address: str) -> None:
    with pytest.raises(ValidationError, match="set a token, or listen on"):
        SandboxConfig(address=address)
    assert SandboxConfig(address=address, token="t").address == address


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", "127.0.0.1:http", ":1", "127.0.0.1:65536"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValidationError, match="not host:port"):
        SandboxConfig(address=address)


def test_the_token_is_not_shown() -> None:
    assert "sesame" not in repr(SandboxConfig(token="open sesame"))


@pytest.mark.parametrize(
    ("code", "zygote"),
    [
        ("print(2+2)", "cold"),
        ("import math", "cold"),
        ("import my_numpy_like", "cold"),
        ("import numpy as np", "warm"),
        ("from sympy.abc import x", "warm"),
        ("m = __import__('scipy')", "warm"),
        ("from sklearn import svm", "warm"),
        ("import matplotlib.pyplot as plt", "warm"),
        ("import requests, tqdm", "cold"),
    ],
)
def test_code_that_names_a_preloaded_library_runs_where_it_is(code: str, zygote: str) -> None:
    assert zygote_for(code) == zygote


@pytest.mark.parametrize("ids", [IDS, range(2_000, 65_000)])
def test_containers_share_no_uid(ids: range) -> None:
    """RLIMIT_NPROC counts a uid over all containers of the kernel."""
    config = SandboxConfig(slots_per_container=16)
    uids = []
    for name in ("a", "b"):
        command = docker_command(name, config, ids)
        uids += [int(word.split("gid=")[1].split(",")[0]) for word in command if word.startswith("/w/")]
    assert len(set(uids)) == 32
    assert min(uids) in ids
    assert max(uids) + 16 in ids  # the last guard's
    assert UID_STRIDE >= 2 * 16


def test_containers_have_no_network_no_capability_to_spare_and_limits() -> None:
    command = " ".join(docker_command("name", SandboxConfig(), IDS))
    for part in (
        "--network none",
        "--read-only",
        "--cap-drop ALL --cap-add SETUID --cap-add SETGID --security-opt no-new-privileges",
        "--pids-limit 272",  # 4 slots of 64, and 16
        "--memory 2560m --memory-swap 2560m",  # 256 + 4 slots of 512 + 64
        "--sysctl kernel.sem=0 0 0 0",
    ):
        assert part in command
    assert command.count("--cap-add") == 2
    assert "--privileged" not in command
    assert "--volume" not in command


def test_the_images_name_is_the_hash_of_its_sources() -> None:
    assert build.image_tag() == build.image_tag()
    assert build.resolve_image(SandboxConfig()) == build.image_tag()
    assert build.resolve_image(SandboxConfig(image="mine:1")) == "mine:1"


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (["name=seccomp,profile=default"], range(1_000_000, 35_000_000)),
        (["name=seccomp,profile=default", "name=rootless"], range(2_000, 65_000)),
        (["name=userns"], range(2_000, 65_000)),
        (None, range(1_000_000, 35_000_000)),
    ],
)
def test_ids_are_those_that_the_engine_maps(
    engine_says: Callable[[object], None], options: list[str] | None, ids: range
) -> None:
    engine_says({"CgroupDriver": "systemd", "SecurityOptions": options})
    assert build.user_ids() == ids


def test_an_engine_that_cannot_bound_a_container_is_refused(engine_says: Callable[[object], None]) -> None:
    engine_says({"CgroupDriver": "none", "SecurityOptions": ["name=rootless"]})
    with pytest.raises(ContainerEngineError, match=r"Cgroup Driver: none.* needs a machine with cgroup v2"):
        build.user_ids()


def test_a_runtime_is_asked_for_only_if_one_is_set() -> None:
    assert "--runtime" not in docker_command("name", SandboxConfig(), IDS)
    command = docker_command("name", SandboxConfig(runtime="runsc", slots_per_container=1), IDS)
    assert command[command.index("--runtime") + 1] == "runsc"


def test_gvisor_gets_containers_of_one_slot() -> None:
    with pytest.raises(ValidationError, match="slots of a container can read each other; set slots_per_container = 1"):
        SandboxConfig(runtime="runsc")
