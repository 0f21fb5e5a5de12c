"""Estimates what a run needs, before anything is started: `--dry-run`.

The formulas (`model_size`) are printed beside the estimates. Nothing here looks at the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from actors.config import ScorerConfig
from autotraj.config.run import RunConfig
from autotraj.errors import UserError
from autotraj.planning.model_size import ModelSize, model_size, num_adapter_parameters
from learners.config import adapter_lr_fault

GIB = 1 << 30
PROCESS_GIB = 1.5
"""Resident memory of one engine or learner process before any weights: Python, PyTorch and vLLM (measured on CPU)."""

LOGITS = 3
"""Tensors of a chunk's size that live at a time (measured): logits, their log-softmax, its exponential."""

GPU_OVERHEAD_BYTES = 2 * GIB
"""An assumption for each process on a GPU: CUDA context, kernels' workspaces, communication buckets, fragmentation."""

LOG_BYTES_PER_TOKEN = 17
"""Bytes of a token in the trajectory log: id (4), logprob (4), mask (1), and its 4 characters twice, in the turn and in the
whole text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """Actors of one kind."""

    name: str
    count: int
    num_cpus: float  # each
    num_gpus: int  # each
    memory: dict[str, int]  # bytes by purpose, on each of its GPUs, or of each process if it has none
    formulas: dict[str, str]
    note: str = ""

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a run."""

    model: str
    num_parameters: int
    num_trained: int
    gpu_bytes: int
    actors: tuple[ActorPlan, ...]
    num_steps: int
    num_trajectories: int
    max_tokens: int  # prompts and responses, all at their longest
    num_eval_trajectories: int | None  # None: all tasks of a file whose length isn't known here
    disk: dict[str, int]  # bytes by purpose, at most
    problems: tuple[str, ...] = field(default=())

    @property
    def num_cpus(self) -> float:
        return sum(a.count * a.num_cpus for a in self.actors)

    @property
    def num_gpus(self) -> int:
        return sum(a.count * a.num_gpus for a in self.actors)


def plan(config: RunConfig, *, reward_model: ScorerConfig | None = None, gpu_gib: float = 80.0) -> Plan:
    """The plan of a GRPO run on GPUs of `gpu_gib`. A reward model, if it has one, is as large as the policy.

    Reads the checkpoint's `config.json`, or the table of known models. Raises UserError if the model is in neither.
    """
    size = model_size(config.model)
    gpu_bytes = int(gpu_gib * GIB)
    actors = actor_plans(config, reward_model=reward_model, gpu_gib=gpu_gib)
    longest = config.episode.max_prompt_tokens + config.episode.max_response_tokens
    num_trajectories = config.grpo.num_steps * config.grpo.groups_per_step * config.rollout.group_size
    limit = config.eval.data.limit
    checkpoint = _element_bytes(config) * size.num_parameters + _optimizer_bytes(config) * _num_trained(config, size)
    problems = [
        f"{actor.name}: needs about {_gib(actor.memory_bytes)} of a GPU's {_gib(gpu_bytes)}"
        for actor in actors
        if actor.num_gpus and actor.memory_bytes > gpu_bytes
    ]
    if size.max_positions is not None and config.engine.max_model_len > size.max_positions:
        problems.append(
            f"engine.max_model_len = {config.engine.max_model_len} exceeds the model's {size.max_positions} positions"
        )
    problems.extend(_slow_adapters(config))
    if actors[0].memory["KV cache"] < longest * _kv_bytes(config, size):
        problems.append(f"rollout: the KV cache has no room for one trajectory of {longest} tokens")
    return Plan(
        model=config.model,
        num_parameters=size.num_parameters,
        num_trained=_num_trained(config, size),
        gpu_bytes=gpu_bytes,
        actors=tuple(actors),
        num_steps=config.grpo.num_steps,
        num_trajectories=num_trajectories,
        max_tokens=num_trajectories * longest,
        num_eval_trajectories=None if limit is None else limit * config.eval.num_samples,
        disk={
            # One more than is kept: the newest is complete before the oldest goes.
            "checkpoints": (config.grpo.keep_checkpoints + 1) * checkpoint,
            "trained policy": _element_bytes(config) * size.num_parameters,
            "trajectory log": num_trajectories * longest * LOG_BYTES_PER_TOKEN,
        },
        problems=tuple(problems),
    )


