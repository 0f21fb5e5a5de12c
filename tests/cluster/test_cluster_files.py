"""The cluster files against what reads them: Ray's own validation, KubeRay's schemas, and what our recipes ask for."""

import json
import os
import re
import stat
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray._private.ray_constants import DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES, DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

from autotraj.config.run import load
from autotraj.planning import preflight
from cluster.roles import kuberay_types, ray_up_types, read_node_types, unmet

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
CLOUDS = ["aws.yaml", "gcp.yaml"]
KUBERAY = ["kuberay-cluster.yaml", "kuberay-job.yaml"]
RECIPES = sorted((ROOT / "examples").glob("qwen*/run.toml"))
TINY = sorted(path for folder in ("tiny", "own") for path in (ROOT / "examples" / folder).glob("*.toml"))


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_every_file_is_covered() -> None:
    assert {p.name for p in CLUSTER.glob("*.yaml")} == {*CLOUDS, *KUBERAY, "onprem.yaml", "fake.yaml"}


@pytest.mark.parametrize("name", [*CLOUDS, "onprem.yaml"])
def test_ray_up_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(read(name)))


def test_ray_accepts_the_fake_file_as_it_is() -> None:
    """`ray start --autoscaling-config` fills in no defaults."""
    validate_config(read("fake.yaml"))


@pytest.mark.parametrize("name", [*CLOUDS, *KUBERAY, "onprem.yaml", "fake.yaml"])
def test_the_head_comment_says_what_it_costs_to_think_about(name: str) -> None:
    comment = "\n".join(line for line in (CLUSTER / name).read_text().splitlines() if line.startswith("#"))
    for word in ("Disk", "Ports", "Token", "Results", *(() if name == "fake.yaml" else ("Fill in",))):
        assert f"# {word} " in comment, word


# --- KubeRay


