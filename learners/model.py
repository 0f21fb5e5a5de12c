"""The model in the form that the losses use: from token ids to logprobs of the sampled tokens, or to a score a sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig

from learners import adapters
from learners.config import LearnerConfig
from learners.zero import gather_with, partitioned_load
from models import attention, scalar, separation
from models.forward import hidden_at
from models.load import load
from models.sequence_parallel import WHOLE, Part

logger = logging.getLogger(__name__)

# Models that change the logits after the output layer, which TokenLogprobs would leave out.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def load_model(
    path: str, config: LearnerConfig, device: torch.device, part: Part = WHOLE
) -> TokenLogprobs | SequenceScores:
    """A model with `config.head` from a directory, in the training dtype, without dropout of its own.

    New parts (a scalar head on a language model, adapters) are initialised from torch's global generator. With ZeRO-3 each
    rank gets its partition of each parameter. `settle_layout` must follow before the first batch. `part`: what this rank has
    of each packed row.

    Raises:
        ValueError: the weights are quantized, the model post-processes its logits, it has no padding token (scalar head),
            `config.attention`, `config.sequence_parallel_size` or `config.lora.targets` aren't available for it here.
    """
    hf_config = AutoConfig.from_pretrained(path)
    if quantized := getattr(hf_config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{path}: its weights are quantized ({method}), and such weights can't be trained; use a copy in bfloat16"
        )
    for name in _LOGIT_TRANSFORMS:
        if config.head == "lm" and getattr(hf_config, name, None) not in (None, 1.0):
            raise ValueError(f"{path}: models with {name} aren't supported; their logprobs would be wrong")
    for name, value in hf_config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or "pdrop" in name):
            setattr(hf_config, name, 0.0)  # learner and engine must compute logprobs of the same function
    varlen = _use_varlen(config, hf_config.get_text_config(), device)
    config.check_heads(*_heads(hf_config.get_text_config()))
    attention.register()
    if config.head == "scalar":
        hf_config.num_labels = 1
    with partitioned_load(config, device):
        loaded = load(path, head=config.head, dtype=_dtype(config), device=device, config=hf_config)
    lm = loaded.model
    notes = []
    if loaded.plain:
        if config.attention != "auto":
            raise ValueError(
                f"{path}: attention={config.attention!r} isn't available for {type(lm).__name__}: {loaded.plain}; set 'auto'"
            )
        _check_sharing(config, f"{type(lm).__name__} isn't packed: {loaded.plain}")
        varlen = False
        notes.append(
            f"{path}: attention is computed by transformers' own code, which takes time and memory for each pair of tokens, "
            f"as this is a {type(lm).__name__}: {loaded.plain}"
        )
    elif not varlen and config.attention == "auto" and device.type == "cuda":
        notes.append(
            f"{path}: sequences are padded, not packed, as this GPU has no such kernel for this model and dtype"
        )
    if config.lora is not None:
        adapters.inject(lm, config.lora)
    model: TokenLogprobs | SequenceScores
    if config.head == "scalar":
        model = SequenceScores(lm, varlen=varlen, part=part)
    else:
        chunk_bytes = config.logit_chunk_mib << 20
        model = TokenLogprobs(lm, varlen=varlen, part=part, temperature=config.temperature, chunk_bytes=chunk_bytes)
        if config.zero_stage == 3:
            output = lm.get_output_embeddings()
            if any(output.children()):
                raise ValueError(
                    "lora.targets: the output layer can't have an adapter with zero_stage=3, since ranks would gather it in "
                    "unequal numbers of blocks; leave it out of the targets, or set zero_stage=2"
                )
            gather_with(model.blocks, output)
    model.notes = tuple(notes)
    for note in notes:
        logger.warning(note)
    # Hugging Face returns models in evaluation mode, in which they ignore gradient checkpointing.
    return model.to(device).train()


def settle_layout(model: TokenLogprobs | SequenceScores, config: LearnerConfig) -> None:
    """Try on a few tokens whether `model` keeps packed or padded sequences separate; if not packed, have it take padded
    ones. With ZeRO-3 this runs after `zero.wrap`, since before it no layer gathers its parameters. Collective.

    Raises:
        ValueError: it doesn't keep the sequences of a batch separate, or not those of a packed one, which
            `config.attention` asks for, or ranks can't share its rows, for which `config.sequence_parallel_size` asks.
    """
    lm, path = model.lm, config.model
    if model.varlen and (fault := _packing_fault(lm, path, config)):
        _check_sharing(config, f"{type(lm).__name__} can't be packed: {fault}")
        model.varlen = False
        note = f"{path}: sequences are padded, not packed, as {type(lm).__name__} doesn't keep them apart: {fault}"
        model.notes += (note,)
        logger.warning(note)
    if not model.varlen and (fault := separation.fault(lm, packed=False)):
        raise ValueError(f"{path}: {type(lm).__name__} can't be trained on batches of padded sequences: {fault}")
    if model.part.count > 1 and (fault := separation.sharing_fault(lm, model.part)):
        _check_sharing(config, f"several ranks can't share a row of {type(lm).__name__}: {fault}")


def _check_sharing(config: LearnerConfig, fault: str) -> None:
    """Raise ValueError for `fault` if micro-batches are shared by several ranks."""
    if config.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence_parallel_size={config.sequence_parallel_size} must be 1 for {config.model}: {fault}"
        )


def _heads(hf_config: Any) -> tuple[int, int]:
    """Numbers of attention heads, and of those of keys and values."""
    return hf_config.num_attention_heads, getattr(
        hf_config, "num_key_value_heads", None
    ) or hf_config.num_attention_heads


def _dtype(config: LearnerConfig) -> torch.dtype:
    return torch.bfloat16 if config.in_bfloat16 else torch.float32


def _use_varlen(config: LearnerConfig, hf_config: Any, device: torch.device) -> bool:
    """Whether `config.attention` means the variable-length kernel here; `auto` means it where the hardware has it, or where
    ranks share micro-batches."""
    if config.attention == "sdpa":
        return False
    if device.type == "cpu":
        return config.attention == "varlen" or config.sequence_parallel_size > 1
    num_heads, num_kv_heads = _heads(hf_config)
    available = attention.is_available(
        device,
        _dtype(config),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // num_heads,
        windows={None, getattr(hf_config, "sliding_window", None)},
    )
    if config.attention == "varlen" and not available:
        raise ValueError("attention='varlen': this GPU has no such kernel for this model and dtype; set 'auto'")
    if not available:
        _check_sharing(config, "this GPU has no kernel for packed sequences of this model and dtype")
    return available


def _packing_fault(lm: Any, path: str, config: LearnerConfig) -> str | None:
    """Why `lm` doesn't keep packed sequences separate; None: it does, and it then keeps that attention.

    Layers with a state of their own (linear attention, Mamba, convolutions) often carry it over the borders."""
    fault = separation.fault(lm, packed=True)
    if fault is not None and config.attention == "varlen":
        raise ValueError(f"{path}: attention='varlen' would mix up packed sequences ({fault}); set 'auto' or 'sdpa'")
    return fault


class _Headless(nn.Module):
    """The body of a Hugging Face model; subclasses add a head. `varlen`: batches must be packed, otherwise padded. `part`:
    what this rank has of each packed row. `notes`: what a user should know about how the model is computed."""

    notes: tuple[str, ...] = ()

    def __init__(self, lm: nn.Module, *, varlen: bool, part: Part = WHOLE) -> None:
        super().__init__()
        self.part = part
        self.lm: Any = lm
        self.varlen = varlen

    def check_layout(self, borders: Tensor | None) -> None:
        assert (borders is not None) == self.varlen


class SequenceScores(_Headless):
    """Wraps a model for sequence classification with one label. It gives a float32 score for each sequence."""

    def forward(
        self, source: Tensor, input_ids: Tensor, position_ids: Tensor, borders: Tensor | None, longest: int
    ) -> Tensor:
        """(B,) float32 scores. Arguments are those of `batching.ScoreBatch` and its layout."""
        self.check_layout(borders)
        return scalar.scores(self.lm, source, input_ids, position_ids, borders, longest, self.part.group)


class TokenLogprobs(_Headless):
    """Wraps a causal language model so that logits are computed only where they are needed, one block at a time."""

    def __init__(
        self, lm: nn.Module, *, varlen: bool, temperature: float, chunk_bytes: int, part: Part = WHOLE
    ) -> None:
        super().__init__(lm, varlen=varlen, part=part)
        self.temperature = temperature
        self.chunk_bytes = chunk_bytes
        self.blocks = _Blocks()

    def forward(
        self,
        source: Tensor,
        targets: Tensor,
        input_ids: Tensor,
        position_ids: Tensor,
        borders: Tensor | None,
        longest: int,
    ) -> tuple[Tensor, Tensor]:
        """Log p(targets[i]) at position source[i] of the flattened (B·L) batch, and that distribution's entropy.

        Both are (N,) float32; the entropy carries no gradient. Arguments are those of `batching.Batch` and its layout.
        """
        self.check_layout(borders)
        hidden = hidden_at(self.lm, source, input_ids, position_ids, borders, longest, self.part.group)
        num_rows = max(self.chunk_bytes // (4 * self.lm.config.get_text_config().vocab_size), 1)
        # Not as a module, which ZeRO-3 would gather anew for every block.
        project = self.lm.get_output_embeddings().forward
        found: tuple[Tensor, Tensor] = self.blocks(
            hidden, targets, project=project, num_rows=num_rows, temperature=self.temperature
        )
        return found


class _Blocks(nn.Module):
    """From hidden states to logprobs, one block of rows at a time.

    It is a module because ZeRO-3 gathers weights for a pass through a module, on all ranks together. Ranks have different
    numbers of blocks, but each has one pass through this module for a micro-batch. So the output layer is gathered here
    (`zero.gather_with`), once for all blocks.
    """

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor,
        *,
        project: Callable[[Tensor], Tensor],
        num_rows: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs of `targets` (N,) under the logits `project(hidden)`, and entropies, (N,) each. `hidden`: (N, hidden)."""
        if len(targets) <= num_rows:
            return _from_hidden(hidden, targets, project, temperature)
        # Blocks are recomputed in the backward pass, since keeping all of them would use the memory that blocks save.
        blocks = [
            checkpoint(_from_hidden, h, t, project, temperature, use_reentrant=False)
            if torch.is_grad_enabled()
            else _from_hidden(h, t, project, temperature)
            for h, t in zip(torch.split(hidden, num_rows), torch.split(targets, num_rows), strict=True)
        ]
        return torch.cat([b[0] for b in blocks]), torch.cat([b[1] for b in blocks])


def _from_hidden(
    hidden: Tensor, targets: Tensor, project: Callable[[Tensor], Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    logits = project(hidden).float()
    if temperature != 1.0:
        logits = logits / temperature
    all_logprobs = F.log_softmax(logits, dim=-1)
    with torch.no_grad():
        entropies = -all_logprobs.exp().mul_(all_logprobs).sum(-1)
    return all_logprobs.gather(-1, targets[:, None])[:, 0], entropies
