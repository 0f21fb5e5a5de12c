"""What the settings refuse, which zygote runs what, and what the container is started with."""

import pytest
from pydantic import ValidationError

from tool_sandbox import build
from tool_sandbox.config import SandboxConfig
from tool_sandbox.docker_command import UID_STRIDE, docker_command
from tool_sandbox.python_tool import zygote_for


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
    ],
)
def test_code_that_names_a_preloaded_library_runs_where_it_is(code: str, zygote: str) -> None:
    assert zygote_for(code) == zygote


def test_containers_share_no_uid() -> None:
    """RLIMIT_NPROC counts a uid over all containers of the kernel."""
    config = SandboxConfig(slots_per_container=16)
    uids = []
    for name in ("a", "b"):
        command = docker_command(name, config)
        uids += [int(word.split("gid=")[1].split(",")[0]) for word in command if word.startswith("/w/")]
    assert len(set(uids)) == 32
    assert min(uids) >= 1_000_000
    assert UID_STRIDE >= 16


def test_containers_have_no_network_no_capability_to_spare_and_limits() -> None:
    command = " ".join(docker_command("name", SandboxConfig()))
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


def test_a_runtime_is_asked_for_only_if_one_is_set() -> None:
    assert "--runtime" not in docker_command("name", SandboxConfig())
    command = docker_command("name", SandboxConfig(runtime="runsc", slots_per_container=1))
    assert command[command.index("--runtime") + 1] == "runsc"


def test_gvisor_gets_containers_of_one_slot() -> None:
    with pytest.raises(ValidationError, match="slots of a container can read each other; set slots_per_container = 1"):
        SandboxConfig(runtime="runsc")
