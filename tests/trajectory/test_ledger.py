"""The ledger against a model of it, and its admission rule against hand-computed numbers."""

import time

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trajectory.ledger import Ledger, LedgerError, admissible, is_stale
from trajectory.types import Task

MAX_ATTEMPTS = 2


def make_tasks(num):
    return [Task(id=f"t{i}", question=f"q{i}", golds=("1",)) for i in range(num)]


def make_ledger(num_tasks=4, **kwargs):
    return Ledger(make_tasks(num_tasks), seed=7, **kwargs)


def scored(ledger):
    item = ledger.lease()
    ledger.finish(item.lease_id)
    ledger.score(item.lease_id)
    return item


def test_every_epoch_has_all_tasks_once_in_an_order_of_its_own():
    ledger = make_ledger(50)
    epochs = [[ledger.lease().task.id for _ in range(50)] for _ in range(3)]
    assert all(sorted(ids) == sorted(t.id for t in make_tasks(50)) for ids in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ledger.epoch == 2
    again = make_ledger(50)
    assert [again.lease().task.id for _ in range(50)] == epochs[0]


def states(ledger):
    """Lease id → state, of what is in flight."""
    return {f"{epoch}-{index}-{attempt}": state for epoch, index, attempt, state in ledger.state()["in_flight"]}


def test_the_way_of_a_group():
    ledger = make_ledger(4)
    item = ledger.lease()
    assert (item.epoch, item.attempt) == (0, 1)
    ledger.finish(item.lease_id)
    ledger.score(item.lease_id)
    ledger.train([item.lease_id], step=1)
    assert states(ledger) == {}
    counts = ledger.counts()
    assert (counts.pending, counts.leased, counts.finished, counts.scored) == (3, 0, 0, 0)
    assert (counts.trained, counts.dropped) == (1, 0)


def test_wrong_transitions_are_named():
    ledger = make_ledger()
    item = ledger.lease()
    with pytest.raises(LedgerError, match="should be finished, but is leased"):
        ledger.score(item.lease_id)
    ledger.finish(item.lease_id)
    with pytest.raises(LedgerError, match="should be leased, but is finished"):
        ledger.finish(item.lease_id)
    with pytest.raises(LedgerError, match="should be scored, but is finished"):
        ledger.train([item.lease_id], step=1)
    ledger.score(item.lease_id)
    ledger.train([item.lease_id], step=1)
    for late in (ledger.finish, ledger.score, lambda i: ledger.drop(i, "x"), lambda i: ledger.hand_back(i, "x")):
        with pytest.raises(LedgerError, match="trained, dropped or handed back, or never leased"):
            late(item.lease_id)


def test_a_step_trains_all_or_nothing_and_only_once():
    ledger = make_ledger()
    first, second = scored(ledger), scored(ledger)
    unscored = ledger.lease()
    with pytest.raises(LedgerError, match="should be scored, but is leased"):
        ledger.train([first.lease_id, unscored.lease_id], step=1)
    with pytest.raises(LedgerError, match="names a lease twice"):
        ledger.train([first.lease_id, first.lease_id], step=1)
    assert ledger.counts().trained == 0
    assert ledger.counts().scored == 2
    ledger.train([first.lease_id], step=1)
    with pytest.raises(LedgerError, match="step 1 can't be recorded after step 1"):
        ledger.train([second.lease_id], step=1)


def test_a_handed_back_task_comes_first_and_is_dropped_in_the_end():
    ledger = make_ledger(4, max_attempts=2)
    item = ledger.lease()
    ledger.lease()
    assert ledger.hand_back(item.lease_id, "stale")
    again = ledger.lease()
    assert again.task == item.task
    assert again.attempt == 2
    assert again.lease_id != item.lease_id
    assert not ledger.hand_back(again.lease_id, "stale")
    assert ledger.drop_reasons == {"stale": 1}
    assert ledger.hand_back_reasons == {"stale": 1}
    assert {ledger.lease().task.id for _ in range(2)}.isdisjoint({item.task.id})


def test_restore_keeps_what_is_held_and_leases_the_rest_again():
    ledger = make_ledger(6)
    held, lost = scored(ledger), scored(ledger)
    finished = ledger.lease()
    ledger.finish(finished.lease_id)
    in_flight = ledger.lease()
    rest = {t.id for t in make_tasks(6)} - {i.task.id for i in (held, lost, finished, in_flight)}
    state = msgpack.unpackb(msgpack.packb(ledger.state()))

    restored = make_ledger(6)
    restored.restore(state, held=[held.lease_id])
    earlier = {**state, "in_flight": [[*row[:3], 0, row[3]] for row in state["in_flight"]]}  # of an earlier version
    also = make_ledger(6)
    also.restore(earlier, held=[held.lease_id])
    assert also.state() == restored.state()
    assert states(restored) == {held.lease_id: "scored"}
    assert [restored.lease().task for _ in range(3)] == [lost.task, finished.task, in_flight.task]
    assert {restored.lease().task.id for _ in range(2)} == rest
    assert restored.epoch == 0
    restored.train([held.lease_id], step=1)
    # The epochs after it are those of an uninterrupted run.
    assert restored.counts().pending == 0
    fresh = make_ledger(6)
    for _ in range(6):
        fresh.lease()
    assert [restored.lease().task for _ in range(6)] == [fresh.lease().task for _ in range(6)]


def test_a_restore_is_not_an_attempt():
    ledger = make_ledger(2, max_attempts=1)
    for _ in range(3):
        item = ledger.lease()
        assert item.attempt == 1
        ledger.restore(ledger.state())
    assert ledger.counts().pending == 2


def test_restore_refuses_other_tasks_and_unknown_groups():
    state = make_ledger(3).state()
    with pytest.raises(ValueError, match="resume with the same data"):
        make_ledger(4).restore(state)
    with pytest.raises(ValueError, match="0-9-1"):
        make_ledger(3).restore(state, held=["0-9-1"])


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="at least one task"):
        Ledger([], seed=0)
    with pytest.raises(ValueError, match="max_attempts"):
        make_ledger(max_attempts=0)