def actor_plans(
    config: RunConfig, *, reward_model: ScorerConfig | None = None, gpu_gib: float = 80.0
) -> list[ActorPlan]:
    """All actors of GRPO, the largest stage; only the engines if the run only measures. The rollout actors come first.

    With `reward_model` there are its actor and, with `online_repair`, its learners. Raises UserError as `plan` does.
    """
    size = model_size(config.model)
    actors = [_rollout(config, size, int(gpu_gib * GIB))]
    if config.only_measures:
        return actors
    actors.append(_learner(config, size))
    if reward_model is not None:
        actors.append(_reward_model(reward_model, size))
        if config.online_repair.enabled:
            actors.append(_reward_model_learner(config, size))
    if config.repair.repairer != "policy":
        actors.append(_repair(config, int(gpu_gib * GIB)))
    return actors


def host_bytes(config: RunConfig) -> int:
    """The bytes of memory that the run needs on this machine alone: the driver's process, and the actors without
    a GPU. The reward model counts if it has a path."""
    actors = actor_plans(config, reward_model=config.scorer if config.reward_model.path else None)
    return int(PROCESS_GIB * GIB) + sum(a.count * a.memory_bytes for a in actors if not a.num_gpus)


def memory_by_part(config: RunConfig) -> str:
    """How much memory each part needs, a line for each, and how to lower it."""
    try:
        actors = actor_plans(config, reward_model=config.scorer if config.reward_model.path else None)
    except UserError as error:
        return f"How much each part needs isn't known: {error}"
    lines = [
        f"  {actor.name} × {actor.count}: about {_gib(actor.memory_bytes)} of {'a GPU' if actor.num_gpus else 'memory'} "
        "each (" + ", ".join(f"{name} {_gib(size)}" for name, size in actor.memory.items()) + ")"
        for actor in actors
    ]
    return "\n".join(
        [
            "What the parts need:",
            *lines,
            "Lower rollout.num_actors, learner.num_learners, learner.micro_batch_tokens or engine.cpu_kv_cache_gib, train "
            "with learner.lora or a higher learner.zero_stage, or use nodes with more memory",
        ]
    )


def render_plan(plan: Plan) -> str:
    """The plan as text for a terminal."""
    lines = [
        f"model        {plan.model}: {plan.num_parameters / 1e9:.2f} B parameters, "
        f"{plan.num_trained / plan.num_parameters:.2%} of them trained ({plan.num_trained / 1e6:.1f} M)",
        f"cluster      {plan.num_cpus:g} CPUs, {plan.num_gpus} GPUs"
        + (f" of {_gib(plan.gpu_bytes)}" if plan.num_gpus else ""),
        "formulas     P parameters, T of them trained, N learners; estimates in bytes",
    ]
    for actor in plan.actors:
        where = "a GPU" if actor.num_gpus else "a process"
        lines += [
            "",
            f"{actor.name} × {actor.count}: {actor.num_cpus:g} CPUs, {actor.num_gpus} GPUs each; "
            f"about {_gib(actor.memory_bytes)} {where}" + (f"; {actor.note}" if actor.note else ""),
        ]
        lines += [f"  {_gib(size):>10}  {name:<16} {actor.formulas[name]}" for name, size in actor.memory.items()]
    evaluated = "every task" if plan.num_eval_trajectories is None else f"{plan.num_eval_trajectories:,} trajectories"
    lines += [
        "",
        f"work         {plan.num_steps:,} steps, {plan.num_trajectories:,} trajectories, at most "
        f"{plan.max_tokens / 1e6:,.1f} M tokens; an evaluation samples {evaluated}",
        f"disk         at most {_gib(sum(plan.disk.values()))}: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in plan.disk.items()),
    ]
    lines += ["", *(f"problem      {problem}" for problem in plan.problems)] if plan.problems else []
    return "\n".join(lines)


