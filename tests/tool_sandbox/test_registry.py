"""Which tools a gateway has."""

import pytest

from tool_sandbox import registry
from tool_sandbox.config import SandboxConfig
from tool_sandbox.errors import SandboxError
from tool_sandbox.metrics import Metrics
from trajectory.tools import TOOLS, ToolSpec


class Dictionary:
    """What runs a tool of one's own; it answers nothing, as nobody calls it here."""

    broken = ""

    def open(self) -> None: ...

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def run(self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str):
        raise NotImplementedError


def test_a_gateway_has_the_tools_of_the_records_that_are_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SandboxConfig()
    assert list(registry.build_tools(config, Metrics())) == ["python"]  # no search index is set
    spec = ToolSpec(tag="lookup", name="dictionary", usage="", example="", label="")
    monkeypatch.setitem(TOOLS, spec.tag, spec)
    with pytest.raises(SandboxError, match="nothing runs the tool 'dictionary'"):
        registry.build_tools(config, Metrics())
    dictionary = Dictionary()
    monkeypatch.setitem(registry.RUNNERS, "dictionary", lambda config, metrics: dictionary)
    assert registry.build_tools(config, Metrics())["dictionary"] is dictionary
