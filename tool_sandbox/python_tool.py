"""The tool `python`: runs code in the pool of containers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from trajectory.types import ToolResult

if TYPE_CHECKING:
    from tool_sandbox.pool import Pool

# A module whose name is only in a string selects the warm zygote, too. That costs some milliseconds and is never wrong.
_HEAVY = re.compile(
    r"\b(?:gmpy2|matplotlib|mpmath|networkx|numpy|openpyxl|pandas|scipy|seaborn|shapely|sklearn|statsmodels|sympy)\b"
)


class PythonTool:
    """Runs code in a container. A session's cells run in the container that has its state."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def open(self) -> None:
        self._pool.open()

    @property
    def broken(self) -> str:
        return self._pool.broken

    async def start(self) -> None:
        await self._pool.start()

    async def close(self) -> None:
        await self._pool.close()

    async def run(
        self, content: str, *, timeout_s: float, queue_s: float, session_id: str | None, client: str = ""
    ) -> ToolResult:
        return await self._pool.run(
            zygote_for(content), content, timeout_s=timeout_s, queue_s=queue_s, session_id=session_id, client=client
        )


def zygote_for(code: str) -> str:
    """The zygote for `code`: `warm` (numpy, pandas, scipy and sympy are imported) if it names one of them or a library that
    uses one; else `cold`, which forks faster."""
    return "warm" if _HEAVY.search(code) else "cold"