def _slow_adapters(config: RunConfig) -> list[str]:
    sft, reward_model, learner = config.sft, config.reward_model, config.learner
    found = [
        adapter_lr_fault(name, lora, lr, in_bfloat16=learner.in_bfloat16)
        for name, lora, lr in (
            ("sft", sft.lora, sft.lr),
            ("reward_model", reward_model.lora, reward_model.lr),
            ("learner", learner.lora, learner.lr),
        )
    ]
    return [fault for fault in found if fault is not None]


def _rollout(config: RunConfig, size: ModelSize, gpu_bytes: int) -> ActorPlan:
    engine, rollout = config.engine, config.rollout
    weights = _engine_bytes(config) * size.num_parameters // engine.tensor_parallel_size
    if engine.device == "gpu":
        overhead = GPU_OVERHEAD_BYTES
        kv_cache = max(0, int(engine.gpu_memory_utilization * gpu_bytes) - weights - overhead)
        kv_formula = f"what {engine.gpu_memory_utilization:g} of the GPU leaves"
    else:
        overhead = int(2 * PROCESS_GIB * GIB)  # the actor's and vLLM's core process
        kv_cache = engine.cpu_kv_cache_gib * GIB
        kv_formula = "engine.cpu_kv_cache_gib"
    longest = config.episode.max_prompt_tokens + config.episode.max_response_tokens
    fits = kv_cache // max(1, longest * _kv_bytes(config, size))
    return ActorPlan(
        name="rollout",
        count=rollout.num_actors,
        num_cpus=rollout.num_cpus,
        num_gpus=rollout.num_gpus,
        memory={"weights": weights, "KV cache": kv_cache, "overhead": overhead},
        formulas={
            "weights": f"{_engine_bytes(config)}P / {engine.tensor_parallel_size}",
            "KV cache": f"{kv_formula}; layers · KV heads · key and value · {_engine_bytes(config)} = "
            f"{_kv_bytes(config, size):,} bytes a token",
            "overhead": "context and workspaces" if engine.device == "gpu" else "two processes",
        },
        note=f"{fits} trajectories of {longest} tokens at once ({min(engine.max_num_seqs, rollout.max_concurrent_episodes)}"
        " allowed)",
    )


def _learner(config: RunConfig, size: ModelSize) -> ActorPlan:
    learner = config.learner
    b, ranks, zero = _element_bytes(config), learner.num_learners, learner.zero_stage
    num_trained = _num_trained(config, size)
    num_weights = size.num_parameters + (num_trained if learner.lora else 0)
    gradient_bytes = 4 if b == 4 or zero > 0 else 2  # bfloat16 gradients are summed in float32 from stage 1 on
    activation = size.activation_bytes_per_token(b, checkpointing=learner.gradient_checkpointing)
    all_logits = 4 * learner.micro_batch_tokens * size.vocab_size
    chunk = min(learner.logit_chunk_mib << 20, all_logits)
    # Adapters leave the output layer frozen. With several chunks, their sum and the newest one exist at a time.
    head_gradients = 0 if learner.lora else 1 + (chunk < all_logits)
    memory = {
        "weights": b * num_weights // (ranks if zero == 3 else 1),
        "gradients": gradient_bytes * num_trained // (ranks if zero >= 2 else 1),
        "optimizer": _optimizer_bytes(config) * num_trained // (ranks if zero >= 1 else 1),
        "activations": learner.micro_batch_tokens * activation,
        "logits": LOGITS * chunk + head_gradients * b * size.vocab_size * size.hidden,
        "overhead": GPU_OVERHEAD_BYTES if learner.num_gpus_per_learner else int(PROCESS_GIB * GIB),
    }
    formulas = {
        "weights": f"{b}P" + (" / N" if zero == 3 else ""),
        "gradients": f"{gradient_bytes}T" + (" / N" if zero >= 2 else ""),
        "optimizer": f"{_optimizer_bytes(config)}T" + (" / N" if zero >= 1 else "") + ": moments"
        f"{', master weights' if b == 2 else ''} in float32",
        "activations": f"micro_batch_tokens · {activation:,} bytes"
        + (", checkpointed" if learner.gradient_checkpointing else ""),
        "logits": f"{LOGITS} · {'logit_chunk_mib' if chunk < all_logits else '4 · micro_batch_tokens · vocabulary'}: "
        "logits, their log-softmax and the entropy's"
        + (f"; {head_gradients} · {b} · vocabulary · hidden: the output layer's gradient" if head_gradients else ""),
        "overhead": "context and workspaces" if learner.num_gpus_per_learner else "one process",
    }
    if config.loss.kl_coef > 0 and learner.lora is None:  # with adapters it is the model without them
        memory["reference"] = b * size.num_parameters // (ranks if zero == 3 else 1)
        formulas["reference"] = f"{b}P" + (" / N" if zero == 3 else "")
    return ActorPlan(
        name="learner",
        count=ranks,
        num_cpus=learner.num_cpus_per_learner,
        num_gpus=learner.num_gpus_per_learner,
        memory=memory,
        formulas=formulas,
        note=f"ZeRO-{zero}, N = {ranks}" + (f", LoRA of rank {learner.lora.rank}" if learner.lora else ""),
    )


