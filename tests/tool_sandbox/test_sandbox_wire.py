"""Settings, without a container."""

import pytest

from tool_sandbox.config import SandboxConfig
from tool_sandbox.python_tool import zygote_for


@pytest.mark.parametrize("address", ["0.0.0.0:5000", "10.1.2.3:5000", "[::]:5000"])
def test_beyond_loopback_a_token_is_needed(address: str) -> None:
    with pytest.raises(ValueError, match="set tls, set a token"):
        SandboxConfig(address=address)
    assert SandboxConfig(address=address, token="t").address == address


@pytest.mark.parametrize("address", ["5000", "localhost", "127.0.0.1:x", "127.0.0.1:70000"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        SandboxConfig(address=address)


def test_a_token_is_not_shown() -> None:
    assert "s3cret" not in repr(SandboxConfig(token="s3cret"))


@pytest.mark.parametrize(
    ("code", "zygote"),
    [
        ("print(1)", "cold"),
        ("import math", "cold"),
        ("import numpy as np", "warm"),
        ("from sympy.abc import x", "warm"),
        ("import os, scipy.stats", "warm"),
        ("numpyro = 1", "cold"),
    ],
)
def test_which_zygote(code: str, zygote: str) -> None:
    assert zygote_for(code) == zygote