def test_thousands_of_operations_a_second():
    ledger = make_ledger(20_000)
    start = time.process_time()
    for step in range(200):
        items = [ledger.lease() for _ in range(100)]
        for item in items:
            ledger.finish(item.lease_id)
            ledger.score(item.lease_id)
        ledger.counts()
        ledger.train([item.lease_id for item in items], step)
    assert time.process_time() - start < 4.0  # 20,000 groups; about 0.2 s


def admit(**kwargs):
    return admissible(**({"leased": 0, "finished": 0, "trained": 0, "version": 0, "groups_per_step": 4} | kwargs))


def test_admission_by_hand():
    assert admit(max_staleness=0) == 4
    assert admit(max_staleness=0, leased=3, finished=1) == 0
    assert admit(max_staleness=0, version=1, trained=4) == 4
    assert admit(max_staleness=1) == 8
    assert admit(max_staleness=1, version=1, trained=4, leased=4) == 4
    assert admit(max_staleness=0, leased=3) == 1  # one of four was dropped: one replaces it
    assert admit(max_staleness=0, leased=9) == 0  # after a restore with a smaller limit


def test_staleness_by_hand():
    assert not is_stale(3, 3, 0)
    assert is_stale(2, 3, 0)
    assert not is_stale(2, 3, 1)
    assert is_stale(1, 3, 1)


