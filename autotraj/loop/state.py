"""What a checkpoint keeps of the GRPO loop beside its learners: the ledger, scored-but-untrained groups, who scored them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from trajectory.log import decode_group, encode_group

if TYPE_CHECKING:
    from autotraj.loop.grpo import GRPO

STATE_FILE = "autotraj_state.msgpack"
FIRST_VERSION = 1
"""Of the reward model that a run is configured with; each refresh makes the next."""


def reward_model(data: bytes) -> tuple[int, str]:
    """Of a state's bytes: the version of the reward model that scored, 1 without one, and where it was."""
    scorer = msgpack.unpackb(data, strict_map_key=False)["scorer"]
    return (scorer["version"], scorer["path"]) if scorer else (FIRST_VERSION, "")


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
    """Tasks that were in flight are leased again. Raises UserError if the reward model of then is gone, or RunError."""
    state = msgpack.unpackb((folder / STATE_FILE).read_bytes(), strict_map_key=False)
    algo._buffer = [decode_group(data) for data in state["buffer"]]
    algo._ledger.restore(state["ledger"], held=[group.lease_id for group in algo._buffer])
    # Never back: seeds come from it, and what is sampled again shall be another sample.
    algo._num_leases = max(algo._num_leases, state["num_leases"])
    set_back_scoring(algo, state["scorer"], state["repair"])


def set_back_scoring(algo: GRPO, scorer: dict[str, Any] | None, repair: dict[str, Any] | None) -> None:
    """To those states; None: as at the start. Repair first: it may be about to give the service a newer model."""
    if algo._repair:
        algo._repair.restore(repair)
    if algo._scorer:
        version = scorer["version"] if scorer else FIRST_VERSION
        algo._scorer.restore(scorer, algo.models.find(version, scorer["path"] if scorer else ""))
