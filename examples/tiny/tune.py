"""Trials of Ray Tune, a learning rate each: `python -m examples.tiny.tune`. With room for one, they take turns."""

from pathlib import Path

from ray import tune

from autotraj.config.run import load
from autotraj.launch import run_session
from autotraj.loop.grpo import GRPO, GRPOConfig


def main() -> None:
    config = load(
        "examples/tiny/grpo.toml", ["run_dir=runs/tiny-tune", "grpo.num_steps=5"]
    )  # each trial's folder is below it
    with run_session(config) as gateway:  # the sandbox, for all trials, and Ray
        settings = GRPOConfig().run(config, sandbox_address=gateway.address, sandbox_token=gateway.token)
        results = tune.Tuner(
            GRPO,
            param_space=settings.vary({"learner.lr": tune.grid_search([1e-4, 1e-3])}),
            tune_config=tune.TuneConfig(metric="grpo/reward_mean", mode="max"),
            run_config=tune.RunConfig(
                name="tiny",
                storage_path=str(Path("runs/tiny-tune/tune").absolute()),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=True),
            ),
        ).fit()
    best = results.get_best_result()
    print(f"learner.lr = {best.config['run_config'].learner.lr:g}: reward {best.metrics['grpo']['reward_mean']:.2f}")
    print(f"go on from it with GRPO.from_checkpoint({best.checkpoint.path!r})")


if __name__ == "__main__":
    main()
