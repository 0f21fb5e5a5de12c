"""The whole loop with its real parts: vLLM, Docker, DeepSpeed, Ray. Engines take half a minute each, so tests share runs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from running import assert_nothing_lost, runner_pids
from scrape import METRIC, Prometheus, labels_of, prometheus, queries, wait_exported
from tiny_run import ROOT, tiny

from actors.work import Work
from autotraj.errors import GateError, GroupsFail, NotFinite, NothingToLearn
from autotraj.gateways.session import GatewayAccess
from autotraj.interrupt import Interrupt
from autotraj.launch import build_algorithm, evaluate_engines, train
from autotraj.loop.grpo import GRPO
from autotraj.run_folder.folder import RunFolder, latest_checkpoint
from autotraj.runners.calls import Finished
from autotraj.runners.gate import MIN_TOKENS
from autotraj.status.show import show
from tasks.load import load_tasks
from trajectory.log import read_log
from trajectory.types import Group, Trajectory

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.docker, pytest.mark.timeout(600)]

GSM8K = ROOT.parent / "shared/data/gsm8k_train.jsonl"


def assert_dashboard_is_fed(server: Prometheus | None, algo: GRPO) -> None:
    """Every query of the Grafana dashboard finds its metrics and labels exported, and gets numbers from `server`.

    Meanwhile the controller looks around as it does while it waits: a gauge that isn't set again is forgotten."""
    asked = [query for panel in queries().values() for query in panel]
    wanted = {name for query in asked for name in METRIC.findall(query)}
    found = wait_exported(wanted, timeout_s=120.0, meanwhile=algo.inspection.look)
    for query in asked:
        for name in METRIC.findall(query):
            assert {"SessionName", *labels_of(query, "")} <= found[name], query
    if server is None:
        return
    deadline = time.monotonic() + 90.0
    empty = [query.replace("$session", ".*").replace("$__rate_interval", "10m") for query in asked]
    while empty := [query for query in empty if not server.has_data(query)]:
        assert time.monotonic() < deadline, f"no data for {empty}"
        algo.inspection.look()
        time.sleep(1.0)
    served = 'sum(max_over_time(ray_autotraj_sandbox_containers{state="serving"}[10m]))'
    assert float(server.ask(served)[0]["value"][1]) >= 1  # the gateway's own word, through Ray


def assert_status_is_told(run_dir: str, gateway: GatewayAccess) -> None:
    """Of this run by its folder, and by its cluster to whoever asks from another process."""
    here = show(run_dir)
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "autotraj", "status"]
    there = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert there.returncode == 0, there.stderr
    for text in (here, there.stdout):
        assert "GRPO of" in text
        for part in ("learners", "rollout actor 1", "scoring", f"sandbox {gateway.address}"):
            assert part in text, text


def test_train_die_checkpoint_resume(gateway: GatewayAccess, tmp_path: Path) -> None:
    """Four steps on two ZeRO-2 ranks, a rollout actor killed after the first, a learner after the third, which is then
    taken again from the checkpoint of the second; then a resume, on one rank, that goes on.
    With a reward term of one's own."""
    term = 'reward.terms=[{use="examples.own.reward:brevity", weight=0.1}]'
    config = tiny(tmp_path, "learner.num_learners=2", "learner.zero_stage=2", "grpo.checkpoint_every=2", term)
    with RunFolder.create(config) as folder, prometheus(tmp_path / "prometheus") as server:
        algo = build_algorithm(config, gateway, trajectory_log=folder.trajectory_log)
        try:
            seen: list[dict[str, float]] = []

            def on_step(step: int, metrics: object) -> None:
                seen.append(dict(metrics))  # type: ignore[call-overload]
                if step == 1:
                    os.kill(runner_pids()[0], signal.SIGKILL)
                elif step == 3 and len(seen) == 3:
                    os.kill(runner_pids("Learner")[0], signal.SIGKILL)

            assert train(algo, folder, num_steps=4, on_step=on_step)
            assert_nothing_lost(algo)
            assert algo.runners.num_restarts == 1  # the learner's death cost no engine
            assert seen[-1]["runner_restarts"] == 1
            assert [metrics["step"] for metrics in seen] == [1, 2, 3, 3, 4]
            assert_status_is_told(config.run_dir, gateway)
            assert all(m["sync/logprob_diff_max"] <= 1e-4 for m in seen)
            assert all(m["sync/tensors_unchecked"] == 0 for m in seen)  # of the engine that was last
            assert all(m["sync/changed_share"] > 0.5 for m in seen)
            sampled = [m for m in seen if m["sync/sampled_tokens"] >= MIN_TOKENS]
            assert sampled[0]["step"] == 1  # all of it was sampled with the first weights
            assert all(m["sync/sampled_logprob_diff_mean"] < 1e-5 for m in sampled)
            assert all(m["staleness_max"] <= config.grpo.max_staleness for m in seen)
            assert all(0 < m["reward/brevity"] < 0.1 for m in seen)
            result = evaluate_engines("after", algo, config, load_tasks(config.eval.data))
            assert (result.num_problems, result.num_failed) == (16, 0)
            assert result.accuracy > 0.2  # the base is far above that: broken weights would not be
            assert result.tool_call_rate > 0.3
            assert all(0 < reward.parts["brevity"] < 0.1 for group in result.groups for reward in group.rewards)
            assert_dashboard_is_fed(server, algo)
        finally:
            algo.stop()
        logged = list(read_log(folder.trajectory_log))
        assert len(logged) >= 4 * config.grpo.groups_per_step
        assert all("brevity" in reward.parts for group in logged for reward in group.rewards)
        assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 4

    checkpoint = latest_checkpoint(Path(config.run_dir))
    assert checkpoint is not None
    assert checkpoint.name == "step-000004"
    resumed = build_algorithm(tiny(tmp_path, "learner.num_learners=1", "learner.zero_stage=2"), gateway)
    try:
        resumed.restore_from_path(str(checkpoint))
        assert resumed.policy_version == 4
        assert_nothing_lost(resumed)
        resumed.train()
        assert resumed.policy_version == 5
        assert_nothing_lost(resumed)
    finally:
        resumed.stop()


