"""The tiny default configuration of examples/, small enough for a test."""

from pathlib import Path

from autotraj.config.run import RunConfig, load

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny/grpo.toml"


def tiny(tmp_path: Path, *overrides: str) -> RunConfig:
    """The tiny default, small enough for a test."""
    return load(
        TINY,
        [
            f'model="{ROOT / "examples/tiny/base"}"',
            f'run_dir="{tmp_path / "run"}"',
            "eval.data.limit=16",
            "data.limit=200",
            "grpo.groups_per_step=4",
            "rollout.group_size=4",
            "grpo.num_steps=3",
            *overrides,
        ],
    )
