"""How much memory one engine, learner or reward model takes: bytes by purpose, and the formula of each.

A training process is at its height at one of four moments, so the plan has what is always there and the largest of them:

    logits    all saved activations, and the blocks of logits that live at a time
    head      the gradient of the output layer is added up: its bucket, what is left of the logits, that gradient
    block     one block of the model goes backward (with checkpointing it is computed again): its tensors, and the bucket
    step      copies of the gradients; the activations are gone

tests/autotraj/planning/test_plan_measured.py compares this with the tensors that live in DeepSpeed on CPU. Notation as in
`model_size`.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.config import EngineConfig, ScorerConfig
from autotraj.planning.model_size import ModelSize, num_adapter_parameters
from learners.config import BUCKET_ELEMENTS, PACKED_BUFFER_BYTES, LearnerConfig

GIB = 1 << 30
PROCESS_GIB = 1.5
"""Resident memory of one engine or learner process before any weights: Python, PyTorch and vLLM (measured on CPU)."""

LOGITS = 3
"""Tensors of a chunk's size that live at a time (measured): logits, their log-softmax, its exponential."""

LOGITS_AT_THE_HEAD = 2
"""The same while the output layer's gradient is computed: the log-softmax and the gradient of the logits."""

GPU_OVERHEAD_BYTES = 2 * GIB
"""An assumption for each process on a GPU: CUDA context (1.7 GiB on an H100), kernels' workspaces, fragmentation."""

LIVE_ELEMENTS = 1_000_000_000
"""In ZeRO-3 DeepSpeed keeps at most as many gathered parameters (its `stage3_max_live_parameters`)."""

SUBGROUP_ELEMENTS = 1_000_000_000
"""In ZeRO-3 DeepSpeed's optimizer takes at most as many parameters at a time (its `sub_group_size`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes by purpose on each GPU, or of each process without one; and the formula of each."""

    parts: dict[str, int]
    formulas: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())