def strict(schema: Any) -> Any:
    """With unknown fields refused, as `kubectl apply` does."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        open_ = schema.get("x-kubernetes-preserve-unknown-fields", False)
        schema.setdefault("additionalProperties", open_)
    return schema


def crd(kind: str) -> dict[str, Any]:
    data = json.loads((ROOT / "tests/cluster/kuberay_crds.json").read_text())
    schema: dict[str, Any] = strict(
        {"$defs": data["$defs"], **data[{"RayCluster": "rayclusters", "RayJob": "rayjobs"}[kind]]}
    )
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_s_schema_accepts_the_file(name: str) -> None:
    manifest = read(name)
    jsonschema.validate(manifest, crd(manifest["kind"]))


def test_kuberay_s_schema_refuses_a_misspelt_field() -> None:
    manifest = read("kuberay-cluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(jsonschema.ValidationError, match="volumeMount"):
        jsonschema.validate(manifest, crd("RayCluster"))
    manifest = read("kuberay-cluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"] = "1"
    with pytest.raises(jsonschema.ValidationError, match="is not of type"):
        jsonschema.validate(manifest, crd("RayCluster"))


def test_both_kuberay_files_describe_one_cluster() -> None:
    assert read("kuberay-job.yaml")["spec"]["rayClusterSpec"] == read("kuberay-cluster.yaml")["spec"]


def test_the_kuberay_job_runs_a_command_of_ours() -> None:
    from autotraj.cli.parser import parser

    words = read("kuberay-job.yaml")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "autotraj"]
    args = parser().parse_args(words[3:])
    assert load(ROOT / args.config, args.overrides).place_by_role


def test_we_read_a_ray_cluster_as_ray_s_autoscaler_does() -> None:
    manifest = read("kuberay-cluster.yaml")
    manifest["metadata"]["namespace"] = "default"
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    validate_config(config)
    theirs = {
        name: {k: v for k, v in t["resources"].items() if k != "memory"}
        for name, t in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    ours = {t.name: t.resources for t in kuberay_types(manifest["spec"]) if t.name != "head"}
    assert ours == theirs


# --- what is asked for is offered


@pytest.mark.parametrize("name", [*CLOUDS, *KUBERAY])
@pytest.mark.parametrize("recipe", [*RECIPES, *TINY], ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_recipe_finds_its_nodes(name: str, recipe: Path) -> None:
    config = load(recipe, ["place_by_role=true"])
    assert unmet(preflight.asks(config), read_node_types(CLUSTER / name)) == []


@pytest.mark.parametrize("recipe", TINY, ids=lambda p: p.stem)
def test_the_tiny_recipes_find_their_nodes_on_the_fake_cluster(recipe: Path) -> None:
    config = load(recipe, ["place_by_role=true"])
    assert unmet(preflight.asks(config), read_node_types(CLUSTER / "fake.yaml")) == []


def test_the_recipes_cover_every_example() -> None:
    with_model = [p for p in (ROOT / "examples").rglob("*.toml") if "model" in tomllib.loads(p.read_text())]
    assert set(with_model) == {*RECIPES, *TINY}


@pytest.mark.parametrize("name", [*CLOUDS, "fake.yaml"])
def test_the_head_takes_no_actors_and_others_have_one_role(name: str) -> None:
    config = read(name)
    for node_type in ray_up_types(config):
        roles = {r for r in node_type.resources if r not in ("CPU", "GPU")}
        assert roles == (set() if node_type.name == config["head_node_type"] else {node_type.name})
    assert read_node_types(CLUSTER / name)[0].resources["CPU"] == 0


# --- the commands in the files


def test_an_on_premise_worker_starts_with_the_role_in_its_file(tmp_path: Path) -> None:
    """The quotes of the real command, run by a real shell."""
    ray = tmp_path / "autotraj/.venv/bin/ray"
    ray.parent.mkdir(parents=True)
    ray.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ray.chmod(ray.stat().st_mode | stat.S_IXUSR)
    (tmp_path / ".autotraj-role").write_text("sandbox\n")
    command = read("onprem.yaml")["worker_start_ray_commands"][1].replace("ulimit -n 65536;", "")
    env = {**os.environ, "HOME": str(tmp_path), "RAY_HEAD_IP": "10.0.0.1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=True)
    words = done.stdout.splitlines()
    assert "--address=10.0.0.1:6379" in words
    (resources,) = [w.removeprefix("--resources=") for w in words if w.startswith("--resources=")]
    assert json.loads(resources) == {"sandbox": 1}


def test_an_on_premise_worker_without_a_role_is_refused(tmp_path: Path) -> None:
    (command,) = read("onprem.yaml")["worker_setup_commands"]
    env = {**os.environ, "HOME": str(tmp_path)}
    (tmp_path / ".autotraj-role").write_text("gpu\n")
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "must be learner, rollout or sandbox" in done.stdout


@pytest.mark.parametrize("name", [*CLOUDS, "onprem.yaml"])
def test_no_node_starts_without_the_token_and_no_dashboard_listens_outside(name: str) -> None:
    config = read(name)
    start = [c for c in config["head_start_ray_commands"] + config["worker_start_ray_commands"] if "ray start" in c]
    assert len(start) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in start)
    assert "--dashboard-host=127.0.0.1" in start[0]
    assert any(target.endswith(".ray/auth_token") for target in config["file_mounts"])


def test_the_node_image_copies_only_what_its_context_has() -> None:
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    copied = {f for line in re.findall(r"^COPY ((?!--).+)$", dockerfile, re.M) for f in line.split()[:-1]}
    allowed = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert copied == allowed
    assert all((ROOT / name).is_file() for name in copied)


# --- what GPUs and shared memory need


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_boots_an_image_with_a_driver_for_cuda_13(name: str) -> None:
    """Ray's own default for AWS is of Ubuntu 18.04, with too old a driver. A family's name at Google ends in its driver."""
    config = read(name)
    for node_type in config["available_node_types"].values():
        node = node_type["node_config"]
        if name == "aws.yaml":
            parameter = "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
            assert node["ImageId"] == f"resolve:ssm:{parameter}"
        else:
            (disk,) = node["disks"]
            driver = re.fullmatch(r"projects/deeplearning-platform-release/.+-nvidia-(\d+)", _image(disk))
            assert driver is not None
            assert int(driver[1]) >= 580
            asked = {"key": "install-nvidia-driver", "value": "True"} in node.get("metadata", {}).get("items", [])
            assert asked == ("GPU" in node_type["resources"])


def _image(disk: dict[str, Any]) -> str:
    return str(disk["initializeParams"]["sourceImage"])


def test_the_node_image_asks_nvidia_s_runtime_for_all_gpus() -> None:
    """Ray starts the container with --runtime=nvidia, which does nothing for an image without these."""
    dockerfile = (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ")
    env = dict(word.split("=", 1) for line in re.findall(r"^ENV (.+)$", dockerfile, re.M) for word in line.split())
    assert env["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"


@pytest.mark.parametrize("name", CLOUDS)
def test_only_gpu_nodes_run_the_large_image(name: str) -> None:
    config = AutoscalingConfig(prepare_config(read(name)))
    for node_type in ray_up_types(read(name)):
        image = config.get_docker_config(node_type.name)["image"]
        assert image.endswith(":cuda" if "GPU" in node_type.resources else ":cpu"), node_type.name


GIB = 1 << 30
MEMORY_GIB = {  # of the clouds' machine types, as they publish it
    "m7i.2xlarge": 32, "p4de.24xlarge": 1152, "g6e.12xlarge": 384, "c7i.4xlarge": 32,
    "n2-standard-8": 32, "a2-ultragpu-8g": 1360, "a2-highgpu-4g": 340, "n2-standard-16": 64,
}  # fmt: skip
WEIGHTS_GIB = {1: 16.4e9 / GIB, 4: 65.5e9 / GIB, 8: 65.5e9 / GIB}
"""GPUs of a node → weights of the largest of our recipes' models with an engine of that many (Qwen3-8B, Qwen2.5-32B)."""


