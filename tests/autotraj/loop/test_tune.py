"""Trials of Ray Tune: each reserves what its actors need, works in a folder of its own, and can be gone on from."""

from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from tiny_run import tiny

from autotraj.gateways.session import GatewayAccess
from autotraj.loop.grpo import GRPO, GRPOConfig
from trajectory.log import read_log

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.docker, pytest.mark.timeout(900)]


class Together(tune.Callback):
    """Counts the trials that are there at the same time."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.most = 0

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.now.add(trial.trial_id)
        self.most = max(self.most, len(self.now))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.now.discard(trial.trial_id)


def test_two_trials_take_turns_where_there_is_room_for_one(
    gateway: GatewayAccess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cluster has two learners' CPUs and an engine's: what one trial's actors reserve. Paths are relative to here."""
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(tiny(tmp_path).model)
    overrides = ("learner.num_learners=2", "grpo.groups_per_step=2", "grpo.num_steps=1")
    config = tiny(tmp_path, 'model="base"', 'run_dir="runs"', *overrides)
    settings = GRPOConfig().run(
        config, sandbox_address=gateway.address, sandbox_token=gateway.token, trajectory_log="trajectories.log"
    )
    settings.callbacks(on_train_result=lambda algorithm, result, **more: result.update(told=True))
    together = Together()
    assert ray.cluster_resources()["CPU"] == 3
    results = tune.Tuner(
        GRPO,
        param_space=settings.vary({"learner.lr": tune.grid_search([1e-4, 3e-3])}),
        run_config=tune.RunConfig(
            name="lr",
            storage_path=str(tmp_path / "tune"),
            callbacks=[together],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
        ),
    ).fit()
    assert not results.errors
    assert together.most == 1
    second = results[1]
    assert [r.metrics["grpo"]["step"] for r in results] == [1.0, 1.0]
    assert [r.metrics["grpo"]["learner/lr"] for r in results] == pytest.approx([1e-4, 3e-3])
    assert all(r.metrics["told"] for r in results)
    logs = sorted(Path("runs").glob("*/trajectories.log"))
    assert [log.parent.name for log in logs] == sorted(Path(r.path).name for r in results)
    for log in logs:
        assert len(list(read_log(str(log)))) >= 2
    assert sorted(p.name for p in Path("runs").iterdir()) == [log.parent.name for log in logs]

    monkeypatch.chdir("/")
    algo = GRPO.from_checkpoint(second.checkpoint)
    try:
        assert algo.policy_version == 1
        assert algo.train()["grpo"]["learner/lr"] == pytest.approx(3e-3)
        assert algo.policy_version == 2
    finally:
        algo.stop()
