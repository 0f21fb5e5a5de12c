"""Estimates what a run needs, before anything is started: `--dry-run`.

Each stage has actors that are alive at the same time; the next stage starts when they are gone. What one actor takes is in
`memory`. Nothing here looks at the machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from autotraj.config.run import RunConfig
from autotraj.config.stage_registry import GRPO, REWARD_MODEL, SFT
from autotraj.errors import UserError
from autotraj.planning.memory import (
    GIB,
    PROCESS_GIB,
    Memory,
    element_bytes,
    engine_bytes,
    engine_memory,
    learner_memory,
    num_trained,
    optimizer_bytes,
    scorer_memory,
)
from autotraj.planning.model_size import ModelSize, model_size
from learners.config import LearnerConfig, adapter_lr_fault

LOG_BYTES_PER_TOKEN = 17
"""Bytes of a token in the trajectory log: id (4), logprob (4), mask (1), and its 4 characters twice, in the turn and in the
whole text."""

SAMPLING = "base"
"""The part of a run in which engines alone are up: the base model is measured, and stage 1 samples from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorPlan:
    """Actors of one kind."""

    name: str
    count: int
    num_cpus: float  # each
    num_gpus: float  # each; below 1 it is the share of a GPU's memory that is its own
    memory: dict[str, int]  # bytes by purpose, on each of its GPUs, or of each process if it has none
    formulas: dict[str, str]
    note: str = ""
    remedy: str = ""  # what makes it smaller

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """Actors that are alive at the same time."""

    name: str
    actors: tuple[ActorPlan, ...]

    @property
    def num_cpus(self) -> float:
        return sum(a.count * a.num_cpus for a in self.actors)

    @property
    def num_gpus(self) -> float:
        return sum(a.count * a.num_gpus for a in self.actors)

    @property
    def host_bytes(self) -> int:
        """Memory of all actors without a GPU."""
        return sum(a.count * a.memory_bytes for a in self.actors if not a.num_gpus)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The plan of a run."""

    model: str
    num_parameters: int
    num_trained: int
    gpu_bytes: int
    stages: tuple[StagePlan, ...]
    num_steps: int
    num_trajectories: int
    max_tokens: int  # prompts and responses, all at their longest
    num_eval_trajectories: int | None  # None: all tasks of a file whose length isn't known here
    disk: dict[str, int]  # bytes by purpose, at most
    problems: tuple[str, ...] = field(default=())

    @property
    def num_cpus(self) -> float:
        return max(stage.num_cpus for stage in self.stages)

    @property
    def num_gpus(self) -> float:
        return max(stage.num_gpus for stage in self.stages)

    def actors(self, stage: str) -> tuple[ActorPlan, ...]:
        """The actors of the stage of that name."""
        return next(planned.actors for planned in self.stages if planned.name == stage)


def plan(config: RunConfig, *, gpu_gib: float = 80.0) -> Plan:
    """The plan of a run on GPUs of `gpu_gib`. A reward model, if it has one, is as large as the policy.

    Reads the checkpoint's `config.json`, or the table of known models. Raises UserError if the model is in neither.
    """
    size = model_size(config.model)
    gpu_bytes = int(gpu_gib * GIB)
    stages = stage_plans(config, gpu_gib=gpu_gib)
    longest = config.episode.max_prompt_tokens + config.episode.max_response_tokens
    num_trajectories = config.grpo.num_steps * config.grpo.groups_per_step * config.rollout.group_size
    limit = config.eval.data.limit
    trained = num_trained(config.learner, size)
    checkpoint = element_bytes(config.learner) * size.num_parameters + optimizer_bytes(config.learner) * trained
    problems = [problem for stage in stages for problem in _too_large(stage, gpu_bytes)]
    if size.max_positions is not None and config.engine.max_model_len > size.max_positions:
        problems.append(
            f"engine.max_model_len = {config.engine.max_model_len} exceeds the model's {size.max_positions} positions"
        )
    problems.extend(_slow_adapters(config))
    if stages[0].actors[0].memory["KV cache"] < longest * _kv_bytes(config, size):
        problems.append(f"rollout: the KV cache has no room for one trajectory of {longest} tokens")
    return Plan(
        model=config.model,
        num_parameters=size.num_parameters,
        num_trained=trained,
        gpu_bytes=gpu_bytes,
        stages=tuple(stages),
        num_steps=config.grpo.num_steps,
        num_trajectories=num_trajectories,
        max_tokens=num_trajectories * longest,
        num_eval_trajectories=None if limit is None else limit * config.eval.num_samples,
        disk={
            # One more than is kept: the newest is complete before the oldest goes.
            "checkpoints": (config.grpo.keep_checkpoints + 1) * checkpoint,
            "trained policy": element_bytes(config.learner) * size.num_parameters,
            "trajectory log": num_trajectories * longest * LOG_BYTES_PER_TOKEN,
        },
        problems=tuple(problems),
    )


def _too_large(stage: StagePlan, gpu_bytes: int) -> list[str]:
    """A sentence for each actor that doesn't fit into its GPU, or into its share of one."""
    problems = []
    for actor in stage.actors:
        share = min(1.0, actor.num_gpus)
        if not share or actor.memory_bytes <= share * gpu_bytes:
            continue
        room = f"{share:g} of a GPU, {_gib(int(share * gpu_bytes))}" if share < 1 else f"a GPU's {_gib(gpu_bytes)}"
        problems.append(f"{stage.name}: {actor.name} needs about {_gib(actor.memory_bytes)} of {room}: {actor.remedy}")
    return problems


