"""Training on DeepSpeed ZeRO: it takes a batch of samples and does one optimizer step, in one process or in many.

Without Ray, in a single process (like the script that makes the tiny base):

    engine = DeepSpeedEngine(LearnerConfig(model="path/to/model", lr=1e-3, micro_batch_tokens=16384))
    for samples in batches:                       # list[Sample]: ids, prompt_len, mask (True where the loss counts)
        metrics = engine.sft_step(samples)        # {"loss": …, "num_tokens": …, "grad_norm": …, "lr": …}
    engine.export_hf("path/to/result")

With several ranks, every process makes the same calls with the same samples. Each packs all and trains on its own share. Or
groups of ranks do (`sequence_parallel_size`): a group then has a share, and each rank a part of the tokens of all its
micro-batches.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from learners import adapters, checkpoint, published, schedule, skipped_steps
from learners.batching import (
    Batch,
    MiniBatch,
    Pair,
    Sample,
    ScoreBatch,
    check_pairs,
    collate,
    collate_pairs,
    collate_sequences,
    minibatches,
    pack,
)
from learners.config import LearnerConfig, LossConfig
from learners.losses.policy import Metrics, policy_loss
from learners.losses.supervised import bradley_terry, sft_loss
from learners.model import SequenceScores, TokenLogprobs, load_model, settle_layout
from learners.phases import PhaseClock
from learners.plain_weights import PlainWeight, adapter_weights, plain_weights, whole_tensors
from learners.zero import wrap
from models.sequence_parallel import WHOLE, Part, joined

B = TypeVar("B")  # a kind of micro-batch


class DeepSpeedEngine:
    """One rank of training.

    It joins the default process group if there is one, else it makes a group of one. Collective: all public methods
    except the properties must be called on every rank, in the same order.
    """

    def __init__(self, config: LearnerConfig, loss: LossConfig | None = None) -> None:
        self.config = config
        self.loss_config = loss or LossConfig()
        config.check_loss(self.loss_config)
        self.device = torch.device("cuda", torch.cuda.current_device()) if _on_gpu(config) else torch.device("cpu")
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if _on_gpu(config) else "gloo",
                store=dist.HashStore(),  # type: ignore[attr-defined]  # it is only missing from __all__
                rank=0,
                world_size=1,
                timeout=timedelta(seconds=config.step_timeout_s),
            )
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._part = _part(config)
        self.clock = PhaseClock(self.device)
        self.num_steps = 0  # batches trained on, which the learning rate's schedule counts
        self.policy_version = 0  # batches trained on by policy_step
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        model = load_model(config.model, config, self.device, self._part)
        if config.gradient_checkpointing:
            model.lm.gradient_checkpointing_enable({"use_reentrant": False})
        self._deepspeed = wrap(model, config, self.device)
        settle_layout(model, config)
        self._padded = not model.varlen
        # With adapters, the frozen reference is the same model without them.
        self._reference: Any = self._deepspeed if self.loss_config.kl_coef > 0 else None
        if self._reference is not None and config.lora is None:
            reference = load_model(config.model, config, self.device, self._part).eval().requires_grad_(False)
            sharded = config.zero_stage == 3
            self._reference = wrap(reference, config, self.device, frozen=True) if sharded else reference
            settle_layout(reference, config)

    # -- steps ---------------------------------------------------------------------------------------------------

    def policy_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One batch of policy optimization: up to `num_minibatches` optimizer steps. Returns metrics averaged over them.

        If optimizer steps were skipped (`skipped_steps`), the metrics say how many and why. If all were skipped, nothing has
        changed: not the weights, not the optimizer, not `policy_version`.

        Raises:
            ValueError: the learner has a scalar head or adapters with dropout, or no sample has a gradient.
        """
        self.config.check_call("policy_step")
        with_kl = self._reference is not None
        splits = minibatches(samples, self.config.num_minibatches, with_kl=with_kl)
        with self.clock("pack"):
            packed = [self._pack(split.samples) for split in splits]
        # The proximal policy is the one before the first update of this batch. With a single update it is the current
        # policy, so a second forward pass would only recompute the result of the first.
        with self.clock("logprobs"):
            proximal = [[self._logprobs(b) for b in batches] for batches in packed] if len(splits) > 1 else None
        found = []
        for i, (split, batches) in enumerate(zip(splits, packed, strict=True)):
            olds = iter(proximal[i]) if proximal else None
            # All this comes before the first backward pass: with adapters the reference shares parameters with the policy.
            with self.clock("logprobs"):
                refs = iter([self._logprobs(b, reference=True) for b in batches]) if with_kl else None

            def loss(
                batch: Batch,
                split: MiniBatch = split,
                olds: Iterator[Tensor] | None = olds,
                refs: Iterator[Tensor] | None = refs,
            ) -> tuple[Tensor, Metrics]:
                logprobs, entropies = self._forward(self._deepspeed, batch)
                return policy_loss(
                    logprobs,
                    next(olds) if olds else logprobs.detach(),
                    batch.behaviour_logprobs,
                    batch.advantages,
                    batch.mask,
                    self.loss_config,
                    num_tokens_global=split.num_tokens,
                    num_sequences_global=split.num_sequences,
                    num_tokens_passed=sum(s.num_loss_tokens for s in split.samples),
                    ref_logprobs=next(refs) if refs else None,
                    entropies=entropies,
                    on_policy=batch.on_policy,
                )

            found.append(self._optimize(batches, loss))
        metrics = skipped_steps.combined(found)
        if skipped_steps.was_applied(metrics):
            self.num_steps += 1
            self.policy_version += 1
            left_out = [split for split, step in zip(splits, found, strict=True) if not skipped_steps.was_applied(step)]
            if left_out:
                metrics[skipped_steps.SAMPLES] = float(sum(len(split.samples) for split in left_out))
        return metrics

    def sft_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimizer step on the mean next-token loss over all tokens with a True mask. It may be skipped, too."""
        self.config.check_call("sft_step")
        num_tokens = sum(s.num_loss_tokens for s in samples)

        def loss(batch: Batch) -> tuple[Tensor, Metrics]:
            return sft_loss(self._forward(self._deepspeed, batch)[0], batch.mask, num_tokens_global=num_tokens)

        return self._supervised(self._pack(samples), loss)

    def pair_step(self, pairs: Sequence[Pair]) -> dict[str, float]:
        """One optimizer step of Bradley–Terry on all pairs: metrics `loss`, `accuracy`, `margin_mean`. It may be skipped.

        Raises:
            ValueError: the learner has no scalar head; there are no pairs, or one has equal, empty or too long sides.
        """
        self.config.check_call("pair_step")
        check_pairs(pairs)

        def loss(batch: ScoreBatch) -> tuple[Tensor, Metrics]:
            assert batch.margins is not None
            chosen, rejected = self._scores(batch).chunk(2)
            real = len(batch.items)  # 0 for a filler, which has one pair
            return bradley_terry(chosen[:real], rejected[:real], batch.margins, num_pairs_global=len(pairs))

        return self._supervised(collate_pairs(pairs, *self._budget, **self._score_layout), loss)

    # -- reading -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scores(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """(N,) scores of whole sequences, in their order, on every rank.

        Raises:
            ValueError: the learner has no scalar head; there are no sequences, or one is empty or too long.
        """
        self.config.check_call("scores")
        found = torch.zeros(len(sequences), dtype=torch.float32, device=self.device)
        with self._scoring():
            for batch in collate_sequences(sequences, *self._budget, **self._score_layout):
                found[list(batch.items)] = self._scores(batch)[: len(batch.items)]
        self._sum(found)  # each score is 0 in all shares except one
        return np.asarray(found.cpu().numpy(), dtype=np.float32)

    def logprobs(self, token_ids: Sequence[int], *, temperature: float | None = None) -> NDArray[np.float32]:
        """log p(token_ids[i + 1] | token_ids[: i + 1]) for all i, (len − 1,). `temperature` None: that of training."""
        self.config.check_call("logprobs")
        ids = np.asarray(token_ids, dtype=np.int32)
        sample = Sample(ids=ids, prompt_len=1, mask=np.ones(len(ids) - 1, dtype=np.bool_))
        batch = collate((sample,), padded=self._padded, device=self.device, part=self._part)
        model = self._deepspeed.module
        if temperature is not None:
            model.temperature = temperature
        try:
            return np.asarray(self._logprobs(batch)[0].cpu().numpy(), dtype=np.float32)
        finally:
            model.temperature = self.config.temperature

    # -- weights and state ---------------------------------------------------------------------------------------

    @property
    def plain_weights(self) -> list[PlainWeight]:
        """The Hugging Face names with their (in ZeRO-3 partitioned) parameters, in model order; tied weights once. Shape and
        type of the parameter are those of the weight, also where an adapter is merged into it."""
        return plain_weights(self._module.lm, has_adapters=self.config.lora is not None)

    @property
    def to_publish(self) -> list[published.Published]:
        """Names, shapes and types of `published_weights`, in that order."""
        return published.published(self._module.lm, self.plain_weights)

    def published_weights(self) -> Iterator[tuple[str, Tensor]]:
        """`full_weights` with the names and forms of the checkpoint from which training started, as engines need them."""
        return published.as_in_checkpoint(self._module.lm, self.full_weights())

    def adapter_to_publish(self, dtype: torch.dtype) -> list[published.Published]:
        """Names and shapes of `published_adapter`, in that order."""
        return published.published_adapter(adapter_weights(self._module.lm), dtype)

    def published_adapter(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """`adapter_weights` as engines take them: in `dtype`, and with the scale alpha / rank in B."""
        assert self.config.lora is not None, "the configuration has adapters"
        scale = self.config.lora.alpha / self.config.lora.rank
        return published.as_engines_take_it(self.adapter_weights(), scale, dtype)

    def check_published(self) -> None:
        """Raises ValueError if engines that loaded the same checkpoint could not take `published_weights`."""
        published.check(self._module.lm, self.plain_weights, self.config.model)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that tell a user how this model is computed."""
        return self._module.notes

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors, with adapters merged into copies, on every rank; with ZeRO-3 gathered block by block. A
        tensor is valid only until the next one is requested. The iterator must be exhausted on all ranks."""
        return whole_tensors(self.plain_weights, partitioned=self.config.zero_stage == 3)

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All that is trained with adapters, in float32, by the names of peft's files; nothing without adapters. The rules
        of `full_weights` hold."""
        trained = [] if self.config.lora is None else adapter_weights(self._module.lm)
        return whole_tensors(trained, partitioned=self.config.zero_stage == 3)

    def export_hf(self, path: str | os.PathLike[str]) -> None:
        """Write a directory that plain `transformers` loads, with the tokenizer of the starting model: a causal language
        model or, with a scalar head, an AutoModelForSequenceClassification. Adapters are merged, and also written by
        themselves to the directory's `adapter`, which `peft` loads on top of the starting model."""
        weights, trained = self._copies(self.full_weights()), self._copies(self.adapter_weights())
        if self.rank == 0:
            checkpoint.write_hf(
                self._module.lm, weights, source=self.config.model, path=Path(path), trained_adapters=trained
            )
        dist.barrier()

    def _copies(self, tensors: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """On rank 0, all tensors in host memory. Other ranks only take part in gathering them."""
        copies = {}
        for name, tensor in tensors:
            if self.rank == 0:
                copies[name] = tensor.cpu().clone()
        return copies

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, optimizer and counters below `path`. A resumed run may have another number of ranks."""
        counters = {"num_steps": self.num_steps, "policy_version": self.policy_version}
        checkpoint.save(self._deepspeed, Path(path), counters, self.config)

    def load(self, path: str | os.PathLike[str], *, leads: bool | None = None) -> None:
        """Restore what `save` wrote, from any number of ranks. `leads`: whether this rank converts shards for all ranks that
        see the same `path`; None: all ranks see it."""
        leads = self.rank == 0 if leads is None else leads
        counters = checkpoint.load(self._deepspeed, Path(path), self.config, leads=leads)
        self.num_steps, self.policy_version = counters["num_steps"], counters["policy_version"]

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _module(self) -> TokenLogprobs | SequenceScores:
        module: TokenLogprobs | SequenceScores = self._deepspeed.module
        return module

    @property
    def _score_layout(self) -> dict[str, Any]:
        pad_token_id = self._module.lm.config.get_text_config().pad_token_id
        return {"pad_token_id": pad_token_id, "padded": self._padded, "device": self.device, "part": self._part}

    @property
    def _budget(self) -> tuple[int, int, int]:
        """Tokens of a micro-batch, and which share of them this rank works on, of how many."""
        sharing = self._part.count
        return self.config.micro_batch_capacity, self.rank // sharing, self.world_size // sharing

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """A context without the adapters' dropout."""
        self._deepspeed.eval()
        try:
            yield
        finally:
            self._deepspeed.train()

    def _pack(self, samples: Sequence[Sample]) -> list[Batch]:
        budget, share, num_shares = self._budget
        micro_batches = pack(samples, budget, num_shares, padded=self._padded)[share]
        return [collate(each, padded=self._padded, device=self.device, part=self._part) for each in micro_batches]

    def _forward(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """(B, T) logprobs and entropies of one micro-batch; 0 where the mask is False."""
        layout = batch.layout
        found = model(
            batch.source, batch.targets, layout.input_ids, layout.position_ids, layout.borders, layout.longest
        )
        logprobs, entropies = joined(torch.stack(found), batch.share, self._part.group)
        blank = torch.zeros_like(batch.mask, dtype=torch.float32)
        return blank.masked_scatter(batch.mask, logprobs), blank.masked_scatter(batch.mask, entropies.detach())

    @torch.no_grad()
    def _logprobs(self, batch: Batch, *, reference: bool = False) -> Tensor:
        off = reference and self.config.lora is not None
        with self._scoring(), adapters.switched_off(self._module.lm) if off else nullcontext():
            return self._forward(self._reference if reference else self._deepspeed, batch)[0]

    def _scores(self, batch: ScoreBatch) -> Tensor:
        """(B,) float32 scores, with gradient."""
        layout = batch.layout
        scores: Tensor = self._deepspeed(
            batch.source, layout.input_ids, layout.position_ids, layout.borders, layout.longest
        )
        return joined(scores, batch.share, self._part.group)

    def _supervised(self, batches: Sequence[B], batch_loss: Callable[[B], tuple[Tensor, Metrics]]) -> dict[str, float]:
        metrics = self._optimize(batches, batch_loss)
        self.num_steps += skipped_steps.was_applied(metrics)
        return metrics

    def _optimize(self, batches: Sequence[B], batch_loss: Callable[[B], tuple[Tensor, Metrics]]) -> dict[str, float]:
        """Accumulate the gradients of all micro-batches and take one optimizer step.

        If the loss or the gradient norm isn't finite, no rank takes a step: DeepSpeed compares the norm over all ranks and
        drops the gradients, and the metrics are those of `skipped_steps.skipped`.
        """
        lr = schedule.learning_rate(self.num_steps, self.config)
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        sums: Metrics = {}
        with self.clock("gradients"):
            for batch in batches:
                loss, metrics = batch_loss(batch)
                # NaN if a loss isn't finite, since gradients may still be finite then. The norm tells all ranks.
                poison = 1 + 0 * loss.detach()
                # Losses are divided by global counts, so gradients must add up over ranks, but DeepSpeed averages them.
                # Ranks that share a micro-batch have the same loss, each with the gradient of its own tokens (see `joined`).
                self._deepspeed.backward(loss * (self.world_size * poison))
                for name, value in metrics.items():
                    old = sums.get(name)
                    sums[name] = (
                        value if old is None else (torch.maximum if name.endswith("_max") else torch.add)(old, value)
                    )
        with self.clock("optimizer"):
            self._deepspeed.step()
        found = self._reduce(sums)
        if not self._deepspeed.was_step_applied():
            return skipped_steps.skipped("nonfinite_gradient" if math.isfinite(found["loss"]) else "nonfinite_loss")
        norm = self._deepspeed.get_global_grad_norm()
        return found | {"lr": lr} | ({} if norm is None else {"grad_norm": float(norm)})

    def _sum(self, values: Tensor) -> None:
        """Add `values` up over all ranks, in place, but once for ranks that share micro-batches, which have the same."""
        if self._part.index:
            values.zero_()
        dist.all_reduce(values)

    def _reduce(self, metrics: Metrics) -> dict[str, float]:
        result: dict[str, float] = {}
        for op, chosen in (
            (dist.ReduceOp.SUM, [n for n in metrics if not n.endswith("_max")]),
            (dist.ReduceOp.MAX, [n for n in metrics if n.endswith("_max")]),
        ):
            if chosen:
                values = torch.stack([metrics[n].float() for n in chosen])
                if op == dist.ReduceOp.SUM:
                    self._sum(values)
                else:
                    dist.all_reduce(values, op=op)
                result |= dict(zip(chosen, values.tolist(), strict=True))
        return result


def _part(config: LearnerConfig) -> Part:
    """What this rank has of each packed row. Neighbours in rank share one. Collective."""
    if config.sequence_parallel_size == 1:
        return WHOLE
    timeout = timedelta(seconds=config.step_timeout_s)
    group, _ = dist.new_subgroups(config.sequence_parallel_size, timeout=timeout)  # type: ignore[no-untyped-call]
    return Part(index=group.rank(), count=group.size(), group=group)


def _on_gpu(config: LearnerConfig) -> bool:
    return config.num_gpus_per_learner > 0