def test_adapters_are_sent_by_themselves_and_again_to_an_engine_that_comes_back(
    gateway: GatewayAccess, tmp_path: Path
) -> None:
    """Two steps, with the engine killed after the first; then a resume from the checkpoint, and an evaluation."""
    overrides = ["learner.lora.rank=4", "learner.lora.alpha=10", "learner.lr=1e-2", "grpo.num_steps=2"]
    config = tiny(tmp_path, *overrides)
    assert config.engine.weight_transfer == "adapter"
    with RunFolder.create(config) as folder:
        algo = build_algorithm(config, gateway)
        try:
            seen: list[dict[str, float]] = []

            def on_step(step: int, metrics: object) -> None:
                seen.append(dict(metrics))  # type: ignore[call-overload]
                if step == 1:
                    os.kill(runner_pids()[0], signal.SIGKILL)

            assert train(algo, folder, num_steps=2, on_step=on_step)
            assert_nothing_lost(algo)
            assert algo.runners.num_restarts == 1
            assert all(metrics["sync/logprob_diff_max"] <= 1e-4 for metrics in seen)
        finally:
            algo.stop()
    checkpoint = latest_checkpoint(Path(config.run_dir))
    assert checkpoint is not None
    resumed = build_algorithm(config, gateway)
    try:
        resumed.restore_from_path(str(checkpoint))
        resumed.runners.wait_ready()
        assert (resumed.policy_version, resumed.runners.policy_version) == (2, 2)
        assert resumed.runners.gate is not None
        assert resumed.runners.gate.metrics["sync/logprob_diff_max"] <= 1e-4
        result = evaluate_engines("after", resumed, config, load_tasks(config.eval.data))
        assert (result.num_problems, result.num_failed) == (16, 0)
    finally:
        resumed.stop()


def test_a_policy_that_is_not_finite_is_no_checkpoint(gateway: GatewayAccess, tmp_path: Path) -> None:
    """One step at an absurd learning rate: the gradient was finite, and what came of it is no policy."""
    config = tiny(tmp_path, "learner.lr=1e30", "grpo.checkpoint_every=1")
    with RunFolder.create(config) as folder:
        algo = build_algorithm(config, gateway)
        try:
            with pytest.raises(GateError, match=r"weights of policy version 1 .* training has broken the policy"):
                train(algo, folder, num_steps=2, on_step=lambda step, metrics: None)
        finally:
            algo.stop()
    assert latest_checkpoint(Path(config.run_dir)) is None


def test_steps_that_are_not_finite_hand_their_prompts_back_and_end_the_run_by_name(
    gateway: GatewayAccess, tmp_path: Path
) -> None:
    """At such a penalty the squares of the gradient overflow in its norm as soon as the policy has left its reference."""
    config = tiny(
        tmp_path,
        "loss.kl_estimator=k1",
        "loss.kl_coef=1e30",
        "grpo.checkpoint_every=1",
    )
    with RunFolder.create(config) as folder:
        algo = build_algorithm(config, gateway)
        try:
            with pytest.raises(NotFinite, match=r"3 training steps in a row .* nonfinite_gradient"):
                train(algo, folder, num_steps=4, on_step=lambda step, metrics: None)
            assert algo.policy_version <= 1
            assert_nothing_lost(algo)
            back = algo.ledger.hand_back_reasons + algo.ledger.drop_reasons
            assert back["nonfinite_gradient"] == 3 * config.grpo.groups_per_step
        finally:
            algo.stop()
    assert folder.last_step == (algo.policy_version or None)


