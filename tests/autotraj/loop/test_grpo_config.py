"""What of RLlib's own configuration `GRPOConfig` refuses, because nothing would read it, and what a Tune trial is given."""

import pickle
import re
from pathlib import Path
from typing import Any, Self

import pytest
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from tiny_run import tiny

from autotraj.config.run import ConfigError, RunConfig
from autotraj.loop.grpo import GRPO, GRPOConfig
from autotraj.loop.rllib_setters import CALLBACKS, INSTEAD, refuses_setters, setters
from tool_sandbox.config import TlsFiles
from trajectory.paths import with_absolute_paths


def settings(config: RunConfig, **access: Any) -> GRPOConfig:
    return GRPOConfig().run(config, sandbox_address="127.0.0.1:1", sandbox_token="a secret", **access)


def test_settings_of_rllib_that_nothing_reads_are_refused_with_ours() -> None:
    config = GRPOConfig()
    with pytest.raises(ValueError, match=r"training\(lr\) would be ignored: .* sections learner, loss and grpo"):
        config.training(lr=123)
    with pytest.raises(ValueError, match=r"environment\(env\) would be ignored: .* sections data and episode"):
        config.environment("CartPole-v1")
    with pytest.raises(ValueError, match=r"environment\(env\) would be ignored"):
        config.build_algo(env="CartPole-v1")


@pytest.mark.parametrize("name", sorted({*setters(), *INSTEAD} - {"callbacks"}))
def test_each_of_rllibs_setters_is_refused_with_what_to_set_instead(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"GRPOConfig.{name}(anything) would be ignored: {INSTEAD[name]}")):
        getattr(GRPOConfig(), name)(anything=1)


def test_a_setter_that_a_newer_ray_brings_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def curiosity(self: Any, *, weight: float = 0.0) -> Self:
        return self  # type: ignore[no-any-return]

    monkeypatch.setattr(AlgorithmConfig, "curiosity", curiosity, raising=False)
    newer = refuses_setters(but={"callbacks"})(type("Newer", (GRPOConfig,), {}))
    with pytest.raises(ValueError, match=r"curiosity\(weight\) would be ignored: only what the RunConfig"):
        newer().curiosity(weight=0.5)


def test_of_the_callbacks_those_are_taken_that_are_called() -> None:
    config = GRPOConfig()
    with pytest.raises(
        ValueError, match=r"callbacks\(callbacks_class, on_episode_end\) would be ignored: GRPO calls on_alg"
    ):
        config.callbacks(object, on_episode_end=print, on_train_result=print)
    assert config.callbacks_on_train_result is None
    for name in CALLBACKS:
        assert getattr(config.callbacks(**{name: print}), f"callbacks_{name}") is print


def test_a_config_without_a_run_says_what_to_call() -> None:
    for without in (GRPOConfig().build_algo, GRPOConfig().to_dict, lambda: GRPOConfig().vary({"seed": 1})):
        with pytest.raises(ValueError, match=r"no run to build from: call run\(run_config"):
            without()


