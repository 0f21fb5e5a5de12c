"""Training on DeepSpeed ZeRO: a batch of samples in, one optimizer step done. Runs alike in one process or in many.

Without Ray, in a single process (as the script that makes the tiny base does):

    engine = DeepSpeedEngine(LearnerConfig(model="path/to/model", lr=1e-3, micro_batch_tokens=16384))
    for samples in batches:                       # list[Sample]: ids, prompt_len, mask (True where the loss counts)
        metrics = engine.sft_step(samples)        # {"loss": …, "grad_norm": …, "lr": …}
    engine.export_hf("path/to/result")

With several ranks every process makes the same calls with the same samples: each packs all and trains on its own share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from learners import checkpoint, schedule
from learners.batching import Batch, MicroBatch, Sample, collate, minibatches, pack
from learners.config import LearnerConfig, LossConfig
from learners.losses import Metrics, policy_loss, sft_loss
from learners.model import LM_PREFIX, TokenLogprobs, load_model, training_dtype

GATHER_BYTES = 256 << 20  # ZeRO-3 parameters are gathered for reading in blocks of about this size

_BatchLoss = Callable[[Tensor, Tensor, Batch], tuple[Tensor, Metrics]]


class DeepSpeedEngine:
    """One rank of data-parallel training.

    Joins the default process group if there is one, else makes a group of one. Collective: all public methods but the
    properties must be called on every rank, in the same order.
    """

    def __init__(self, config: LearnerConfig, loss: LossConfig | None = None) -> None:
        self.config = config
        self.loss_config = loss or LossConfig()
        self.device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu(config) else torch.device("cpu")
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if _on_gpu(config) else "gloo",
                store=dist.HashStore(),  # type: ignore[attr-defined]  # missing from __all__ only
                rank=0,
                world_size=1,
                timeout=timedelta(seconds=config.step_timeout_s),
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.num_steps = 0  # optimizer steps
        self.policy_version = 0  # batches trained on by policy_step
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        model = load_model(config.model, config, self.device)
        self._padded = not model.varlen
        if config.gradient_checkpointing:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self._deepspeed = self._wrap(model)
        self._reference: Any = None
        if self.loss_config.kl_coef > 0:
            reference = load_model(config.model, config, self.device).eval().requires_grad_(False)
            self._reference = self._wrap(reference, frozen=True) if config.zero_stage == 3 else reference

    # -- steps ---------------------------------------------------------------------------------------------------

    def policy_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One batch of policy optimization: `num_minibatches` optimizer steps. Returns metrics averaged over them."""
        splits = minibatches(samples, self.config.num_minibatches)
        packed = [self._pack(split) for split in splits]
        # The proximal policy is the one before the first update of this batch. With a single update that is the
        # current one, so a second forward pass would only recompute what the first returns.
        proximal = [[self._logprobs(b) for b in batches] for batches in packed] if len(splits) > 1 else None
        totals: dict[str, float] = {}
        for i, (split, batches) in enumerate(zip(splits, packed, strict=True)):
            num_tokens, num_sequences = sum(s.num_loss_tokens for s in split), len(split)
            olds = iter(proximal[i]) if proximal else None

            def loss(
                logprobs: Tensor,
                entropies: Tensor,
                batch: Batch,
                olds: Iterator[Tensor] | None = olds,
                num_tokens: int = num_tokens,
                num_sequences: int = num_sequences,
            ) -> tuple[Tensor, Metrics]:
                return policy_loss(
                    logprobs,
                    next(olds) if olds else logprobs.detach(),
                    batch.behaviour_logprobs,
                    batch.advantages,
                    batch.mask,
                    self.loss_config,
                    num_tokens_global=num_tokens,
                    num_sequences_global=num_sequences,
                    ref_logprobs=self._logprobs(batch, reference=True) if self._reference is not None else None,
                    entropies=entropies,
                )

            for name, value in self._optimize(batches, loss).items():
                combined = max(totals.get(name, value), value) if name.endswith("_max") else value / len(splits)
                totals[name] = combined if name.endswith("_max") else totals.get(name, 0.0) + combined
        self.policy_version += 1
        return totals

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step on the mean next-token loss over all tokens with a True mask."""
        num_tokens = sum(s.num_loss_tokens for s in samples)
        return self._optimize(
            self._pack(samples), lambda logprobs, _, batch: sft_loss(logprobs, batch.mask, num_tokens_global=num_tokens)
        )

    def logprobs(self, token_ids: Sequence[int], *, temperature: float | None = None) -> NDArray[np.float32]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) for all i, (len − 1,); `temperature` None: training's."""
        ids = np.asarray(token_ids, dtype=np.int32)
        sample = Sample(ids=ids, prompt_len=1, mask=np.ones(len(ids) - 1, dtype=np.bool_))
        batch = collate((sample,), padded=self._padded, device=self.device)
        model = self._deepspeed.module
        if temperature is not None:
            model.temperature = temperature
        try:
            return np.asarray(self._logprobs(batch)[0].cpu().numpy(), dtype=np.float32)
        finally:
            model.temperature = self.config.temperature

    # -- weights and state ---------------------------------------------------------------------------------------

    @property
    def parameters(self) -> list[tuple[str, Any]]:
        """Hugging Face names and (with ZeRO-3: partitioned) parameters, in model order; tied weights once."""
        return [(n.removeprefix(LM_PREFIX), p) for n, p in self._deepspeed.module.named_parameters()]

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, on every rank; with ZeRO-3 gathered block by block. A tensor is only valid until the
        next one is asked for. The iterator must be exhausted on all ranks."""
        if self.config.zero_stage < 3:
            for name, parameter in self.parameters:
                yield name, parameter.detach()
            return
        import deepspeed

        block: list[tuple[str, Any]] = []
        size = 0
        for i, (name, parameter) in enumerate(everything := self.parameters):
            block.append((name, parameter))
            size += parameter.ds_numel * parameter.element_size()
            if size >= GATHER_BYTES or i == len(everything) - 1:
                with deepspeed.zero.GatheredParameters([p for _, p in block]):
                    for gathered_name, gathered in block:
                        yield gathered_name, gathered.detach()
                block, size = [], 0

    def export_hf(self, path: str | os.PathLike[str]) -> None:
        """Write a directory that plain `transformers` loads, with the tokenizer of the model we started from."""
        weights = {}
        for name, tensor in self.full_weights():
            if self.rank == 0:
                weights[name] = tensor.cpu().clone()
        if self.rank == 0:
            checkpoint.write_hf(self._module.lm, weights, source=self.config.model, path=Path(path))
        dist.barrier()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, optimizer and counters below `path`; a resumed run may have another number of ranks."""
        counters = {"num_steps": self.num_steps, "policy_version": self.policy_version}
        checkpoint.save(self._deepspeed, Path(path), counters, zero_stage=self.config.zero_stage)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore what `save` wrote, whatever the number of ranks then."""
        counters = checkpoint.load(self._deepspeed, Path(path), zero_stage=self.config.zero_stage)
        self.num_steps, self.policy_version = counters["num_steps"], counters["policy_version"]

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _module(self) -> TokenLogprobs:
        module: TokenLogprobs = self._deepspeed.module
        return module

    def _wrap(self, model: TokenLogprobs, *, frozen: bool = False) -> Any:
        # Read when DeepSpeed is imported. Every rank sees exactly one device.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", "0")
        import deepspeed

        # On CPU this op would be compiled (102 s, and a failure without a compiler); gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        bf16 = training_dtype(self.config, self.device) == torch.bfloat16
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            # We own the accumulation: backward() per micro-batch, however many there are, then one step().
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": self.config.max_grad_norm,
            "bf16": {"enabled": bf16},
            "zero_optimization": {
                "stage": self.config.zero_stage,
                "overlap_comm": False,
                "contiguous_gradients": True,
            },
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
            "wall_clock_breakdown": False,
        }
        if bf16 and self.config.zero_stage > 0:
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        if frozen:
            engine, *_ = deepspeed.initialize(model=model, config=settings)
            return engine
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        plain = [p for p in model.parameters() if p.dim() < 2]  # norms and biases are not decayed
        optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
            if self.config.weight_decay > 0
            else list(model.parameters()),
            lr=self.config.lr,
            betas=self.config.betas,
            eps=self.config.eps,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        if self.config.zero_stage == 0 and not bf16:
            # In this mode alone DeepSpeed 0.19 clips without keeping the norm that it has computed.
            def clip_and_keep_norm() -> None:
                engine._global_grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)

            engine.clip_fp32_gradients = clip_and_keep_norm
        return engine

    def _pack(self, samples: Sequence[Sample]) -> list[Batch]:
        shares = pack(samples, self.config.micro_batch_tokens, self.world_size, padded=self._padded)
        return [self._collate(micro_batch) for micro_batch in shares[self.rank]]

    def _collate(self, micro_batch: MicroBatch) -> Batch:
        return collate(micro_batch, padded=self._padded, device=self.device)

    def _forward(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) logprobs and entropies of one micro-batch; 0 where the mask is False."""
        logprobs, entropies = model(
            batch.input_ids, batch.position_ids, batch.source, batch.targets, batch.borders, batch.longest
        )
        blank = torch.zeros_like(batch.mask, dtype=torch.float32)
        return blank.masked_scatter(batch.mask, logprobs), blank.masked_scatter(batch.mask, entropies)

    @torch.no_grad()
    def _logprobs(self, batch: Batch, *, reference: bool = False) -> Tensor:
        return self._forward(self._reference if reference else self._deepspeed, batch)[0]

    def _optimize(self, batches: Sequence[Batch], batch_loss: _BatchLoss) -> dict[str, float]:
        """Accumulate the gradients of all micro-batches and take one optimizer step."""
        lr = schedule.learning_rate(self.num_steps, self.config)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        sums: Metrics = {}
        for batch in batches:
            loss, metrics = batch_loss(*self._forward(self._deepspeed, batch), batch)
            # Losses are already divided by global counts, so gradients must add up over ranks; DeepSpeed averages them.
            self._deepspeed.backward(loss * self.world_size)
            for name, value in metrics.items():
                old = sums.get(name)
                sums[name] = (
                    value if old is None else (torch.maximum if name.endswith("_max") else torch.add)(old, value)
                )
        self._deepspeed.step()
        self.num_steps += 1
        norm = self._deepspeed.get_global_grad_norm()
        return self._reduce(sums) | {"lr": lr} | ({} if norm is None else {"grad_norm": float(norm)})

    def _reduce(self, metrics: Metrics) -> dict[str, float]:
        result: dict[str, float] = {}
        for op, chosen in (
            (dist.ReduceOp.SUM, [n for n in metrics if not n.endswith("_max")]),
            (dist.ReduceOp.MAX, [n for n in metrics if n.endswith("_max")]),
        ):
            if chosen:
                values = torch.stack([metrics[n].float() for n in chosen])
                dist.all_reduce(values, op=op)
                result |= dict(zip(chosen, values.tolist(), strict=True))
        return result


def _on_gpu(config: LearnerConfig) -> bool:
    return config.num_gpus_per_learner > 0
