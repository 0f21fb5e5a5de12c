"""Ctrl-C, as a process gets it: asked once or twice, and where Python drops what a handler raises."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import ROOT

from benchmarks import interrupts

START = """
import os, signal, sys, time
from autotraj.interrupt import graceful_interrupt, taken_down_in_order

def press():
    os.kill(os.getpid(), signal.SIGINT)
"""
LOST = """
class Swallows:
    def __del__(self):
        press()
with graceful_interrupt():
    Swallows()  # Python prints what a destructor raises, and goes on
    time.sleep(60)
"""
TWICE = """
with graceful_interrupt():
    try:
        press()
        time.sleep(60)
    finally:
        press()  # the second one doesn't keep parts from being taken down
        time.sleep(1.5)  # nor does a reminder
        print("taken down")
"""
DEFERRED = """
with graceful_interrupt() as interrupt:
    with interrupt.deferred():
        press()
        print("asked to stop:", interrupt.requested)
        press()
        time.sleep(60)
"""
DURING_AN_IMPORT = """
with graceful_interrupt() as outer:
    import presses_while_imported
    with graceful_interrupt() as inner:
        print("begun in spite of it")
"""
BEFORE_ANYTHING = """
with graceful_interrupt() as interrupt:
    interrupt.nothing_begun, interrupt.way_on = True, "the same command starts again"
    try:
        if within:
            with taken_down_in_order() as parts:
                parts.callback(lambda: print("taken down"))
                import presses_while_imported
                interrupt.check()
        import presses_while_imported
    finally:
        print("the import has ended")
"""
SHARED = """
with graceful_interrupt() as outer, outer.deferred():
    with graceful_interrupt() as inner:
        press()
        print("asked to stop:", inner is outer and inner.requested)
        press()
        time.sleep(60)
"""
AT_THE_END = """
with graceful_interrupt(), taken_down_in_order() as parts:
    parts.callback(lambda: print("second part down"))
    parts.callback(press)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (LOST, ""),
        (TWICE, "taken down"),
        (DEFERRED, "asked to stop: True"),
        (SHARED, "asked to stop: True"),
        (AT_THE_END, "second part down"),
    ],
    ids=["lost", "twice", "deferred", "shared", "at the end"],
)
def test_a_request_to_stop_takes_effect(code: str, said: str) -> None:
    code = START + "try:\n" + "".join(f"    {line}\n" for line in code.strip().splitlines())
    code += "except KeyboardInterrupt:\n    sys.exit(130)\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 130, done.stderr
    assert said in done.stdout


def test_nothing_is_begun_after_a_request_during_an_import(tmp_path: Path) -> None:
    (tmp_path / "presses_while_imported.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + START + DURING_AN_IMPORT
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert done.stdout.count("stopping") == 1
    assert "begun" not in done.stdout


@pytest.mark.parametrize("within", [False, True], ids=["nothing begun", "parts are up"])
def test_an_import_ends_with_the_process_only_if_nothing_was_begun(tmp_path: Path, within: bool) -> None:
    (tmp_path / "presses_while_imported.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); within = {within}\n" + START + BEFORE_ANYTHING
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30)
    if within:
        assert done.stdout.splitlines()[-2:] == ["taken down", "the import has ended"]
        assert "KeyboardInterrupt" in done.stderr
    else:
        assert done.stdout == "\ninterrupted. The same command starts again\n"
        assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    ("code", "text", "found"),
    [
        (130, "starting …\ninterrupted. The same command starts again\n", []),
        (
            130,
            "interrupted, with a checkpoint; policy/ is written later. Continue with: autotraj grpo\n--resume runs/x\n",
            [],
        ),
        (130, "interrupted\n", ["its last words don't say that it was interrupted and how to go on"]),
        (
            -11,
            "Segmentation fault\ninterrupted. The same command starts again",
            ["ended with -11", "printed 'Segmentation fault'"],
        ),
        (None, "interrupted. The same command starts again", ["not at its end 120 s after the last signal"]),
    ],
)
def test_what_the_benchmark_counts_as_a_fault(code: int | None, text: str, found: list[str]) -> None:
    assert list(interrupts.faults(code, text)) == found
