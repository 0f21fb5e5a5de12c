"""What fits on which nodes, by hand."""

from pathlib import Path

import pytest

from cluster.roles import SHARE, Ask, NodeType, read_node_types, role, too_large, unmet
from learners.group import ROLE_SHARE

HEAD = NodeType("head", 1, {"CPU": 0})
LEARNER = NodeType("learner", 1, {"CPU": 16, "GPU": 4, "learner": 1})
ROLLOUT = NodeType("rollout", 2, {"CPU": 8, "GPU": 2, "rollout": 1})
NODES = [HEAD, LEARNER, ROLLOUT]


def learners(count: int) -> Ask:
    return Ask("learners", count, {"CPU": 4, "GPU": 1, "learner": SHARE})


def engines(count: int, gpus: int = 1) -> Ask:
    return Ask("engines", count, {"CPU": 4, "GPU": gpus, "rollout": SHARE})


def test_what_fits_raises_nothing() -> None:
    assert unmet([learners(4), engines(4)], NODES) == []


def test_one_too_many_is_named_with_how_many_fit() -> None:
    (problem,) = unmet([learners(5), engines(4)], NODES)
    assert problem.startswith("learners: 5 × 4 CPU, 1 GPU, learner asked for, only 4 fit")


def test_an_actor_larger_than_any_node() -> None:
    (problem,) = unmet([engines(1, gpus=4)], NODES)
    assert problem.startswith("engines: no node type offers 4 CPU, 4 GPU, rollout on one node")
    assert "rollout × 2: 8 CPU, 2 GPU, 1 rollout" in problem


@pytest.mark.parametrize(("gpus", "by_role", "largest"), [(8, True, 2), (8, False, 4), (3, True, 2)])
def test_one_engine_over_two_nodes_is_refused_with_the_setting(gpus: int, by_role: bool, largest: int) -> None:
    resources = {"CPU": 4, "GPU": gpus} | role("rollout", by_role=by_role)
    engine = Ask("engines", 1, resources, gpus_key="engine.tensor_parallel_size")
    sentence = (
        f"engine.tensor_parallel_size = {gpus}: the GPUs of one engine have to be in one node, as no engine spans two, and "
        f"the largest node has {largest} GPUs; set it to {largest} or lower, or use nodes with {gpus} GPUs"
    )
    assert unmet([engine], NODES) == too_large([engine], NODES) == [sentence]
    assert too_large([engines(100)], NODES) == []  # there may be too many, but none is too large


def test_a_role_that_no_node_has() -> None:
    (problem,) = unmet([Ask("sandbox gateway", 1, role("sandbox", by_role=True))], NODES)
    assert problem.startswith("sandbox gateway: no node type offers sandbox on one node")


def test_spread_means_a_node_each() -> None:
    engine_nodes = Ask("one a node", 2, role("rollout", by_role=True), spread=True)
    assert unmet([engine_nodes, engines(4)], NODES) == []
    (problem,) = unmet([Ask("one a node", 3, role("rollout", by_role=True), spread=True)], NODES)
    assert problem.startswith("one a node: 3 × rollout asked for, only 2 fit")


def test_without_roles_any_node_will_do() -> None:
    assert unmet([Ask("anything", 8, {"CPU": 4, "GPU": 1})], NODES) == []


def test_cpus_run_out_before_gpus() -> None:
    (problem,) = unmet([Ask("engines", 4, {"CPU": 6, "GPU": 1, "rollout": SHARE})], NODES)
    assert "only 2 fit" in problem


def test_the_learners_own_mark_is_the_same() -> None:
    """`learners` can't import `cluster`; its copy of the share is what `asks` assumes."""
    assert ROLE_SHARE == SHARE


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "pod.yaml"
    path.write_text("kind: Pod\n")
    with pytest.raises(ValueError, match="neither a `ray up` file"):
        read_node_types(path)
    with pytest.raises(ValueError, match="absent"):
        read_node_types(tmp_path / "absent.yaml")
