"""The part of a checkpoint for the GRPO loop without its learners: ledger, scored but untrained groups, and the scorer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgpack

from trajectory.log import decode_group, encode_group
from trajectory.types import Group

STATE_FILE = "autotraj_state.msgpack"
FIRST_VERSION = 1
"""Version of the reward model that a run is configured with. Each refresh makes the next version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLoop:
    """The loop's state at a checkpoint. Its parts are those of `Ledger`, `Scorer` and `OnlineRepair`; None: not used."""

    ledger: dict[str, Any]
    buffer: Sequence[Group]
    num_leases: int
    scorer: dict[str, Any] | None
    repair: dict[str, Any] | None

    def to_bytes(self) -> bytes:
        """The state as bytes for `from_bytes`."""
        packed: bytes = msgpack.packb(
            {
                "ledger": self.ledger,
                "buffer": [encode_group(group) for group in self.buffer],
                "num_leases": self.num_leases,
                "scorer": self.scorer,
                "repair": self.repair,
            }
        )
        return packed

    @classmethod
    def from_bytes(cls, data: bytes) -> SavedLoop:
        state = msgpack.unpackb(data, strict_map_key=False)
        return cls(**(state | {"buffer": [decode_group(group) for group in state["buffer"]]}))


def reward_model(data: bytes) -> tuple[int, str]:
    """From a state's bytes: the version of the reward model that scored (1 if there was none), and its path."""
    scorer = msgpack.unpackb(data, strict_map_key=False)["scorer"]
    return (scorer["version"], scorer["path"]) if scorer else (FIRST_VERSION, "")