def test_a_trial_has_its_changes_and_reads_paths_from_where_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = (
        'data.source="tasks.jsonl"',
        'reward_model.path="rm"',
        "sandbox.search.kind=bm25",
        "sandbox.search.index=i",
    )
    config = tiny(tmp_path, 'model="base"', 'run_dir="runs"', "rollout.num_cpus=2", *tasks)
    tls = TlsFiles(cert="a.pem", key="/b.pem", ca="c.pem")
    asked = settings(config, sandbox_tls=tls, trajectory_log="log").callbacks(on_train_result=print)
    given = pickle.loads(pickle.dumps(asked.vary({"learner.lr": 0.5, "rollout.num_actors": 3}).to_dict()))
    monkeypatch.chdir("/")
    trial = GRPOConfig().update_from_dict(given)
    run, access = trial.run_config, trial.rollout_settings
    assert (run.learner.lr, trial.num_env_runners, trial.callbacks_on_train_result) == (0.5, 3, print)
    assert run.model == run.learner.model == run.engine.model == access.engine.model == str(tmp_path / "base")
    assert (run.run_dir, run.data.source) == (str(tmp_path / "runs"), str(tmp_path / "tasks.jsonl"))
    assert (run.reward_model.path, run.sandbox.search.index) == (str(tmp_path / "rm"), str(tmp_path / "i"))
    assert (run.eval.data.source, run.sandbox.search.corpus) == ("word-problems", "")
    assert access.sandbox_tls == TlsFiles(cert=str(tmp_path / "a.pem"), key="/b.pem", ca=str(tmp_path / "c.pem"))
    assert trial.trajectory_log == str(tmp_path / "log")
    assert "a secret" not in repr(given)
    one = trial.for_trial("trial_1")
    assert (one.run_config.folder, one.trajectory_log) == (
        tmp_path / "runs/trial_1",
        str(tmp_path / "runs/trial_1/log"),
    )
    # The policy's learner, one for the reward model isn't asked for without online repair; engines; the reward model.
    bundles = GRPO.default_resource_request(given).bundles
    assert bundles == [{"CPU": 1.0}, *[{"CPU": 2.0}] * 3, {"CPU": 1.0}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"lr": 0.1}, r"'lr': not read by GRPO.* given to GRPOConfig\.vary"),
        ({"env": "CartPole-v1"}, r"'env': not read by GRPO"),
        ({"changes": {"learner.lrr": 1}}, r"learner\.lrr: unknown key; did you mean 'learner\.lr'"),
        ({"changes": {"lerner.lr": 1}}, r"lerner: unknown key; did you mean 'learner'"),
        ({"changes": {"model.lr": 1}}, r"the change of 'model\.lr': model is a value, not a section"),
        ({"changes": {"learner.lr": -1.0}}, r"learner\.lr: Input should be greater than 0"),
        ({"changes": {"learner.model": "x"}}, r"learner\.model: set `model` instead"),
    ],
)
def test_what_a_trial_can_not_be_given_is_refused_before_it_starts(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, ConfigError), match=message):
        GRPO.default_resource_request(settings(tiny(tmp_path)).to_dict() | more)


def test_a_key_that_does_not_exist_can_not_vary(tmp_path: Path) -> None:
    config = settings(tiny(tmp_path))
    for key, message in {
        "learner.lrr": r"learner\.lrr: unknown key; did you mean 'learner\.lr'",
        "lerner.lr": r"lerner: unknown key; did you mean 'learner'",
        "lr": r"lr: unknown key",
    }.items():
        with pytest.raises(ConfigError, match=message):
            config.vary({key: 1})
    assert config.vary({"quality.weights.confidence": 1.0, "seed": 1}).vary({"seed": 2}).changes == {
        "quality.weights.confidence": 1.0,
        "seed": 2,
    }


def test_uris_names_and_hub_data_sets_are_no_paths(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    config = tiny(
        tmp_path, 'run_dir="s3://bucket/runs"', "data.source=hf:openai/gsm8k:main", "eval.data.source=hf:files"
    )
    found = with_absolute_paths(config, tmp_path)
    assert (found.run_dir, found.data.source) == ("s3://bucket/runs", "hf:openai/gsm8k:main")
    assert found.eval.data.source == f"hf:{tmp_path / 'files'}"


def test_rllib_may_set_what_it_wants_on_what_an_algorithm_was_built_from(tmp_path: Path) -> None:
    config = settings(tiny(tmp_path))
    with pytest.raises(ValueError, match=r"framework\(tf_session_args\) would be ignored"):
        config.framework(tf_session_args={})
    config.freeze()
    config.freeze()
    assert config.copy(copy_frozen=False).framework(tf_session_args={"a": 1}).tf_session_args == {"a": 1}
