"""Two ranks on two Ray nodes that share no folder: checkpoints and models by way of a real S3 API."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from object_store import Proxy, environment, objects, proxied, set_environment
from ray.cluster_utils import Cluster

from learners.batching import Sample
from learners.config import LearnerConfig
from learners.errors import LearnerFailed
from learners.group import LearnerGroup
from storage.objects import Storage, fetch

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
BUCKET = "runs"


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with proxied(BUCKET) as made:
        yield made


@pytest.fixture(scope="module")
def nodes(proxy: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """The nodes' own disks."""
    disks = [tmp_path_factory.mktemp(f"node{i}") for i in range(2)]
    cluster = Cluster()
    try:
        for disk in disks:
            cluster.add_node(num_cpus=2, env_vars=environment(proxy.address, disk))
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield disks
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def storage(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    set_environment(environment(proxy.address, tmp_path / "driver"), monkeypatch.setenv)
    return Storage(f"s3://{BUCKET}/{tmp_path.name}", retry_s=3.0)


def config(model: str, **settings: object) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {
            "model": model,
            "lr": 1e-2,
            "micro_batch_tokens": 150,
            "start_timeout_s": 120,
            "step_timeout_s": 60,
            "zero_stage": 2,
            "placement_strategy": "STRICT_SPREAD",
            **settings,
        }
    )


def payload(group: LearnerGroup) -> dict[str, np.ndarray]:
    update = ray.get(group.publish().update, timeout=60)
    return {name: np.array(array) for name, (array, _) in update.payload.items()}


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_ranks_share_nothing_but_the_storage(
    nodes: list[Path], storage: Storage, proxy: Proxy, tiny_model: Path, samples: list[Sample]
) -> None:
    base, model, saved = storage.at("base"), storage.at("model"), storage.at("checkpoint")
    base.upload(tiny_model, [path.name for path in tiny_model.iterdir()])
    group = LearnerGroup(config(base.uri, num_learners=2))
    try:
        group.start()
        group.start_step(samples).result()
        trained = payload(group)
        group.save_to_path(saved)
        group.export_hf(model)
        names = objects(proxy.address, BUCKET, saved.uri.removeprefix(f"s3://{BUCKET}/"))
        shards = {match[1] for name in names if (match := re.search(r"zero_pp_rank_(\d)_.*optim_states", name))}
        assert shards == {"0", "1"}
        assert "learner.json" in names
        group.start_step(samples).result()
        group.restore_from_path(saved)  # on the nodes that wrote it
        assert group.policy_version == 1
        assert_equal(payload(group), trained)
        for disk in nodes:  # each fetched the base, and kept nothing of the checkpoint
            held = [path.relative_to(disk).as_posix() for path in disk.rglob("*") if path.is_file()]
            assert any("base/model.safetensors" in name for name in held)
            assert not [name for name in held if re.search(r"checkpoint/|scratch", name)]

        proxy.refuses = lambda method, path, key: method != "GET" and "zero_pp_rank_1" in path
        with pytest.raises(LearnerFailed, match=r"save: rank \d raised StorageError: .*credentials have expired"):
            group.save_to_path(storage.at("never"))
        assert "learner.json" not in storage.at("never").entries()
    finally:
        proxy.refuses = lambda method, path, key: False
        group.shutdown()

    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(fetch(model.uri)).state_dict()
    assert_equal({name: exported[name].numpy() for name in trained}, trained)

    three = LearnerGroup(config(base.uri, num_learners=3, placement_strategy="SPREAD"))  # another number: converted
    try:
        three.start()
        three.restore_from_path(saved)
        assert three.policy_version == 1
        assert_equal(payload(three), trained)
    finally:
        three.shutdown()
