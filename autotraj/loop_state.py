"""What a checkpoint keeps of the GRPO loop beside its learners: the ledger, scored-but-untrained groups, who scored them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgpack

from trajectory.store import decode_group, encode_group

if TYPE_CHECKING:
    from autotraj.grpo import GRPO

STATE_FILE = "autotraj_state.msgpack"


def write(algo: GRPO, folder: Path) -> None:
    state = {
        "ledger": algo._ledger.state(),
        "buffer": [encode_group(group) for group in algo._buffer],
        "num_leases": algo._num_leases,
        "scorer": algo._scorer.state() if algo._scorer else None,
        "repair": algo._repair.state() if algo._repair else None,
    }
    (folder / STATE_FILE).write_bytes(msgpack.packb(state))


def read(algo: GRPO, folder: Path) -> None:
    """Tasks that were in flight are leased again."""
    state = msgpack.unpackb((folder / STATE_FILE).read_bytes(), strict_map_key=False)
    algo._buffer = [decode_group(data) for data in state["buffer"]]
    algo._ledger.restore(state["ledger"], held=[group.lease_id for group in algo._buffer])
    # Never back: seeds come from it, and what is sampled again shall be another sample.
    algo._num_leases = max(algo._num_leases, state["num_leases"])
    if algo._scorer and state["scorer"]:
        algo._scorer.restore(state["scorer"])
    if algo._repair and state["repair"]:
        algo._repair.restore(state["repair"])
