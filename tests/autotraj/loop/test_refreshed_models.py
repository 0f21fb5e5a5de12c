"""A checkpoint's reward model is there as long as the checkpoint: at every step, locally and at a URI."""

from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
from object_store import Proxy, environment, proxied, set_environment
from tiny_run import ROOT, tiny

from autotraj.config.run import RunConfig
from autotraj.errors import UserError
from autotraj.loop.refreshed_models import RefreshedModels, require_reward_model
from autotraj.loop.saved_loop import STATE_FILE
from autotraj.run_folder.folder import RunFolder, files_of_checkpoints, newest
from learners.checkpoint_format import META_FILE
from storage.locations import is_uri
from storage.objects import Storage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied("runs") as made:
        yield made


class Run:
    """What the loop does with its models and checkpoints, without engines and learners."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder, self.models = config, RunFolder.create(config), RefreshedModels(config)
        self.serving = 1

    def refresh(self) -> None:
        """Exported and served, in a thread; then taken note of, in the loop's."""
        version = self.serving + 1
        place = self.models.place(version)
        if isinstance(place, Storage):
            place.write("config.json", b"{}")
            place.write("model.safetensors", b"weights")
        else:
            place.mkdir(parents=True, exist_ok=True)
            (place / "config.json").write_text("{}")
            (place / "model.safetensors").write_text("weights")
        self.serving = version

    def prune(self) -> None:
        self.models.prune(serving=self.serving)

    def save(self, driver: Path, learners: Path | Storage) -> None:
        scorer = {"version": self.serving, "path": self.models.location(self.serving)}
        (driver / STATE_FILE).write_bytes(msgpack.packb({"scorer": scorer}))
        if isinstance(learners, Path):
            learners.mkdir()
            (learners / META_FILE).write_text("{}")

    def checkpoint(self, step: int) -> None:
        self.folder.checkpoint(step, self.save, keep=self.config.grpo.keep_checkpoints)

    def named(self) -> list[int]:
        return [
            msgpack.unpackb(data)["scorer"]["version"]
            for data in files_of_checkpoints(self.folder.location, STATE_FILE)
        ]

    def on_disk(self) -> set[str]:
        location = self.folder.location
        if location.storage:
            return {name.partition("/")[0] for name in location.storage.at("online_repair").entries() if "/" in name}
        return {path.name for path in (location.path / "online_repair").glob("reward-model-*")}


def config_of(tmp_path: Path, run_dir: str, *overrides: str) -> RunConfig:
    return tiny(
        tmp_path,
        f"run_dir={run_dir}",
        f'reward_model.path="{ROOT / "examples/tiny/base"}"',
        "online_repair.enabled=true",
        "grpo.checkpoint_every=50",
        "grpo.keep_checkpoints=2",
        *overrides,
    )


@pytest.mark.parametrize(
    ("run_dir", "takes"), [("run", 0), ("run", 7), ("run", 13), ("s3://runs/kept", 7)], ids=["0", "7", "13", "s3"]
)
def test_every_kept_checkpoint_resolves_at_every_step_at_the_defaults(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_dir: str, takes: int
) -> None:
    """A refresh begins every 20 steps and takes some; a checkpoint every 50, two are kept."""
    if is_uri(run_dir):
        proxy: Proxy = request.getfixturevalue("proxy")
        set_environment(environment(proxy.address, tmp_path / "one"), monkeypatch.setenv)
    run = Run(config_of(tmp_path, run_dir if is_uri(run_dir) else str(tmp_path / run_dir)))
    assert run.config.online_repair.refresh_every == 20
    for step in range(1, 311):
        refreshed = step % 20 == takes % 20 and step > takes
        if refreshed:
            run.refresh()
            run.prune()
        if step % run.config.grpo.checkpoint_every == 0:
            run.checkpoint(step)
        elif not refreshed:
            continue
        for version in run.named():
            run.models.find(version)
        # Those of two checkpoints, the one served, and those of checkpoints that went since the last refresh.
        assert len(run.on_disk()) <= 4
    found = newest(run.folder.location)
    assert found is not None
    require_reward_model(run.config, found)
    assert run.serving >= 15


def test_a_checkpoint_that_begins_while_a_refresh_ends_keeps_its_model(tmp_path: Path) -> None:
    """The service gets the next model while the checkpoint, which names the one before, is on its way."""
    run = Run(config_of(tmp_path, str(tmp_path / "run")))
    run.refresh()

    def save(driver: Path, learners: Path | Storage) -> None:
        run.save(driver, learners)
        run.refresh()

    run.folder.checkpoint(50, save, keep=2)
    run.prune()
    assert run.named() == [2]
    assert run.on_disk() == {"reward-model-000002", "reward-model-000003"}


def test_models_of_undone_steps_go_and_what_others_put_there_stays(tmp_path: Path) -> None:
    run = Run(config_of(tmp_path, str(tmp_path / "run")))
    for _ in range(4):
        run.refresh()
    (run.folder.path / "online_repair/reward-model-mine").mkdir()
    run.serving = 2  # set back
    run.prune()
    assert run.on_disk() == {"reward-model-000002", "reward-model-mine"}


def test_a_moved_run_folder_finds_its_models(tmp_path: Path) -> None:
    run = Run(config_of(tmp_path, str(tmp_path / "run")))
    run.refresh()
    run.checkpoint(50)
    (tmp_path / "run").rename(tmp_path / "moved")
    folder, config, checkpoint = RunFolder.resume(str(tmp_path / "moved"))
    with folder:
        require_reward_model(config, checkpoint)


def test_a_checkpoint_whose_model_is_gone_says_so(tmp_path: Path) -> None:
    """As run folders of earlier versions are."""
    run = Run(config_of(tmp_path, str(tmp_path / "run")))
    for _ in range(8):
        run.refresh()
    run.checkpoint(50)
    run.refresh()
    run.models.prune(serving=10, pinned=[1])
    for path in (run.folder.path / "online_repair/reward-model-000009").iterdir():
        path.unlink()
    (run.folder.path / "online_repair/reward-model-000009").rmdir()
    folder, config, checkpoint = RunFolder.resume(str(tmp_path / "run"))
    with folder, pytest.raises(UserError) as caught:
        require_reward_model(config, checkpoint)
    assert str(caught.value) == (
        f"the newest checkpoint of {tmp_path}/run was scored by version 9 of the reward model, and "
        f"{tmp_path}/run/online_repair/reward-model-000009 isn't there: put it back, or remove that checkpoint from "
        f"{tmp_path}/run/checkpoints to go on from the one before it"
    )