def learner_memory(learner: LearnerConfig, size: ModelSize, *, with_reference: bool = False) -> Memory:
    """One rank at its height. `learner.model` is the place of the model whose size `size` is. `with_reference`: there is a
    frozen reference; with adapters it is the model without them."""
    b, ranks, zero = element_bytes(learner), learner.num_learners, learner.zero_stage
    scalar = learner.head == "scalar"
    num_model = size.num_parameters + (size.hidden - size.num_output_layer if scalar else 0)
    trained = num_trained(learner, size)
    t = 4 if learner.lora else b  # bytes of a trained parameter: adapters are always float32
    weights = b * num_model + (t * trained if learner.lora else 0)
    sharded = {
        name: ranks if zero >= stage else 1 for name, stage in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    over = {
        name: " / N" if zero >= stage else "" for name, stage in (("optimizer", 1), ("gradients", 2), ("weights", 3))
    }
    # In ZeRO-1 gradients are added up beside the model's own; from ZeRO-1 on they are added up in float32.
    gradient_bytes = {0: t, 1: 4 + t}.get(zero, 4)
    activation = size.activation_bytes_per_token(b, checkpointing=learner.gradient_checkpointing)
    parts = {
        "weights": weights // sharded["weights"],
        "gradients": gradient_bytes * trained // sharded["gradients"],
        "optimizer": optimizer_bytes(learner) * trained // sharded["optimizer"],
        "activations": learner.micro_batch_tokens * activation,
    }
    formulas = {
        "weights": (f"({b}P + 4T) / N" if over["weights"] else f"{b}P + 4T")
        if learner.lora
        else f"{b}P{over['weights']}",
        "gradients": f"{gradient_bytes}T{over['gradients']}",
        "optimizer": f"{optimizer_bytes(learner)}T{over['optimizer']}: moments"
        f"{', master weights' if optimizer_bytes(learner) == 12 else ''} in float32",
        "activations": f"micro_batch_tokens · {activation:,} bytes that are kept for the backward pass"
        + (", checkpointed" if learner.gradient_checkpointing else ""),
    }
    if with_reference and learner.lora is None:
        parts["reference"] = b * size.num_parameters // sharded["weights"]
        formulas["reference"] = f"{b}P{over['weights']}"
    if zero == 3 and ranks > 1:
        parts["gathered"] = min(weights, b * LIVE_ELEMENTS)
        formulas["gathered"] = f"{b} · at most {LIVE_ELEMENTS / 1e9:g}e9 parameters that are whole at a time"
    # ZeRO-1 reduces its gradients when all micro-batches are done, so its bucket is never beside activations.
    bucket = t * min(trained, BUCKET_ELEMENTS) if zero >= 2 else 0
    if zero == 3:
        parts["bucket"] = bucket
        formulas["bucket"] = "of gradients that are reduced together"
        bucket = 0
    moments = {
        "block": (
            2 * bucket
            + learner.micro_batch_tokens * size.block_bytes_per_token(b, checkpointing=learner.gradient_checkpointing),
            "while one block goes backward" + (", beside a bucket of gradients and its copy" if bucket else ""),
        ),
        "step": (
            max(2 * bucket, _step_bytes(learner, trained, t)) - parts["activations"],
            "while the optimizer steps: copies of the gradients, less the activations, which are gone",
        ),
    }
    if not scalar:
        all_logits = 4 * learner.micro_batch_tokens * size.vocab_size
        chunk = min(learner.logit_chunk_mib << 20, all_logits)
        told = "logit_chunk_mib" if chunk < all_logits else "4 · micro_batch_tokens · vocabulary"
        # Adapters leave the output layer frozen. With several chunks, their sum and the newest one exist at a time.
        head = 0 if learner.lora else b * size.vocab_size * size.hidden
        several = chunk < all_logits
        moments["logits"] = (
            LOGITS * chunk + several * head,
            f"while logits are computed: {LOGITS} · {told}: logits, their log-softmax and the entropy's"
            + (f"; {b} · vocabulary · hidden: the output layer's gradient" if several and head else ""),
        )
        if head:
            moments["head"] = (
                bucket + LOGITS_AT_THE_HEAD * chunk + (1 + several) * head,
                f"while the output layer goes backward: a bucket of gradients; {LOGITS_AT_THE_HEAD} · {told}; "
                f"{1 + several} · {b} · vocabulary · hidden",
            )
    name = max(moments, key=lambda moment: moments[moment][0])
    parts["peak"], formulas["peak"] = max(0, moments[name][0]), moments[name][1]
    parts["overhead"] = GPU_OVERHEAD_BYTES if learner.num_gpus_per_learner else int(PROCESS_GIB * GIB)
    formulas["overhead"] = "context and workspaces" if learner.num_gpus_per_learner else "one process"
    if learner.weight_sync == "nccl":
        parts["transfer"] = transfer_bytes(size, b)
        formulas["transfer"] = "NCCL's two buffers for the engines, and the largest weight"
    return Memory(parts=parts, formulas=formulas)


def engine_memory(engine: EngineConfig, size: ModelSize, gpu_bytes: int) -> Memory:
    """One GPU of an engine, or its processes on CPU."""
    b, ranks = engine_bytes(engine), engine.tensor_parallel_size
    weights = b * size.num_parameters // ranks
    if engine.device == "gpu":
        overhead = GPU_OVERHEAD_BYTES
        kv_cache = max(0, int(engine.gpu_memory_utilization * gpu_bytes) - weights - overhead)
        kv_formula = f"what {engine.gpu_memory_utilization:g} of the GPU leaves"
    else:
        overhead = int(2 * PROCESS_GIB * GIB)  # the actor's and vLLM's core process
        kv_cache = engine.cpu_kv_cache_gib * GIB
        kv_formula = "engine.cpu_kv_cache_gib"
    parts = {"weights": weights, "KV cache": kv_cache, "overhead": overhead}
    formulas = {
        "weights": f"{b}P / {ranks}" if ranks > 1 else f"{b}P",
        "KV cache": f"{kv_formula}; layers · KV heads · key and value · {b} = "
        f"{size.kv_bytes_per_token(b, ranks):,} bytes a token",
        "overhead": "context and workspaces" if engine.device == "gpu" else "two processes",
    }
    if engine.weight_transfer == "nccl":
        parts["transfer"] = transfer_bytes(size, b)
        formulas["transfer"] = "NCCL's two buffers and the largest weight, outside gpu_memory_utilization"
    return Memory(parts=parts, formulas=formulas)


def scorer_memory(scorer: ScorerConfig, size: ModelSize) -> Memory:
    """The actor of a reward model as large as the policy."""
    b = 2 if scorer.num_gpus else 4
    activation = b * max(size.block_widths)
    return Memory(
        parts={
            "weights": 2 * b * (size.num_parameters + size.hidden - size.num_output_layer),
            "activations": scorer.micro_batch_tokens * activation,
            "overhead": GPU_OVERHEAD_BYTES if scorer.num_gpus else int(PROCESS_GIB * GIB),
        },
        formulas={
            "weights": f"2 · {b}(P − output layer + hidden): the old and the new model during a swap",
            "activations": f"micro_batch_tokens · {activation:,} bytes of one block",
            "overhead": "context and workspaces" if scorer.num_gpus else "one process",
        },
    )


def num_trained(learner: LearnerConfig, size: ModelSize) -> int:
    """T: the adapters' parameters, or all of the model."""
    scalar = learner.head == "scalar"
    if learner.lora:
        return num_adapter_parameters(learner.model, learner.lora) + scalar * size.hidden
    return size.num_parameters + (size.hidden - size.num_output_layer if scalar else 0)


def element_bytes(learner: LearnerConfig) -> int:
    """Bytes of a parameter in the learner."""
    return 2 if learner.in_bfloat16 else 4


def engine_bytes(engine: EngineConfig) -> int:
    """Bytes of a parameter and of a number in the KV cache, in the engine."""
    return 4 if engine.weights_dtype == "float32" else 2


def optimizer_bytes(learner: LearnerConfig) -> int:
    """For each trained parameter, Adam's two moments and a master copy, all in float32 (arXiv 1910.02054 §3). Without ZeRO,
    float32 weights, as adapters are, are their own master copy."""
    in_float32 = element_bytes(learner) == 4 or learner.lora is not None
    return 8 if in_float32 and learner.zero_stage == 0 else 12


def transfer_bytes(size: ModelSize, element_bytes: int) -> int:
    """A buffer is filled beyond its size by the weight that doesn't fit, of which the embedding is the largest."""
    return (
        min(2 * PACKED_BUFFER_BYTES, element_bytes * size.num_parameters)
        + element_bytes * size.vocab_size * size.hidden
    )


def _step_bytes(learner: LearnerConfig, trained: int, each: int) -> int:
    """What the optimizer makes of gradients of `trained` parameters of `each` bytes: one piece in float32. In ZeRO-2
    bfloat16 gradients are in one piece from the start. In ZeRO-3 it is a part at a time, then written back."""
    share = trained // learner.num_learners if learner.zero_stage else trained
    if learner.zero_stage == 3:
        return (4 + each) * min(share, SUBGROUP_ELEMENTS)
    return 0 if learner.zero_stage == 2 and each == 2 else 4 * share
