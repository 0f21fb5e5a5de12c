"""The tools that a model can call, as the model sees them: one record for each.

The tags of the grammar and its stop strings (`markup`), the system prompt (`chat`), the tools of a gateway
(`tool_sandbox.registry`) and the report's labels are derived from these records.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OWN_TAGS = ("think", "result", "answer")
"""The tags of the grammar that don't belong to a tool."""

_TAG = re.compile(r"[a-z][a-z_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """A tool's part of the model's text. Raises ValueError for a tag that the grammar can't have."""

    tag: str
    """`<tag>…</tag>` calls the tool with the text inside. It consists of lower-case letters and underscores."""

    name: str
    """The name of the tool in `tool_sandbox.registry.RUNNERS`."""

    usage: str
    """The system prompt's line about the tool, without the dash before it."""

    example: str
    """A whole reply that calls the tool, for the system prompt; empty: the prompt shows none."""

    label: str
    """The report's label for a call of the tool."""

    def __post_init__(self) -> None:
        if not _TAG.fullmatch(self.tag) or self.tag in OWN_TAGS:
            raise ValueError(
                f"a tool's tag can't be {self.tag!r}: take lower-case letters and underscores, and none of "
                f"{', '.join(OWN_TAGS)}"
            )


PYTHON = ToolSpec(
    tag="code",
    name="python",
    usage="<code>Python code</code> to run Python (numpy, scipy and sympy are installed). Print what you need to see.",
    example=r"""<think>I need 17 times 23.</think>
<code>
print(17 * 23)
</code>
<result>
391
</result>
<think>So it is 391.</think>
<answer>The product is \boxed{391}.</answer>""",
    label="Python call",
)
SEARCH = ToolSpec(
    tag="search",
    name="search",
    usage="<search>a query</search> to look something up.",
    example="",
    label="Search call",
)

TOOLS: dict[str, ToolSpec] = {tool.tag: tool for tool in (PYTHON, SEARCH)}
"""Every tool by its tag, in the order of the system prompt."""
