"""The math-verify process: its deadline holds, and it comes back after everything."""

import concurrent.futures
import contextlib
import os
import signal
import time

import psutil
import pytest

from rewards import verifier
from rewards.verifier import MathVerifier, Verdict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared():
    math_verifier = MathVerifier()
    yield math_verifier
    math_verifier.close()


def test_a_bomb_ends_at_its_deadline_and_the_next_question_is_answered(shared):
    assert shared.equal("\\pi", "\\pi", 30.0).equal  # started
    start = time.monotonic()
    verdict = shared.equal("9^{9^{9^{9}}}", "2", 0.5)
    assert not verdict.equal
    assert "waited 0.5 s" in verdict.note
    assert time.monotonic() - start < 5.0
    assert shared.equal("2\\pi", "\\pi+\\pi", 30.0) == verifier.Verdict(True)


def test_a_killed_process_is_noted_and_replaced(shared):
    assert shared.equal("\\pi", "\\pi", 30.0).equal
    pid = shared._child.pid
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answer = pool.submit(shared.equal, "9^{9^{9^{9}}}", "2", 60.0)
        time.sleep(0.5)
        os.kill(pid, signal.SIGKILL)
        assert "its process died" in answer.result(timeout=10).note
    assert shared.equal("\\pi", "\\pi", 30.0).equal
    assert shared._child.pid != pid


def test_threads_take_turns(shared):
    pairs = [(f"{i}\\pi", f"{i % 3}\\pi") for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda pair: shared.equal(*pair, 30.0).equal, pairs))
    assert verdicts == [i < 3 for i in range(12)]


@pytest.mark.parametrize(
    "hostile", ["{" * 900, "\x00\n\r", "\ud800", "}\\boxed{\\pi}", "\\input{/etc/passwd}", "\n[true]\n"]
)
def test_hostile_text_is_not_equal_and_does_no_harm(shared, hostile):
    assert not shared.equal(hostile, "\\pi", 1.0).equal


def test_long_answers_are_not_compared(shared):
    verdict = shared.equal("1+" * 501 + "1", "502", 1.0)
    assert not verdict.equal
    assert "1000 characters" in verdict.note


def test_no_verdict_is_named_and_asked_again(monkeypatch):
    """The process is stopped, as by a busy machine, for one comparison of a right answer; the next one is decided."""
    others = set(psutil.Process().children())
    with contextlib.closing(MathVerifier()) as math_verifier:
        monkeypatch.setattr(verifier, "_verifier", math_verifier)
        assert verifier.equal("\\pi", "\\pi+0", 30.0).equal  # started
        (child,) = set(psutil.Process().children()) - others
        child.suspend()
        stalled = verifier.equal("3\\sqrt2", "\\sqrt{18}", 3.0)
        assert stalled == Verdict(False, "timeout", "no_verdict/timeout: math-verify gave none: waited 3 s for it")
        assert verifier.equal("3\\sqrt2", "\\sqrt{18}", 3.0) == Verdict(True)


@pytest.mark.parametrize(
    ("answer", "name"),
    [("1+" * 501 + "1", "too_long"), ("9^{9^{9^{9}}}", "timeout")],
)
def test_every_missing_verdict_has_a_name(shared, answer, name):
    assert shared.equal("\\pi", "\\pi", 30.0).equal  # started
    verdict = shared.equal(answer, "\\pi", 2.0)
    assert verdict.no_verdict == name
    assert verdict.note.startswith(f"no_verdict/{name}: ")


def test_the_child_may_not_fill_the_memory(shared):
    assert shared.equal("\\pi", "\\pi", 30.0).equal
    with open(f"/proc/{shared._child.pid}/limits") as limits:
        address_space = next(line for line in limits if line.startswith("Max address space"))
    assert address_space.split()[3:5] == [str(2 << 30)] * 2


def test_the_child_ends_by_itself_when_nobody_reads_it():
    math_verifier = MathVerifier()
    child = math_verifier._running_child()
    os.write(child.stdin.fileno(), b'{"answer": "9^{9^{9^{9}}}", "gold": "2", "timeout_s": 0.2}\n')
    assert child.wait(timeout=10) == -signal.SIGALRM
    math_verifier.close()


def test_a_broken_installation_is_an_error_and_not_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(verifier, "_CHILD", verifier._CHILD.with_name("missing.py"))
    with pytest.raises(RuntimeError, match="math-verify process didn't start: its process died"):
        MathVerifier().equal("\\pi", "\\pi", 1.0)
