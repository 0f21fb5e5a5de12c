"""Settings of losses and learners. This file imports nothing heavy."""

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from learners.losses.objective import PolicyObjective
from learners.losses.registry import LOSSES
from trajectory.paths import LocalPath
from trajectory.section import Section, Seed

PACKED_BUFFER_BYTES = 256 << 20
"""Size of each of the two buffers into which vLLM packs tensors for NCCL, on the learner's GPU and on each engine's. vLLM's
own size is 1 GiB. A buffer takes whole tensors until it is full, so it has this size and that of one tensor at most."""

BUCKET_ELEMENTS = 500_000_000
"""Gradients are reduced in buckets of at most this many elements, which is DeepSpeed's own default."""

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]

LearnerCall = Literal["policy_step", "sft_step", "pair_step", "scores", "logprobs", "publish"]
"""The methods of a learner that need one kind of head."""


class LossConfig(Section):
    """The policy objective: which loss, how it is clipped, and how the difference of engine and learner is corrected."""

    algorithm: str = "dapo"
    """`grpo`: mean over sequences of token means (arXiv 2402.03300). `dr_grpo`: sum over a constant length
    (2503.20783). `dapo`: mean over all tokens, clip-higher (2503.14476). `gspo`: one ratio a sequence (2507.18071).
    `cispo`: clipped, detached importance weight times log-likelihood (2506.13585)."""

    eps_low: PositiveFloat | None = None
    """The ratio is clipped below 1 − eps_low. None: the algorithm's published value."""

    eps_high: PositiveFloat | None = None
    """The ratio is clipped above 1 + eps_high. None: the algorithm's published value."""

    max_response_tokens: PositiveInt | None = None
    """The constant length by which `dr_grpo` divides. The other algorithms don't use it."""

    advantage_scale: Literal["auto", "std", "none", "batch"] = "auto"
    """The divisor of rewards less their group's mean: the group's standard deviation (`std`), nothing (`none`), or the whole
    batch's standard deviation (`batch`). `auto`: nothing with `dr_grpo`, otherwise the group's."""

    is_correction: Literal["none", "tis", "mis"] = "tis"
    """Importance-sampling correction between the engine that sampled (behaviour) and the learner (proximal policy). `tis`
    truncates the weight at `is_max`; `mis` drops tokens or sequences with a weight outside [`is_min`, `is_max`]."""

    is_level: Literal["auto", "token", "sequence"] = "auto"
    """One weight for each token, or one for each sequence (their product). `auto`: sequence with `gspo`, otherwise token."""

    is_max: PositiveFloat = 2.0
    """The largest importance weight that is used."""

    is_min: PositiveFloat | None = None
    """The smallest importance weight that `mis` keeps. None: no lower limit."""

    kl_estimator: Literal["none", "k1", "k2", "k3"] = "none"
    """Penalise KL(policy ‖ frozen reference), estimated per token: k1 = log(π/π_ref), k2 = k1²/2, k3 = e^−k1 − 1 + k1
    (Schulman 2020). k1 uses k2's gradient, as its own is zero in expectation."""

    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL penalty."""

    @field_validator("algorithm")
    @classmethod
    def _is_known(cls, algorithm: str) -> str:
        if algorithm not in LOSSES:
            raise ValueError(f"{algorithm!r} is no known objective; these are: {', '.join(LOSSES)}")
        return algorithm

    @model_validator(mode="after")
    def _no_contradictions(self) -> "LossConfig":
        if (self.kl_estimator == "none") != (self.kl_coef == 0.0):
            raise ValueError(
                f"kl_estimator={self.kl_estimator!r} contradicts kl_coef={self.kl_coef}: set both, or neither"
            )
        if self.objective.needs_length and self.max_response_tokens is None:
            raise ValueError(f"algorithm={self.algorithm!r} divides by a constant length: set max_response_tokens")
        if self.max_response_tokens is not None and not self.objective.needs_length:
            raise ValueError(f"max_response_tokens has no effect with algorithm={self.algorithm!r}: leave it out")
        by_sequence = self.objective.ratio_level == "sequence"
        if by_sequence and self.is_level == "token" and self.is_correction != "none":
            raise ValueError(
                f"{self.algorithm} has one ratio a sequence: is_level='token' would bring token weights back in"
            )
        if self.is_min is not None and self.is_correction != "mis":
            raise ValueError(f"is_min has no effect with is_correction={self.is_correction!r}")
        if self.is_min is not None and self.is_min >= self.is_max:
            raise ValueError(f"is_min={self.is_min} leaves nothing below is_max={self.is_max}")
        if self.clip_range[0] > 1.0:
            raise ValueError("eps_low > 1 would clip at a negative ratio; 1 leaves the lower side open")
        return self

    @property
    def objective(self) -> PolicyObjective:
        """The objective that `algorithm` names."""
        return LOSSES[self.algorithm]

    @property
    def clip_range(self) -> tuple[float, float]:
        """(ε_low, ε_high), with the published values where none are set."""
        low, high = self.objective.clip_range
        return (low if self.eps_low is None else self.eps_low, high if self.eps_high is None else self.eps_high)

    @property
    def sequence_level_is(self) -> bool:
        """Whether there is one engine-to-learner weight for each sequence."""
        return self.is_level == "sequence" or (self.is_level == "auto" and self.objective.ratio_level == "sequence")

    @property
    def reward_scale(self) -> Literal["std", "none", "batch"]:
        """`advantage_scale` with the meaning of `auto` filled in."""
        if self.advantage_scale == "auto":
            return self.objective.advantage_scale
        return self.advantage_scale


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), by `peft`, which are trained instead of the model's weights."""

    rank: PositiveInt = 16
    """Rank of the adapters' matrices."""

    alpha: PositiveFloat = 32.0
    """The adapters' output is multiplied by alpha / rank."""

    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Dropout on the adapters' input, only in supervised and pair training: the policy must be the function that was
    sampled."""

    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers with an adapter: all except the output layer or head, or those whose names end in one of these."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError("lora.targets=() leaves nothing to train; set lora=None to train all weights")
        return self

    @property
    def of_output_layer(self) -> bool:
        """Whether the output layer gets an adapter."""
        return self.targets != "all-linear" and any(name.rpartition(".")[2] == "lm_head" for name in self.targets)


LEAST_ADAPTER_LR = 1e-5
"""Below this learning rate, adapters in a bfloat16 model change too little.