def needed_gib(memory_gib: float, gpus: int) -> float:
    """Ray's object store, by Ray's own shares, and the file by which the engines of a node get weights."""
    share, most = DEFAULT_OBJECT_STORE_MEMORY_PROPORTION, DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES
    return min(share * memory_gib, most / GIB) + 1.1 * WEIGHTS_GIB.get(gpus, 0.0)


def offered_gib(name: str) -> dict[str, tuple[float, float, int]]:
    """Node type → (shared memory, memory, GPUs)."""
    config = read(name)
    offered: dict[str, tuple[float, float, int]] = {}
    if name in KUBERAY:
        spec = config["spec"].get("rayClusterSpec", config["spec"])
        groups = {"head": spec["headGroupSpec"]} | {g["groupName"]: g for g in spec["workerGroupSpecs"]}
        for key, group in groups.items():
            pod = group["template"]["spec"]
            mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
            (volume,) = [v["emptyDir"] for v in pod["volumes"] if v["name"] == mounts["/dev/shm"]]
            assert volume["medium"] == "Memory"
            limits = pod["containers"][0]["resources"]["limits"]
            shm, memory = (float(size.removesuffix("Gi")) for size in (volume["sizeLimit"], limits["memory"]))
            offered[key] = (shm, memory, int(limits.get("nvidia.com/gpu", 0)))
        return offered
    for key, node_type in config["available_node_types"].items():
        head = key == config["head_node_type"]
        docker = config["docker"] | node_type.get("docker", {})
        options = docker.get("run_options", []) + docker.get(f"{'head' if head else 'worker'}_run_options", [])
        (size,) = [o.removeprefix("--shm-size=") for o in options if o.startswith("--shm-size=")]
        node = node_type["node_config"]
        memory = MEMORY_GIB[node.get("InstanceType") or node["machineType"]]
        offered[key] = (float(size.removesuffix("g")), memory, int(node_type["resources"].get("GPU", 0)))
    return offered


@pytest.mark.parametrize("name", [*CLOUDS, *KUBERAY])
def test_shared_memory_holds_ray_s_store_and_the_engines_weights(name: str) -> None:
    for key, (shm, memory, gpus) in offered_gib(name).items():
        needed = needed_gib(memory, gpus)
        assert needed <= shm <= needed + 4, (key, needed)
        assert shm < 0.7 * memory, key
