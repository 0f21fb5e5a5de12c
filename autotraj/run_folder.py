"""A run's folder: the resolved configuration, metrics, trajectories and checkpoints, in one place.

config.toml          what ran, every default spelled out
metrics.jsonl        one line a step
tensorboard/         the same for TensorBoard
trajectories.log     every scored group (`trajectory.store`)
checkpoints/step-N   complete or absent: written beside and renamed
policy/              the trained model, Hugging Face format
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tensorboardX import SummaryWriter

from autotraj.config import RunConfig, load, to_toml
from autotraj.errors import UserError


class RunFolder:
    """Owns the files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metrics = (path / "metrics.jsonl").open("a", buffering=1)
        self._board = SummaryWriter(str(path / "tensorboard"))

    @classmethod
    def create(cls, config: RunConfig) -> RunFolder:
        """A new run; refuses a folder that already holds checkpoints."""
        path = Path(config.run_dir)
        if latest_checkpoint(path):
            raise UserError(
                f"run_dir: {path} already holds checkpoints; continue it with --resume {path}, or choose another run_dir"
            )
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.toml").write_text(to_toml(config))
        return cls(path)

    @classmethod
    def resume(cls, path: Path) -> tuple[RunFolder, RunConfig, Path]:
        """An earlier run, its configuration and its newest checkpoint."""
        checkpoint = latest_checkpoint(path)
        if checkpoint is None or not (path / "config.toml").is_file():
            raise UserError(f"--resume {path}: no run with a checkpoint there; start one with --config")
        drop_metrics_after(path, checkpoint_step(checkpoint))
        return cls(path), load(path / "config.toml"), checkpoint

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()

    @classmethod
    def stage(cls, path: Path) -> tuple[RunFolder, Path | None]:
        """One stage's folder within a run, and its newest checkpoint if it was interrupted."""
        path.mkdir(parents=True, exist_ok=True)
        checkpoint = latest_checkpoint(path)
        drop_metrics_after(path, checkpoint_step(checkpoint) if checkpoint else 0)
        return cls(path), checkpoint

    @property
    def trajectory_log(self) -> str:
        return str((self.path / "trajectories.log").resolve())

    def write_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics.write(json.dumps({"time": time.time(), "step": step, **metrics}) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def write_json(self, name: str, content: Any) -> None:
        """Writes the file whole, or leaves it as it was."""
        partial = self.path / f".{name}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(self.path / name)

    def checkpoint(self, step: int, save: Callable[[str], Any], *, keep: int) -> Path:
        """Lets `save(path)` fill a folder beside the final one, renames it, and prunes all but the newest `keep`."""
        checkpoints = self.path / "checkpoints"
        target, partial = checkpoints / f"step-{step:06d}", checkpoints / f".step-{step:06d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save(str(partial.resolve()))
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for old in sorted(checkpoints.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
        return target


def checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def drop_metrics_after(path: Path, step: int) -> None:
    """Forgets the metrics of steps that will be taken again."""
    metrics = path / "metrics.jsonl"
    if metrics.is_file():
        kept = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= step]
        metrics.write_text("".join(f"{line}\n" for line in kept))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint below `run_dir`."""
    return max((run_dir / "checkpoints").glob("step-*"), default=None)