class OnceLost(Interrupt):
    """A person who presses Ctrl-C as soon as a group was lost."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
        self.algo: GRPO | None = None

    def __getattribute__(self, name: str) -> object:
        algo: GRPO | None = object.__getattribute__(self, "__dict__").get("algo")
        if name != "requested" or algo is None:
            return object.__getattribute__(self, name)
        lost = algo.ledger.drop_reasons + algo.ledger.hand_back_reasons
        return lost[object.__getattribute__(self, "reason")] > 0


def test_without_variance_no_step_is_waited_for_and_none_is_called_complete(
    gateway: GatewayAccess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C stops at once, with a checkpoint; left alone, the run ends by name: as failed without a step, else as done."""
    config = tiny(
        tmp_path,
        "reward.outcome_weight=0.5",
        "reward.wrong_but_well_formed=0.5",
        "reward.bad_format_math=0.5",
        "grpo.groups_per_step=2",
    )
    with RunFolder.create(config) as folder:
        algo = build_algorithm(config, gateway)
        try:
            pressed = OnceLost("no_variance")
            pressed.algo = algo
            assert not train(algo, folder, num_steps=3, on_step=lambda step, metrics: None, interrupt=pressed)
            assert_nothing_lost(algo)
            assert 0 < algo.ledger.drop_reasons["no_variance"] < 38
            assert latest_checkpoint(Path(config.run_dir)) == Path(config.run_dir) / "checkpoints/step-000000"

            broken = algo.ledger.lease()
            trajectory = Trajectory(
                task_id=broken.task.id, index=0, prompt_ids=np.ones(1, np.int32), response_ids=np.ones(1, np.int32),
                loss_mask=np.ones(1, np.bool_), logprobs=np.full(1, np.nan, np.float32), segments=(), turns=(), text="x",
                finish_reason="eos",
            )  # fmt: skip
            group = Group(lease_id=broken.lease_id, task=broken.task, trajectories=(trajectory,))
            algo._take(Finished(Work.ROLLOUT, broken.lease_id, group))
            assert algo.ledger.hand_back_reasons["nonfinite_logprobs"] == 1
            assert "1 of 1 sampled tokens have a logprob that is no finite number" in caplog.text

            with pytest.raises(NothingToLearn, match="nothing left to learn from: the rewards of the last"):
                train(algo, folder, num_steps=3, on_step=lambda step, metrics: None)
            assert algo.policy_version == 0
            assert_nothing_lost(algo)
            assert algo.ledger.drop_reasons["no_variance"] >= 38  # a step's worth may still wait for the others
            algo.policy_version = 1  # as after a step
            assert train(algo, folder, num_steps=3, on_step=lambda step, metrics: None)
            assert folder.last_step == 1
        finally:
            algo.stop()
    assert "GRPO ends after step 1 of 3: nothing left to learn from" in caplog.text


def test_episodes_that_all_fail_end_the_run_with_the_first_reason(
    gateway: GatewayAccess, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts that are all too long, which preflight would have refused; and Ctrl-C while they are."""
    config = tiny(tmp_path, "episode.max_prompt_tokens=4", "grpo.groups_per_step=2")
    with RunFolder.create(config) as folder:
        algo = build_algorithm(config, gateway)
        try:
            pressed = OnceLost("episode_error")
            pressed.algo = algo
            assert not train(algo, folder, num_steps=3, on_step=lambda step, metrics: None, interrupt=pressed)
            assert folder.last_step == 0
            message = (
                r"^GRPO: the last \d+ groups have all failed, \d+ by episode_error\. The first by episode_error: task .*: "
                r"ValueError: the prompt has \d+ tokens, more than max_prompt_tokens = 4\. .* episode\.max_prompt_tokens$"
            )
            with pytest.raises(GroupsFail, match=message):
                train(algo, folder, num_steps=3, on_step=lambda step, metrics: None)
            assert_nothing_lost(algo)
            assert "learners: wait" in algo.inspection.waiting()
            assert "handed back since the last step (episode_error)" in algo.inspection.waiting()
        finally:
            algo.stop()
    assert caplog.text.count("GRPO: a group failed (episode_error)") == 1


@pytest.mark.skipif(not GSM8K.is_file(), reason="../shared/data/gsm8k_train.jsonl is not there")
def test_real_questions_go_through_the_whole_loop(gateway: GatewayAccess, tmp_path: Path) -> None:
    """The tiny model solves none of them; nothing may break, and every one is accounted for. On-policy, from_checkpoint."""
    config = tiny(
        tmp_path,
        f'data.source="{GSM8K}"',
        "data.limit=8",
        "episode.max_prompt_tokens=400",
        "episode.max_response_tokens=112",
        "grpo.max_staleness=0",
        "reward.wrong_but_well_formed=0.5",  # something to tell siblings apart by
    )
    algo = build_algorithm(config, gateway)
    try:
        for _ in range(2):
            metrics = algo.train()["grpo"]
            assert metrics["staleness_max"] == 0
        assert_nothing_lost(algo)
        path = algo.save_to_path(os.path.relpath(tmp_path / "checkpoint"))  # RLlib alone refuses a relative path
    finally:
        algo.stop()
    again = GRPO.from_checkpoint(path)
    try:
        assert again.policy_version == 2
        assert_nothing_lost(again)
    finally:
        again.stop()