def _reward_model(config: ScorerConfig, size: ModelSize) -> ActorPlan:
    b = 2 if config.num_gpus else 4
    weights = b * (size.num_parameters + size.hidden - size.num_output_layer)
    activation = b * max(size.block_widths)
    return ActorPlan(
        name="reward model",
        count=1,
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        memory={
            "weights": 2 * weights,
            "activations": config.micro_batch_tokens * activation,
            "overhead": GPU_OVERHEAD_BYTES if config.num_gpus else int(PROCESS_GIB * GIB),
        },
        formulas={
            "weights": f"2 · {b}(P − output layer + hidden): the old and the new model during a swap",
            "activations": f"micro_batch_tokens · {activation:,} bytes of one block",
            "overhead": "context and workspaces" if config.num_gpus else "one process",
        },
    )


def _reward_model_learner(config: RunConfig, size: ModelSize) -> ActorPlan:
    """The reward model's learners: as the policy's, with other adapters and without a reference or an output layer."""
    changes = {
        "learner": config.learner.model_copy(update={"lora": config.reward_model.lora}),
        "loss": config.loss.model_copy(update={"kl_coef": 0.0}),
    }
    group = _learner(config.model_copy(update=changes), size)
    memory = {name: size for name, size in group.memory.items() if name != "logits"}
    return replace(group, name="reward-model learner", memory=memory)


def _repair(config: RunConfig, gpu_bytes: int) -> ActorPlan:
    repair = config.repair
    places = {"num_actors": repair.num_actors, "num_cpus": repair.num_cpus, "num_gpus": repair.num_gpus}
    if repair.engine is None:
        return ActorPlan(
            name="repair",
            count=repair.num_actors,
            num_cpus=repair.num_cpus,
            num_gpus=repair.num_gpus,
            memory={"overhead": int(PROCESS_GIB * GIB)},
            formulas={"overhead": "one process"},
            note="asks an endpoint",
        )
    own = config.model_copy(
        update={
            "engine": repair.engine,
            "rollout": config.rollout.model_copy(update=places),
            "model": repair.engine.model,
        }
    )
    return replace(_rollout(own, model_size(repair.engine.model), gpu_bytes), name="repair")


def _num_trained(config: RunConfig, size: ModelSize) -> int:
    lora = config.learner.lora
    return num_adapter_parameters(config.model, lora) if lora else size.num_parameters


def _element_bytes(config: RunConfig) -> int:
    """Bytes of a parameter in the learner."""
    return 2 if config.learner.in_bfloat16 else 4


def _engine_bytes(config: RunConfig) -> int:
    """Bytes of a parameter and of a number in the KV cache, in the engine."""
    return 4 if config.engine.weights_dtype == "float32" else 2


def _optimizer_bytes(config: RunConfig) -> int:
    """For each trained parameter, Adam's two moments and, below float32, a master copy, all in float32 (arXiv 1910.02054
    §3)."""
    return 8 if _element_bytes(config) == 4 else 12


def _kv_bytes(config: RunConfig, size: ModelSize) -> int:
    return size.kv_bytes_per_token(_engine_bytes(config), config.engine.tensor_parallel_size)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.0f} MiB"
