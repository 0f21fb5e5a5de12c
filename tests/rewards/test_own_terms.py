"""The user's own reward terms, in real processes: what they may return, and every way in which they fail."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rewards.config import BUILT_IN, RewardConfig
from rewards.own_terms import OwnTerms, TermFailed, TermRefused
from rewards.terms import REWARD_TERMS
from trajectory.types import Group, Task, Trajectory

SOURCE = '''
import asyncio, os, sys, threading

def length(task, trajectory):
    return len(trajectory.text), f"of {task.id}"

def right(task, trajectory, *, marker="b"):
    return marker in trajectory.text

def rank(group):
    return [float(t.index) for t in group.trajectories]

barrier = None

async def together(task, trajectory):
    """Returns only once both are under way."""
    global barrier
    barrier = barrier or asyncio.Barrier(2)
    return await barrier.wait()

def raises(task, trajectory):
    return 1 / 0

async def raises_later(task, trajectory):
    raise KeyError("k")

def nan(task, trajectory):
    return float("nan")

def text(task, trajectory):
    return "good"

def nothing(task, trajectory):
    pass

def too_few(group):
    return [1.0]

def large(task, trajectory):
    return 1e300

def exits(task, trajectory):
    sys.exit("enough")

def dies(task, trajectory):
    os._exit(3)

def hangs(task, trajectory):
    threading.Event().wait()

def other(text):
    return 1.0

def starred(*group):
    return 1.0

class Thing:
    def __init__(self, group):
        pass

number = 3
'''


def trajectory(index: int, text: str) -> Trajectory:
    one = np.ones(1, np.int32)
    return Trajectory(
        task_id="t",
        index=index,
        prompt_ids=one,
        response_ids=one,
        loss_mask=one.astype(np.bool_),
        logprobs=one.astype(np.float32),
        segments=(),
        turns=(),
        text=text,
        finish_reason="answer",
    )


GROUP = Group(
    lease_id="l",
    task=Task(id="t", question="?", golds=("1",)),
    trajectories=(trajectory(0, "a\ud800"), trajectory(1, "bbb")),
)

Make = Callable[..., OwnTerms]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    folder = tmp_path_factory.mktemp("modules")
    Path(folder, "terms_of_a_test.py").write_text(SOURCE)
    Path(folder, "broken_terms_of_a_test.py").write_text("import os\nos.no_such_thing\n")
    Path(folder, "dying_terms_of_a_test.py").write_text("import os\nos._exit(4)\n")
    sys.path.insert(0, str(folder))
    with contextlib.ExitStack() as stack:

        def own(*names: str, timeout_s: float = 120.0, weight: float = 1.0) -> OwnTerms:
            uses = [name if ":" in name else f"terms_of_a_test:{name}" for name in names]
            config = RewardConfig(
                terms=[{"use": use, "weight": weight} for use in uses],  # type: ignore[arg-type]
                terms_timeout_s=timeout_s,
            )
            return stack.enter_context(contextlib.closing(OwnTerms(config)))

        yield own
    sys.path.remove(str(folder))


def test_numbers_with_and_without_a_note_for_one_and_for_a_group(make: Make) -> None:
    own = make("length", "right", "rank", "together")
    own.check()
    found = {term.name: own.values(term, GROUP) for term in own.terms}
    assert "terms_of_a_test" not in sys.modules  # the driver imports none of it
    assert found["length"] == [(2.0, "of t"), (3.0, "of t")]
    assert found["right"] == [(0.0, ""), (1.0, "")]
    assert found["rank"] == [(0.0, ""), (1.0, "")]
    assert sorted(found["together"]) == [(0.0, ""), (1.0, "")]


def test_what_gives_no_number_is_told_by_name_and_the_next_call_is_answered(make: Make) -> None:
    said = {
        "raises": r"raised ZeroDivisionError: division by zero \(terms_of_a_test.py, line \d+\)",
        "raises_later": "raised KeyError: 'k'",
        "nan": "returned nan",
        "text": r"returned 'good' \(str\), and not a number",
        "nothing": r"returned None \(NoneType\), and not a number",
        "too_few": r"returned \[1.0\] \(list\), and not a list with a value for each of 2",
        "large": r"returned 1e\+300; times its weight it may be at most 100 in size",
        "exits": "raised SystemExit: enough",
        "dies": r"its process ended \(exit code 3\)",
    }
    own = make("rank", *said)
    for term in own.terms[1:]:
        with pytest.raises(TermFailed, match=f"^'terms_of_a_test:{term.name}'.*{said[term.name]}"):
            own.values(term, GROUP)
        assert own.values(own.terms[0], GROUP) == [(0.0, ""), (1.0, "")]


def test_one_that_hangs_is_killed_at_its_deadline(make: Make) -> None:
    own = make("hangs", timeout_s=0.5)
    for _ in range(2):  # the second time in another process
        with pytest.raises(TermFailed, match=r"'terms_of_a_test:hangs' did not return within .* = 0.5 s"):
            own.values(own.terms[0], GROUP)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        ("lenght", r"has no 'lenght'; did you mean 'length'\?"),
        ("other", r"has the parameters \(text\): a reward term is a function of \(task, trajectory\), or of \(group\)"),
        ("starred", r"has the parameters \(\*group\)"),
        ("Thing", "is no function"),
        ("number", "is no function"),
        ("nowhere_at_all:f", "there is no module 'nowhere_at_all'"),
        ("broken_terms_of_a_test:f", "importing broken_terms_of_a_test raised AttributeError"),
        ("dying_terms_of_a_test:f", r"their process ended \(exit code 4\)"),
    ],
)
def test_what_can_not_be_used_is_refused_before_anything_starts(make: Make, use: str, said: str) -> None:
    with pytest.raises(TermRefused, match=said):
        make(use).check()


def test_names_are_one_for_each_term() -> None:
    assert tuple(REWARD_TERMS) == BUILT_IN
    for uses in (["m:format"], ["m:f", "n:f"]):
        with pytest.raises(ValueError, match="as another term is; give the function another name"):
            RewardConfig(terms=[{"use": use} for use in uses])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is no import path"):
        RewardConfig(terms=[{"use": "brevity"}])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="preset = 'paper' means terms"):
        RewardConfig(preset="paper", terms=[{"use": "m:f"}])  # type: ignore[list-item]