def stage_plans(config: RunConfig, *, gpu_gib: float = 80.0) -> list[StagePlan]:
    """The stages of the run, in their order; only `SAMPLING` if the run only measures. Raises UserError as `plan` does."""
    size = model_size(config.model)
    rollout = _rollout(config, size, int(gpu_gib * GIB))
    if config.only_measures:
        return [StagePlan(name=SAMPLING, actors=(rollout,))]
    repairers = (_repair(config, int(gpu_gib * GIB)),) if config.repair.repairer != "policy" else ()
    stages = [StagePlan(name=SAMPLING, actors=(rollout, *repairers))]
    if SFT.name in config.stages:
        supervised = config.learner.model_copy(update={"weight_sync": "host", "lora": config.sft.lora})
        learner = _learner(supervised, size, section="sft")
        stages.append(StagePlan(name=SFT.name, actors=(learner,)))
    if REWARD_MODEL.name in config.stages:
        stages.append(StagePlan(name=REWARD_MODEL.name, actors=(_reward_model_learner(config, size),)))
    if GRPO.name in config.stages:
        actors = [rollout, _learner(config.learner, size, with_reference=config.loss.kl_coef > 0)]
        if scores(config):
            actors.append(_reward_model(config, size))
            actors += [_reward_model_learner(config, size)] if config.online_repair.enabled else []
        stages.append(StagePlan(name=GRPO.name, actors=(*actors, *repairers)))
    return stages


def scores(config: RunConfig) -> bool:
    """Whether a reward model scores GRPO's trajectories: one that the run trains, or one that it is given."""
    return bool(config.reward_model.path) or REWARD_MODEL.name in config.stages


def host_bytes(config: RunConfig) -> int:
    """The bytes of memory that the run needs on this machine alone: the driver's process, and the actors without a GPU of
    the stage that needs most."""
    return int(PROCESS_GIB * GIB) + max(stage.host_bytes for stage in stage_plans(config))


def memory_by_part(config: RunConfig) -> str:
    """How much memory each part of the largest stage needs, a line for each, and how to lower it."""
    try:
        stages = stage_plans(config)
    except UserError as error:
        return f"How much each part needs isn't known: {error}"
    largest = max(stages, key=lambda stage: stage.host_bytes)
    lines = [
        f"  {actor.name} × {actor.count}: about {_gib(actor.memory_bytes)} of {'a GPU' if actor.num_gpus else 'memory'} "
        "each (" + ", ".join(f"{name} {_gib(size)}" for name, size in actor.memory.items()) + ")"
        for actor in largest.actors
    ]
    return "\n".join(
        [
            f"What the parts need in the stage {largest.name}:",
            *lines,
            "Lower rollout.num_actors, learner.num_learners, learner.micro_batch_tokens or engine.cpu_kv_cache_gib, train "
            "with learner.lora or a higher learner.zero_stage, or use nodes with more memory",
        ]
    )


