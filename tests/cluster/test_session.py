"""Joining Ray leaves the process as it was."""

import os
import re
import subprocess
import sys

import pytest
from ray.cluster_utils import Cluster

from cluster.roles import Ask
from cluster.session import ray_session
from cluster.session_watch import WITNESS
from examples.fake_cluster.cluster import ROOT

STOPPED = """
import os, signal, time
from autotraj.interrupt import graceful_interrupt
from cluster.session import ray_session

with graceful_interrupt() as interrupt, ray_session(num_cpus=1, num_gpus=0), interrupt.deferred():
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


KILLED = """
import psutil, ray, sys, time
from cluster.session import ray_session
from cluster.session_watch import RayDied

try:
    with ray_session(num_cpus=1, num_gpus=0):
        [daemon] = [p for p in psutil.Process().children() if p.name() == sys.argv[1]]
        daemon.kill()
        time.sleep(60)
except RayDied as error:
    print(error)
"""


@pytest.mark.ray
@pytest.mark.parametrize(("daemon", "name"), [("raylet", "raylet"), ("gcs_server", "GCS")])
def test_the_end_of_ray_is_said_at_once_with_the_way_on(daemon: str, name: str) -> None:
    """Ray's own library waits for a minute and then ends the process without a word."""
    command = [sys.executable, "-c", KILLED, daemon]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"Ray's {name} (process " in done.stdout
    assert "go on with the same command, `grpo` with --resume RUN_DIR" in done.stdout


IN_PUT = """
import psutil, ray, threading, numpy
from cluster.session import ray_session

with ray_session(num_cpus=1, num_gpus=0):
    [raylet] = [p for p in psutil.Process().children() if p.name() == "raylet"]
    block = numpy.zeros(1 << 24, numpy.uint8)
    ray.put(block)  # the first one imports modules, among which our own exception would come first
    threading.Timer(0.5, raylet.kill).start()
    while True:
        ray.put(block)
"""


@pytest.mark.ray
def test_the_end_of_ray_is_said_where_its_library_ends_the_process() -> None:
    """In `ray.put`: Ray exits the process as soon as the object store doesn't answer, before any of our threads runs.

    The killed raylet takes the control store with it; a busy machine may see the end of that one first. Between two calls
    of `ray.put` our own exception may be first."""
    command = [sys.executable, "-c", IN_PUT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert re.search(r"(\nfailed|RayDied): Ray's (raylet|GCS) \(process \d+\) has ended", done.stderr), done.stderr
    assert done.stderr.count("go on with the same command, `grpo` with --resume RUN_DIR") == 1


def test_of_daemons_that_ended_in_one_moment_the_first_is_named() -> None:
    """As the witness of a busy machine sees them: the run ends by the raylet's death, and ends the GCS with itself."""
    run, one, other = (subprocess.Popen(["sleep", "60"]) for _ in range(3))
    for process in (run, one, other):
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    for first, second in ((one, other), (other, one)):
        words = [str(run.pid), str(first.pid), "the raylet", str(second.pid), "the GCS"]
        done = subprocess.run(
            [sys.executable, WITNESS, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        assert done.stderr == "failed: the raylet\n"
    for process in (run, one, other):
        process.wait()


@pytest.mark.ray
def test_an_engine_larger_than_every_node_of_a_running_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would let its actor wait, as the GPUs of both nodes together are enough. Ray believes the numbers of GPUs."""
    engine = Ask("engines", 1, {"CPU": 1, "GPU": 4}, gpus_key="engine.tensor_parallel_size")
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, num_gpus=2, include_dashboard=False, object_store_memory=80 * 1024**2)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        refused = pytest.raises(ValueError, match=r"^engine.tensor_parallel_size = 4: .* the largest node has 2 GPUs")
        with refused, ray_session(num_cpus=1, num_gpus=4, asks=[engine]):
            pass
    finally:
        cluster.shutdown()
