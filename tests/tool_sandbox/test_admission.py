"""Who is next, who must leave a full queue, when to come again: on hand-computed numbers."""

import random

import pytest

from tool_sandbox.admission import FairQueue, retry_after_s, split_deadline


def served(queue: FairQueue[str], times: int) -> list[str]:
    return [queue.pop()[1] for _ in range(times)]


def test_clients_take_turns_however_many_calls_one_has() -> None:
    queue: FairQueue[str] = FairQueue(100)
    for item in ("a1", "a2", "a3", "a4", "b1", "c1", "b2"):
        queue.push(item[0], item)
    assert served(queue, 7) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]
    assert len(queue) == 0


def test_who_holds_fewer_slots_comes_first() -> None:
    queue: FairQueue[str] = FairQueue(100)
    queue.take("a")
    queue.take("a")
    queue.take("b")
    for item in ("a1", "b1", "c1"):
        queue.push(item[0], item)
    assert served(queue, 1) == ["c1"]  # c holds 0, b 1, a 2
    queue.release("a")
    queue.release("a")
    assert served(queue, 2) == ["a1", "b1"]  # a holds 0 now


def test_a_full_queue_refuses_the_client_that_filled_it() -> None:
    queue: FairQueue[str] = FairQueue(3)
    assert [queue.push("a", item) for item in ("a1", "a2", "a3")] == [None, None, None]
    assert queue.push("a", "a4") == "a4"
    assert len(queue) == 3


def test_a_full_queue_makes_room_for_others_until_all_wait_with_as_many() -> None:
    queue: FairQueue[str] = FairQueue(4)
    for item in ("a1", "a2", "a3", "a4"):
        queue.push("a", item)
    assert queue.push("b", "b1") == "a4"  # lines of 3 and 1
    assert queue.push("b", "b2") == "a3"  # 2 and 2
    assert queue.push("b", "b3") == "b3"
    assert queue.push("c", "c1") in ("a2", "b2")
    assert len(queue) == 4


def test_with_lines_of_one_each_a_newcomer_is_refused() -> None:
    queue: FairQueue[str] = FairQueue(2)
    queue.push("a", "a1")
    queue.push("b", "b1")
    assert queue.push("c", "c1") == "c1"
    assert FairQueue[str](0).push("a", "a1") == "a1"


def test_who_gives_up_leaves_and_nothing_of_a_client_remains() -> None:
    queue: FairQueue[str] = FairQueue(10)
    queue.push("a", "a1")
    queue.push("a", "a2")
    queue.remove("a", "a1")
    assert served(queue, 1) == ["a2"]
    queue.release("a")
    assert queue.num_clients == 0
    assert (queue._lines, dict(queue._held), queue._last_served) == ({}, {}, {})
    with pytest.raises(ValueError, match="does not wait"):
        queue.remove("a", "a1")
    with pytest.raises(IndexError):
        queue.pop()


def test_any_sequence_keeps_the_bound_and_loses_nobody() -> None:
    rng = random.Random(0)
    queue: FairQueue[int] = FairQueue(8)
    waiting: set[int] = set()
    held: list[str] = []
    owner: dict[int, str] = {}
    for number in range(5000):
        step = rng.random()
        if step < 0.5:
            client = rng.choice("abcde")
            owner[number] = client
            waiting.add(number)
            leaves = queue.push(client, number)
            if leaves is not None:
                waiting.remove(leaves)
        elif step < 0.7 and waiting:
            client, item = queue.pop()
            assert owner[item] == client
            waiting.remove(item)
            held.append(client)
        elif step < 0.8 and waiting:
            item = rng.choice(sorted(waiting))
            queue.remove(owner[item], item)
            waiting.remove(item)
        elif held:
            queue.release(held.pop(rng.randrange(len(held))))
        assert len(queue) == len(waiting) <= 8
    assert set(queue.clear()) == waiting
    for client in held:
        queue.release(client)
    assert queue.num_clients == 0


@pytest.mark.parametrize(
    ("waiting", "slots", "mean_s", "expected"),
    [
        (0, 4, 1.0, 0.25),  # the next of four slots
        (7, 4, 1.0, 2.0),  # two rounds
        (0, 8, 0.01, 0.1),  # not at once
        (1000, 2, 1.0, 30.0),  # not in eternity
        (2, 0, 1.0, 3.0),  # no container at the moment
    ],
)
def test_the_hint_is_the_time_the_queue_takes(waiting: int, slots: int, mean_s: float, expected: float) -> None:
    assert retry_after_s(waiting, slots, mean_s) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [
        (None, (30.0, 5.0)),
        (40.0, (30.0, 5.0)),
        (12.5, (5.0, 5.0)),  # 12.5 - 5 - 2.5
        (7.0, (0.7, 5.0)),
        (5.0, (0.5, 4.0)),  # the client would not hear of an end at 5
        (-1.0, (0.0, 0.0)),
    ],
)
def test_a_clients_deadline_bounds_the_wait_and_the_run(left_s: float | None, expected: tuple[float, float]) -> None:
    assert split_deadline(left_s, 5.0, 30.0) == pytest.approx(expected)