def render_plan(plan: Plan) -> str:
    """The plan as text for a terminal."""
    lines = [
        f"model        {plan.model}: {_count(plan.num_parameters)} parameters, "
        f"and GRPO trains {_count(plan.num_trained)} ({plan.num_trained / plan.num_parameters:.2%})",
        f"cluster      {plan.num_cpus:g} CPUs, {plan.num_gpus:g} GPUs"
        + (f" of {_gib(plan.gpu_bytes)}" if plan.num_gpus else ""),
        "formulas     in bytes, estimated: P parameters of the model, T that are trained, N learners",
    ]
    shown: list[ActorPlan] = []
    for stage in plan.stages:
        lines += ["", f"stage {stage.name}: {stage.num_cpus:g} CPUs, {stage.num_gpus:g} GPUs"]
        for actor in stage.actors:
            where = "a GPU" if actor.num_gpus else "a process"
            lines.append(
                f"  {actor.name} × {actor.count}: {actor.num_cpus:g} CPUs, {actor.num_gpus:g} GPUs each; "
                f"about {_gib(actor.memory_bytes)} {where}" + (f"; {actor.note}" if actor.note else "")
            )
            if actor not in shown:
                shown.append(actor)
                lines += [
                    f"    {_gib(size):>10}  {name:<16} {actor.formulas[name]}" for name, size in actor.memory.items()
                ]
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
    memory = engine_memory(engine, size, gpu_bytes)
    longest = config.episode.max_prompt_tokens + config.episode.max_response_tokens
    fits = memory.parts["KV cache"] // max(1, longest * _kv_bytes(config, size))
    return _actor(
        "rollout",
        rollout.num_actors,
        rollout.num_cpus,
        rollout.num_gpus,
        memory,
        note=f"{fits} trajectories of {longest} tokens at once ({min(engine.max_num_seqs, rollout.max_concurrent_episodes)}"
        " allowed)",
        remedy=f"raise engine.tensor_parallel_size, or lower engine.gpu_memory_utilization = "
        f"{engine.gpu_memory_utilization:g}",
    )


def _learner(
    learner: LearnerConfig, size: ModelSize, *, section: str = "learner", with_reference: bool = False
) -> ActorPlan:
    return _actor(
        "learner",
        learner.num_learners,
        learner.num_cpus_per_learner,
        learner.num_gpus_per_learner,
        learner_memory(learner, size, with_reference=with_reference),
        note=f"ZeRO-{learner.zero_stage}, N = {learner.num_learners}"
        + (f", LoRA of rank {learner.lora.rank}" if learner.lora else ", all weights are trained"),
        remedy="lower learner.micro_batch_tokens, "
        + ("" if learner.gradient_checkpointing else "set learner.gradient_checkpointing, ")
        + ("" if learner.lora else f"train with {section}.lora, ")
        + ("raise learner.num_learners" if learner.zero_stage == 3 else "raise learner.zero_stage"),
    )


def _reward_model_learner(config: RunConfig, size: ModelSize) -> ActorPlan:
    of_pairs = config.learner.model_copy(
        update={"weight_sync": "host", "lora": config.reward_model.lora, "head": "scalar"}
    )
    return replace(_learner(of_pairs, size, section="reward_model"), name="reward-model learner")


def _reward_model(config: RunConfig, size: ModelSize) -> ActorPlan:
    scorer = config.scorer
    return _actor(
        "reward model",
        1,
        scorer.num_cpus,
        scorer.num_gpus,
        scorer_memory(scorer, size),
        remedy="lower scorer.micro_batch_tokens, or leave the stage 'reward-model' out of `stages`",
    )


def _repair(config: RunConfig, gpu_bytes: int) -> ActorPlan:
    repair = config.repair
    places = {"num_actors": repair.num_actors, "num_cpus": repair.num_cpus, "num_gpus": repair.num_gpus}
    if repair.engine is None:
        process = Memory(parts={"overhead": int(PROCESS_GIB * GIB)}, formulas={"overhead": "one process"})
        return _actor(
            "repair", repair.num_actors, repair.num_cpus, repair.num_gpus, process, note="asks an endpoint", remedy=""
        )
    own = config.model_copy(
        update={
            "engine": repair.engine,
            "rollout": config.rollout.model_copy(update=places),
            "model": repair.engine.model,
        }
    )
    return replace(_rollout(own, model_size(repair.engine.model), gpu_bytes), name="repair")


def _actor(
    name: str, count: int, num_cpus: float, num_gpus: float, memory: Memory, *, note: str = "", remedy: str
) -> ActorPlan:
    return ActorPlan(
        name=name,
        count=count,
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory=memory.parts,
        formulas=memory.formulas,
        note=note,
        remedy=remedy,
    )


def _kv_bytes(config: RunConfig, size: ModelSize) -> int:
    return size.kv_bytes_per_token(engine_bytes(config.engine), config.engine.tensor_parallel_size)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.0f} MiB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
