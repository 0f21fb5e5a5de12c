"""Node types and the resources that a run requests of them. Arithmetic finds what can't be met before anything waits.

A node type offers CPUs, GPUs and its role, which is a Ray resource of that name. With `place_by_role` every actor requests a
small share of its role too, so learners, engines and sandboxes stay on the nodes meant for them. Roles are custom resources
and not labels, because RLlib passes only the former to its runners, and both of Ray's autoscalers know them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LEARNER, ROLLOUT, SANDBOX = "learner", "rollout", "sandbox"

SHARE = 0.001
"""Share of a role that one actor takes. It only marks the actor; CPUs and GPUs decide how many actors fit."""


@dataclass(frozen=True, slots=True)
class Ask:
    """`count` actors of one kind, each on one node. With `spread`, each is on a different node."""

    who: str
    count: int
    resources: Mapping[str, float]
    spread: bool = False
    gpus_key: str = ""
    """The setting that says how many GPUs one of them takes, if that may be more than one."""


@dataclass(frozen=True, slots=True)
class NodeType:
    """A type of which up to `max_nodes` nodes each offer `resources`."""

    name: str
    max_nodes: int
    resources: Mapping[str, float]


def role(name: str, *, by_role: bool) -> dict[str, float]:
    """The resource that marks an actor as one of this role; empty unless the run places by role."""
    return {name: SHARE} if by_role else {}


def unmet(asks: Sequence[Ask], node_types: Sequence[NodeType]) -> list[str]:
    """A sentence for every request that the node types can't meet with all their nodes; empty if everything fits.

    The method is greedy: the largest requests come first, and each actor goes to the first node with room. So it may refuse
    what a better packing would just fit; Ray's own scheduler packs no better.
    """
    nodes = [(t.name, dict(t.resources)) for t in node_types for _ in range(t.max_nodes)]
    problems = []
    for ask in sorted(asks, key=lambda a: (-a.resources.get("GPU", 0), -a.resources.get("CPU", 0))):
        if problem := _too_large(ask, node_types):
            problems.append(problem)
            continue
        placed = 0
        for _, free in nodes:
            while placed < ask.count and _fits(ask.resources, free):
                for name, amount in ask.resources.items():
                    free[name] -= amount
                placed += 1
                if ask.spread:
                    break
        if placed < ask.count:
            problems.append(
                f"{ask.who}: {ask.count} × {_text(ask.resources)} asked for, only {placed} fit beside the others; there are "
                f"{_offers(node_types)}"
            )
    return problems


def too_large(asks: Sequence[Ask], nodes: Sequence[NodeType]) -> list[str]:
    """A sentence for every request of which not even one fits on an empty node."""
    return [problem for ask in asks if (problem := _too_large(ask, nodes))]


def _too_large(ask: Ask, nodes: Sequence[NodeType]) -> str:
    if not ask.count or any(_fits(ask.resources, node.resources) for node in nodes):
        return ""
    wanted = ask.resources.get("GPU", 0)
    roles = {name: amount for name, amount in ask.resources.items() if name not in ("CPU", "GPU")}
    most = max((node.resources.get("GPU", 0) for node in nodes if _fits(roles, node.resources)), default=0)
    if ask.gpus_key and 1 <= most < wanted:
        return (
            f"{ask.gpus_key} = {wanted:g}: the GPUs of one engine have to be in one node, as no engine spans two, and the "
            f"largest node has {most:g} GPUs; set it to {most:g} or lower, or use nodes with {wanted:g} GPUs"
        )
    return f"{ask.who}: no node type offers {_text(ask.resources)} on one node; there are {_offers(nodes)}"


def read_node_types(path: str | Path) -> list[NodeType]:
    """The node types of a `ray up` file, or of a KubeRay RayCluster or RayJob. Raises ValueError."""
    try:
        documents = [d for d in yaml.safe_load_all(Path(path).expanduser().read_text()) if d]
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    for document in documents:
        if isinstance(document, dict) and "available_node_types" in document:
            return ray_up_types(document)
        if isinstance(document, dict) and document.get("kind") == "RayCluster":
            return kuberay_types(document["spec"])
        if isinstance(document, dict) and document.get("kind") == "RayJob":
            return kuberay_types(document["spec"]["rayClusterSpec"])
    raise ValueError(f"{path}: neither a `ray up` file with available_node_types nor a RayCluster or RayJob")


def ray_up_types(config: Mapping[str, Any]) -> list[NodeType]:
    """The node types of a `ray up` file: the head once, others up to their `max_workers`."""
    types, head, most = config["available_node_types"], config["head_node_type"], config.get("max_workers", 2)
    return [
        NodeType(name, 1 if name == head else min(t.get("max_workers", most), most), t.get("resources", {}))
        for name, t in types.items()
    ]


def kuberay_types(spec: Mapping[str, Any]) -> list[NodeType]:
    """The node types of a RayCluster's spec. Resources that aren't declared to Ray are its first container's limits,
    which is what KubeRay assumes."""
    head = spec["headGroupSpec"]
    groups = [("head", 1, head)]
    groups += [(g["groupName"], int(g.get("maxReplicas", 1)), g) for g in spec.get("workerGroupSpecs", [])]
    return [NodeType(name, count, _pod_resources(group)) for name, count, group in groups]


def _pod_resources(group: Mapping[str, Any]) -> dict[str, float]:
    params = group.get("rayStartParams", {})
    limits = group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {})
    offered = {"CPU": float(params.get("num-cpus", limits.get("cpu", 0)))}
    if gpus := params.get("num-gpus", limits.get("nvidia.com/gpu")):
        offered["GPU"] = float(gpus)
    if custom := params.get("resources"):
        # JSON within quotes, in the form that a shell's command line needs.
        offered |= {name: float(amount) for name, amount in json.loads(json.loads(custom)).items()}
    return offered


def _fits(wanted: Mapping[str, float], free: Mapping[str, float]) -> bool:
    return all(free.get(name, 0.0) + 1e-9 >= amount for name, amount in wanted.items())


def _text(resources: Mapping[str, float]) -> str:
    return ", ".join(name if amount == SHARE else f"{amount:g} {name}" for name, amount in resources.items())


def _offers(node_types: Sequence[NodeType]) -> str:
    return "; ".join(
        f"{t.name} × {t.max_nodes}: " + (", ".join(f"{a:g} {n}" for n, a in t.resources.items() if a) or "nothing")
        for t in node_types
    )
