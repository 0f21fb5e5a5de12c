"""A learner that is killed in the SFT stage or in the reward model's: new ones go on, and what comes out is the same."""

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from replies import CLEAN, POOR
from running import runner_pids
from safetensors.numpy import load_file
from tiny_run import tiny

from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import PREFERENCES_FILE, REWARD_MODEL, SFT, SFT_FILE, SYNTHESIZE
from autotraj.errors import RunError
from autotraj.interrupt import Interrupt
from autotraj.preferences.pairs import is_held_out
from autotraj.stages.reward_model import train_reward_model
from autotraj.stages.sft import sft
from trajectory.records import preference_record, sft_record, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

NUM_STEPS = 12
QUESTION = "What is {} times 3?"


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    """Twelve steps of one record; SFT writes a checkpoint after every second, the reward model's stage after the tenth."""
    config = tiny(
        tmp_path,
        'stages=["synthesize", "sft", "reward-model"]',
        "sft.batch_size=1",
        "sft.epochs=1",
        "sft.lr=1e-3",
        "sft.checkpoint_every=2",
        "reward_model.batch_pairs=1",
        "reward_model.epochs=1",
        "reward_model.lr=1e-3",
        "reward_model.evaluate_every=1",
        "reward_model.patience=100",
        "reward_model.held_out=0.4",
        "learner.zero_stage=0",
        *overrides,
    )
    folder = config.folder / SYNTHESIZE.folder
    folder.mkdir(parents=True)
    write_jsonl(
        folder / SFT_FILE,
        [
            sft_record(QUESTION.format(n), CLEAN, "", task_id=str(n), source="kept", quality=1.0)
            for n in range(NUM_STEPS)
        ],
    )
    trained_on = islice((n for n in count() if not is_held_out(str(n), 0.4)), NUM_STEPS)
    held_out = islice((n for n in count() if is_held_out(str(n), 0.4)), 4)
    write_jsonl(
        folder / PREFERENCES_FILE,
        [preference_record(QUESTION.format(n), CLEAN, POOR, "", task_id=str(n)) for n in (*trained_on, *held_out)],
    )
    return config


class Kills:
    """Kills a learner after each of these steps, once. To be called as a stage's `on_step`."""

    def __init__(self, *steps: int) -> None:
        self._left = list(steps)
        self.seen: list[int] = []

    def __call__(self, step: int, num_steps: int, metrics: Mapping[str, float]) -> None:
        assert num_steps == NUM_STEPS
        self.seen.append(step)
        if step in self._left:
            self._left.remove(step)
            os.kill(runner_pids("Learner")[0], signal.SIGKILL)


def run_sft(config: RunConfig, on_step: Kills) -> dict[str, Any]:
    return sft(config, interrupt=Interrupt(), on_step=on_step)


def run_reward_model(config: RunConfig, on_step: Kills) -> dict[str, Any]:
    return train_reward_model(config, config.model, interrupt=Interrupt(), on_step=on_step)


def training_losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.parametrize(
    ("stage", "run", "kills", "seen", "model"),
    [
        # Once before the first checkpoint, and once when the newest one is to be gone on from.
        (SFT.folder, run_sft, (1, 12), [1, *range(1, 13), *range(11, 13)], "policy"),
        (REWARD_MODEL.folder, run_reward_model, (2, 11), [1, 2, *range(1, 12), *range(11, 13)], "model"),
    ],
)
def test_what_comes_out_is_what_comes_out_undisturbed(
    tmp_path: Path,
    stage: str,
    run: Callable[[RunConfig, Kills], dict[str, Any]],
    kills: tuple[int, ...],
    seen: list[int],
    model: str,
) -> None:
    plain, killed = config_of(tmp_path / "plain"), config_of(tmp_path / "killed")
    expected = run(plain, Kills())
    steps = Kills(*kills)
    assert run(killed, steps) == pytest.approx(expected, abs=1e-5)
    assert steps.seen == seen
    losses, reference = training_losses(killed.folder / stage), training_losses(plain.folder / stage)
    assert [step for step, _ in losses] == list(range(1, NUM_STEPS + 1)), "each step once"
    np.testing.assert_allclose(losses, reference, atol=1e-5)
    found, right = (load_file(config.folder / stage / model / "model.safetensors") for config in (killed, plain))
    assert found.keys() == right.keys()
    for name in right:
        np.testing.assert_allclose(found[name], right[name], atol=1e-5, err_msg=name)


def test_learners_that_are_lost_too_often_end_the_stage_by_name(tmp_path: Path) -> None:
    config = config_of(tmp_path, "grpo.max_learner_restarts=1")
    with pytest.raises(RunError, match=r"The last complete checkpoint is of step 2; go on with the same command"):
        run_sft(config, Kills(1, 3))
    assert not (config.folder / SFT.folder / "policy").exists()
    assert run_sft(config, Kills())["num_steps"] == NUM_STEPS
    assert [step for step, _ in training_losses(config.folder / SFT.folder)] == list(range(1, NUM_STEPS + 1))
