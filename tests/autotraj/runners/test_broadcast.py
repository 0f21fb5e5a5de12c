"""The rounds of an NCCL weight sync. There is no GPU here: the learners' and the engines' ends of NCCL are stood in for."""

from typing import Any

import pytest

from autotraj.errors import RunError
from autotraj.runners.broadcast import BroadcastSync
from learners.weight_sync import engine_init_info


class Pending:
    def __init__(self) -> None:
        self.done = False

    def poll(self) -> bool | None:
        return True if self.done else None


class Learners:
    def __init__(self) -> None:
        self.opened: list[int] = []
        self.num_sent = 0
        self.pending = Pending()

    def open_broadcast(self, num_engine_workers: int) -> tuple[dict[str, Any], Pending]:
        self.opened.append(num_engine_workers)
        self.pending = Pending()
        return engine_init_info("10.0.0.1", 1234, num_engine_workers), self.pending

    def broadcast(self) -> Pending:
        self.num_sent += 1
        self.pending = Pending()
        return self.pending


class Rounds:
    """A `BroadcastSync` with its surroundings."""

    def __init__(self, workers_per_engine: int = 1) -> None:
        self.learners = Learners()
        self.training = False
        self.calls: list[tuple[int, str, Any]] = []
        self.sync = BroadcastSync(
            self.learners,
            workers_per_engine=workers_per_engine,
            learners_train=lambda: self.training,
            call=lambda *call: self.calls.append(call),
        )

    def finish_phase(self, members: list[int]) -> None:
        for runner_id in members:
            self.sync.answered(runner_id)
        self.learners.pending.done = True
        self.sync.advance([], members)

    def finish_round(self, members: list[int]) -> None:
        self.sync.advance(members, members)
        while self.sync.busy:
            self.finish_phase(members)


def test_all_join_then_all_receive() -> None:
    rounds = Rounds()
    rounds.sync.advance(waiting=[1], members=[2, 1])
    assert [(i, kind) for i, kind, _ in rounds.calls] == [(1, "join"), (2, "join")]
    assert rounds.sync.busy
    rounds.sync.answered(1)
    rounds.learners.pending.done = True
    rounds.sync.advance([], [1, 2])
    assert rounds.learners.num_sent == 0  # runner 2 hasn't joined
    rounds.sync.answered(2)
    rounds.sync.advance([], [1, 2])
    assert [(i, kind) for i, kind, _ in rounds.calls[2:]] == [(1, "sync"), (2, "sync")]
    rounds.finish_phase([1, 2])
    assert not rounds.sync.busy


def test_ranks_of_engines_with_several_workers_do_not_meet() -> None:
    rounds = Rounds(workers_per_engine=4)
    rounds.sync.advance([7], [3, 7, 5])
    assert rounds.learners.opened == [12]
    infos = [info for _, _, info in rounds.calls]
    # vLLM (nccl_common.worker_init_process_group): rank = the worker's rank in its engine + rank_offset
    ranks = [info["rank_offset"] + worker for info in infos for worker in range(4)]
    assert sorted(ranks) == list(range(1, 13))
    assert {info["world_size"] for info in infos} == {13}


def test_the_group_stays_open_while_the_same_engines_live() -> None:
    rounds = Rounds()
    rounds.finish_round([1, 2])
    rounds.finish_round([1, 2])
    assert rounds.learners.opened == [2]
    assert rounds.learners.num_sent == 2


def test_an_engine_that_comes_back_gets_into_a_new_group() -> None:
    rounds = Rounds()
    rounds.finish_round([1, 2])
    rounds.sync.lost(2, "runner 2 died")
    rounds.finish_round([1])
    rounds.finish_round([1, 2])
    assert rounds.learners.opened == [2, 1, 2]


def test_a_restart_between_two_rounds_opens_a_new_group_for_the_same_ids() -> None:
    rounds = Rounds()
    rounds.finish_round([1, 2])
    rounds.sync.lost(2, "runner 2 died")
    rounds.finish_round([1, 2])
    assert rounds.learners.opened == [2, 2]


def test_no_round_begins_while_the_learners_train() -> None:
    rounds = Rounds()
    rounds.training = True
    rounds.sync.advance([1], [1])
    assert not rounds.sync.busy
    rounds.training = False
    rounds.sync.advance([1], [1])
    assert rounds.sync.busy


@pytest.mark.parametrize("phase", ["joining", "sending"])
def test_a_death_within_a_round_ends_the_run_and_says_how_to_go_on(phase: str) -> None:
    rounds = Rounds()
    rounds.sync.advance([1], [1, 2])
    if phase == "sending":
        rounds.finish_phase([1, 2])
    with pytest.raises(RunError, match=rf"runner 2 died.*{phase}.*--resume"):
        rounds.sync.lost(2, "runner 2 died")
