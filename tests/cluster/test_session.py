"""Joining Ray leaves the process as it was."""

import subprocess
import sys

import pytest

from cluster.fake import ROOT

STOPPED = """
import os, signal, time
from autotraj.interrupt import graceful_interrupt
from cluster.session import ray_session

with graceful_interrupt() as interrupt, ray_session(num_cpus=1, num_gpus=0):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    print("asked to stop:", interrupt.requested)
"""


@pytest.mark.ray
def test_a_run_that_began_before_ray_may_still_end_in_order() -> None:
    """A stopped job is sent SIGTERM, for which Ray's core has a handler of its own."""
    done = subprocess.run([sys.executable, "-c", STOPPED], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert "asked to stop: True" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stderr
