"""Engines join and leave a running GRPO loop: real vLLM, Docker, DeepSpeed, Ray."""

import json
import time
from pathlib import Path

import pytest
import ray
from running import assert_nothing_lost, runner_pids
from tiny_run import tiny

from autotraj.config.run import ConfigError
from autotraj.gateways.session import GatewayAccess
from autotraj.launch import build_algorithm


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.docker
@pytest.mark.timeout(480)
def test_an_engine_joins_works_and_leaves_and_nothing_is_lost(gateway: GatewayAccess, tmp_path: Path) -> None:
    """Learners that may hardly wait (`grow_above`) ask for a second engine; it is dismissed in the middle of its work."""
    config = tiny(
        tmp_path,
        "elastic.max_actors=2",
        "elastic.grow_above=0.01",
        "elastic.shrink_above=0.99",
        "elastic.window_steps=1",
    )
    algo = build_algorithm(config, gateway)
    try:
        workers: set[str] = set()
        submit = algo.runners.submit

        def spy(runner_id: int, *args: object, **kwargs: object) -> None:
            workers.add(str(runner_id))
            submit(runner_id, *args, **kwargs)  # type: ignore[arg-type]

        algo.runners.submit = spy  # type: ignore[method-assign,assignment]
        while not algo.runners.num_joining:
            algo.train()
        # Steps meanwhile would only take the cores from the engine that starts.
        starting = [ref for ref, call in algo.runners._calls.items() if call.kind == "start"]
        assert ray.wait(starting, timeout=240.0)[0], algo.runners.describe()
        for _ in range(10):
            metrics = algo.train()["grpo"]
            if len(workers) == 2:
                break
        assert algo.runners.num_runners == algo.runners.num_serving == 2
        assert metrics["sync/logprob_diff_max"] <= 1e-4
        assert len(workers) == 2, algo.runners.describe()
        assert_nothing_lost(algo)
        algo._elastic = None  # it would ask for another at once
        left = algo.runners.dismiss()
        workers.clear()
        for _ in range(10):
            algo.train()
            if not any(view.runner_id == left for view in algo.runners.views()):
                break
        assert str(left) not in workers  # no new work for one that leaves
        assert algo.runners.num_runners == 1
        deadline = time.monotonic() + 60
        while len(runner_pids()) > 1 and time.monotonic() < deadline:  # Ray ends the process in its own time
            time.sleep(0.2)
        assert len(runner_pids()) == 1
        assert algo.runners.num_restarts == 0  # the other never noticed
        assert_nothing_lost(algo)
        # What it had begun, it finished. ("stale" is the loop's own reason: groups that waited while the engine started.)
        assert set(algo.ledger.hand_back_reasons) <= {"stale"}
    finally:
        algo.stop()
    decisions = [json.loads(line) for line in (Path(config.run_dir) / "elastic.jsonl").read_text().splitlines()]
    assert (decisions[0]["before"], decisions[0]["target"]) == (1, 2)
    assert "engines are short" in decisions[0]["reason"]


def test_a_start_outside_the_bounds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout.num_actors = 1, with which the run starts, is not between"):
        tiny(tmp_path, "elastic.min_actors=2", "elastic.max_actors=4")