Measured on a weight of deviation 0.02 (2048 × 2048, rank 16, alpha 32, all of Adam's steps in one direction), merged in
bfloat16: 0.3 % of the change is left after one step of 1e-6 and 28 % after a hundred, but 99 % after a hundred of 1e-5, or
ten of 1e-4."""


def adapter_lr_fault(section: str, lora: LoraConfig | None, lr: float, *, in_bfloat16: bool) -> str | None:
    """Why the learning rate `section`.lr is too small for adapters; None if it isn't, or there are none."""
    if lora is None or not in_bfloat16 or lr >= LEAST_ADAPTER_LR:
        return None
    return (
        f"{section}.lr = {lr:g} is too small for {section}.lora: merged into weights in bfloat16, most of such a step "
        "is lost to rounding. Set 1e-5 to 1e-4"
    )


class LearnerConfig(Section):
    """The group of training processes and its optimizer."""

    model: LocalPath
    """Directory of a Hugging Face model, or its URI. Training starts from it, and it is the frozen reference of a KL
    penalty."""

    head: Literal["lm", "scalar"] = "lm"
    """`lm`: a language model. `scalar`: one score for each sequence, read at its last token (Hugging Face's
    AutoModelForSequenceClassification with num_labels=1), with a new head if `model` is a language model."""

    lora: LoraConfig | None = None
    """Train adapters in float32, and the scalar head if there is one. Exports have the merged model, and the adapters in
    peft's format in its folder `adapter`. None: train all weights."""

    num_learners: PositiveInt = 1
    """Number of ranks, one process each."""

    sequence_parallel_size: PositiveInt = 1
    """Ranks that share every micro-batch, each with a part of its tokens, for samples that are too long for one rank
    (DeepSpeed-Ulysses, arXiv 2309.14509). It divides `num_learners` and the model's attention heads. 1: each rank has
    micro-batches of its own."""

    num_cpus_per_learner: PositiveInt = 1
    """Ray CPUs of each rank, which is also its number of OpenMP threads."""

    num_gpus_per_learner: NonNegativeInt = 0
    """1: each rank trains on its own GPU, in bfloat16. 0: on the CPU, in float32."""

    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the ranks on nodes."""

    place_by_role: bool = False
    """Place the ranks on nodes that offer the Ray resource `learner`. A run's `place_by_role` sets this."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The model's type in forward and backward. `auto`: bfloat16 on GPU (master weights in float32), float32 on CPU."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed ZeRO shards over the ranks: nothing (0), the optimizer (1), also gradients (2), also parameters (3)."""

    attention: Literal["auto", "sdpa", "varlen"] = "auto"
    """`varlen` trains on concatenated sequences without padding, `sdpa` on rectangles that are padded on the right. `auto`:
    varlen with `sequence_parallel_size` above 1 and where the GPU has PyTorch's variable-length kernel for this model, else
    sdpa."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. This needs less memory and about a third more time."""

    lr: PositiveFloat = 1e-6
    """Peak learning rate. Adapters need 1e-5 to 1e-4."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""

    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""

    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""

    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm. 0: no clipping."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Shape of the learning rate after warm-up. `cosine` falls to 0 at `total_steps`."""

    warmup_steps: NonNegativeInt = 0
    """Training steps of linear warm-up. A training step is one batch, into however many minibatches it is split."""

    total_steps: PositiveInt | None = None
    """Training steps of the whole run; for GRPO it is `grpo.num_steps`. `cosine` needs it."""

    micro_batch_tokens: PositiveInt = 16384
    """Tokens, including padding, of one forward and backward pass on one rank. Times `sequence_parallel_size`, at least as
    many as the longest sample."""

    num_minibatches: PositiveInt = 1
    """Optimizer steps for each batch; fewer if fewer samples have a gradient. 1: on-policy except for staleness. More: the
    proximal logprobs are computed before the first step."""

    logit_chunk_mib: PositiveInt = 512
    """Upper limit for one block of float32 logits, MiB. Longer batches go through the output layer in several blocks."""

    temperature: PositiveFloat = 1.0
    """Logits are divided by this before logprobs are taken. It must be the engine's sampling temperature."""

    seed: Seed = 0
    """Seed of torch and numpy on every rank."""

    weight_sync: Literal["host", "nccl", "adapter"] = "host"
    """How engines get new weights: all of them through the object store (`host`) or by vLLM's NCCL broadcast (`nccl`, GPUs
    only), or only the adapters through the object store (`adapter`)."""

    start_timeout_s: PositiveFloat = Field(default=600.0)
    """Longest wait until all ranks have loaded the model, seconds."""

    step_timeout_s: PositiveFloat = Field(default=1800.0)
    """Longest wait for one training step, save or load, seconds; also the timeout of collectives between ranks."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "LearnerConfig":
        if self.schedule == "cosine" and self.total_steps is None:
            raise ValueError("schedule='cosine' needs total_steps")
        if self.total_steps is not None and self.warmup_steps >= self.total_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be less than total_steps={self.total_steps}")
        if self.num_gpus_per_learner > 1:
            raise ValueError("a rank drives one GPU: raise num_learners instead of num_gpus_per_learner")
        if self.num_learners % self.sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size={self.sequence_parallel_size} doesn't divide num_learners={self.num_learners}: set "
                "num_learners to a multiple of it"
            )
        if self.sequence_parallel_size > 1 and self.attention == "sdpa":
            raise ValueError(
                f"sequence_parallel_size={self.sequence_parallel_size} needs packed sequences, which attention='sdpa' "
                "doesn't have: set attention to 'auto' or 'varlen'"
            )
        on_gpu = self.num_gpus_per_learner == 1
        if not on_gpu and self.weight_sync == "nccl":
            raise ValueError("weight_sync='nccl' needs num_gpus_per_learner=1")
        if self.weight_sync == "adapter" and self.lora is None:
            raise ValueError("weight_sync='adapter' needs lora: without adapters all weights change")
        if self.weight_sync == "adapter" and self.lora is not None and self.lora.of_output_layer:
            raise ValueError(
                "lora.targets has the output layer, lm_head, for which engines take no adapter: leave it out, or set "
                "engine.weight_transfer='host', which sends the merged weights"
            )
        if self.head == "scalar":
            for name in ("temperature", "num_minibatches", "weight_sync"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name}={getattr(self, name)!r} has no effect with head='scalar'")
        return self

    @property
    def in_bfloat16(self) -> bool:
        """Whether training is in bfloat16, with `auto` resolved."""
        return self.dtype == "bfloat16" or (self.dtype == "auto" and self.num_gpus_per_learner > 0)

    @property
    def micro_batch_capacity(self) -> int:
        """Tokens of one micro-batch, over all ranks that share it, and so of the longest sample."""
        return self.micro_batch_tokens * self.sequence_parallel_size

    def check_heads(self, num_heads: int, num_kv_heads: int) -> None:
        """Raise ValueError if a model with so many heads, and so many of keys and values, can't be divided among the ranks
        that share a micro-batch. Fewer of keys and values than ranks are repeated."""
        size = self.sequence_parallel_size
        fitting = [
            n for n in range(1, num_heads + 1) if not num_heads % n and (not num_kv_heads % n or not n % num_kv_heads)
        ]
        if size not in fitting:
            raise ValueError(
                f"sequence_parallel_size={size}: so many ranks can't divide the model's {num_heads} attention heads and "
                f"{num_kv_heads} heads of keys and values; set one of {', '.join(map(str, fitting))}"
            )

    def check_loss(self, loss: LossConfig) -> None:
        """Raise ValueError for a policy objective that contradicts these settings."""
        if self.head == "scalar" and loss.kl_coef > 0:
            raise ValueError(f"kl_coef={loss.kl_coef} contradicts head='scalar': a score has no KL to a reference")

    def check_call(self, call: LearnerCall) -> None:
        """Raise ValueError, naming the field, if a learner with these settings can't do `call` (a method's name)."""
        needed = "scalar" if call in ("pair_step", "scores") else "lm"
        if self.head != needed:
            raise ValueError(f"{call} needs head={needed!r}, and this learner has head={self.head!r}")
        if call == "policy_step" and self.lora is not None and self.lora.dropout > 0:
            raise ValueError(
                f"lora.dropout={self.lora.dropout}: engines sample without dropout, so policy_step would train another "
                "function than the one sampled from; set it to 0"
            )