class LedgerMachine(RuleBasedStateMachine):
    """Random lives of a ledger beside a model that keeps every (epoch, task) in exactly one place."""

    def __init__(self):
        super().__init__()
        self.ledger = Ledger(make_tasks(3), seed=1, max_attempts=MAX_ATTEMPTS)
        self.step = 0
        self.place = {}  # (epoch, task id) → state; absent while it was never leased
        self.live = {}  # lease id → Lease
        self.attempts = {}  # (epoch, task id) → leases so far
        self.ever_trained = []

    def uid(self, item):
        return (item.epoch, item.task.id)

    def give_back(self, item):
        uid = self.uid(item)
        del self.live[item.lease_id]
        self.place[uid] = "dropped" if self.attempts[uid] >= MAX_ATTEMPTS else "pending"

    def pick(self, data, *states):
        return data.draw(st.sampled_from([i for i in self.live.values() if self.place[self.uid(i)] in states]))

    def any_in(self, *states):
        return any(self.place[self.uid(i)] in states for i in self.live.values())

    @rule()
    def lease(self):
        returned = {u for u, p in self.place.items() if p == "pending"}
        item = self.ledger.lease()
        uid = self.uid(item)
        assert uid in returned if returned else uid not in self.place
        assert item.lease_id not in self.live
        self.place[uid] = "leased"
        self.attempts[uid] = self.attempts.get(uid, 0) + 1
        assert item.attempt == self.attempts[uid]
        self.live[item.lease_id] = item

    @precondition(lambda self: self.any_in("leased"))
    @rule(data=st.data())
    def finish(self, data):
        item = self.pick(data, "leased")
        self.ledger.finish(item.lease_id)
        self.place[self.uid(item)] = "finished"

    @precondition(lambda self: self.any_in("finished"))
    @rule(data=st.data())
    def score(self, data):
        item = self.pick(data, "finished")
        self.ledger.score(item.lease_id)
        self.place[self.uid(item)] = "scored"

    @precondition(lambda self: self.any_in("scored"))
    @rule()
    def train(self):
        items = [i for i in self.live.values() if self.place[self.uid(i)] == "scored"]
        self.step += 1
        self.ledger.train([i.lease_id for i in items], self.step)
        for item in items:
            self.place[self.uid(item)] = "trained"
            self.ever_trained.append(self.uid(item))
            del self.live[item.lease_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def drop(self, data):
        item = self.pick(data, "leased", "finished", "scored")
        self.ledger.drop(item.lease_id, "reason")
        self.place[self.uid(item)] = "dropped"
        del self.live[item.lease_id]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def hand_back(self, data):
        item = self.pick(data, "leased", "finished", "scored")
        waits = self.ledger.hand_back(item.lease_id, "reason")
        self.give_back(item)
        assert waits == (self.place[self.uid(item)] == "pending")

    @rule(data=st.data())
    def crash_and_restore(self, data):
        ready = [i.lease_id for i in self.live.values() if self.place[self.uid(i)] == "scored"]
        held = data.draw(st.sets(st.sampled_from(ready))) if ready else set()
        state = msgpack.unpackb(msgpack.packb(self.ledger.state()))
        self.ledger = Ledger(make_tasks(3), seed=1, max_attempts=MAX_ATTEMPTS)
        self.ledger.restore(state, held)
        for item in [i for i in self.live.values() if i.lease_id not in held]:
            del self.live[item.lease_id]
            self.place[self.uid(item)] = "pending"
            self.attempts[self.uid(item)] -= 1

    @invariant()
    def counts_add_up(self):
        counts = self.ledger.counts()
        places = list(self.place.values())
        num_started = 3 * (self.ledger.epoch + 1)
        assert counts.pending == places.count("pending") + num_started - len(places)
        assert counts.leased == places.count("leased")
        assert counts.finished == places.count("finished")
        assert counts.scored == places.count("scored")
        assert counts.trained == places.count("trained") == len(self.ever_trained)
        assert counts.dropped == places.count("dropped")

    @invariant()
    def nothing_is_trained_twice(self):
        assert len(set(self.ever_trained)) == len(self.ever_trained)

    @invariant()
    def states_agree(self):
        assert states(self.ledger) == {item.lease_id: self.place[self.uid(item)] for item in self.live.values()}


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=100, stateful_step_count=40)
