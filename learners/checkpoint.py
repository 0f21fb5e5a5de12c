"""Learner state on disk: DeepSpeed shards, convertible to other world sizes, and Hugging Face directories."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from learners import adapters, checkpoint_format
from learners.checkpoint_format import META_FILE
from learners.config import LearnerConfig
from storage.whole import replacing, write_whole

TAG = "shards"
UNIVERSAL_TAG = "universal"
ADAPTER_FOLDER = "adapter"
"""The folder of an exported model that holds the adapters by themselves."""
SETTINGS = ("betas", "eps", "weight_decay")
"""The settings of AdamW's parameter groups. The learning rate isn't among them, as it is set before every step."""


def save(engine: Any, path: Path, counters: Mapping[str, int], config: LearnerConfig) -> None:
    """Write below `path`, on all ranks. `learner.json` comes last and marks the checkpoint as complete.

    Frozen parameters are left out: with adapters they are those of the model from which training started.
    """
    if dist.get_rank() == 0:
        (path / META_FILE).unlink(missing_ok=True)
        shutil.rmtree(
            path / TAG, ignore_errors=True
        )  # shards of another world size would be taken for the present ones
    dist.barrier()
    engine.save_checkpoint(str(path), tag=TAG, exclude_frozen_parameters=_has_frozen(engine))
    dist.barrier()
    if dist.get_rank() == 0:
        meta = {
            "counters": dict(counters),
            "world_size": dist.get_world_size(),
            **checkpoint_format.kind(config),
        }
        write_whole(path / META_FILE, json.dumps(meta))
    dist.barrier()


def load(engine: Any, path: Path, config: LearnerConfig, *, leads: bool) -> dict[str, int]:
    """Restore weights and the optimizer's moments on all ranks; returns the counters that were saved with them. The
    optimizer's settings stay those of `config`.

    One of the ranks that share `path` leads.

    Shards that another number of ranks (or another ZeRO stage) wrote are converted by DeepSpeed's universal checkpoint.

    Raises:
        ValueError: there is no complete checkpoint, or this learner can't load it.
    """
    if not (path / META_FILE).is_file():
        raise ValueError(f"no complete learner checkpoint at {path}: {META_FILE} is missing")
    meta = json.loads((path / META_FILE).read_text())
    checkpoint_format.check(meta, config, str(path))
    configured = [{name: group[name] for name in SETTINGS} for group in engine.optimizer.param_groups]
    # Stage 0 replicates everything, so its single file fits any number of ranks.
    if meta["zero_stage"] == config.zero_stage and (
        meta["world_size"] == dist.get_world_size() or config.zero_stage == 0
    ):
        _load_tag(engine, path, TAG)
    else:
        if leads:
            _convert(path / TAG, path / UNIVERSAL_TAG)
        dist.barrier()
        engine._config.load_universal_checkpoint = True
        _load_tag(engine, path, UNIVERSAL_TAG)
        engine._config.load_universal_checkpoint = False
        dist.barrier()
        if leads:
            shutil.rmtree(path / UNIVERSAL_TAG)
            (path / f"latest_{UNIVERSAL_TAG}").unlink()
    for group, settings in zip(engine.optimizer.param_groups, configured, strict=True):
        group.update(settings)  # torch has replaced them by the saved ones
    counters: dict[str, int] = meta["counters"]
    return counters


def write_hf(
    lm: Any, weights: Mapping[str, Tensor], *, source: str, path: Path, trained_adapters: Mapping[str, Tensor]
) -> None:
    """Write a Hugging Face directory with `weights`. It appears at `path` only when it is complete.

    The adapters, if there are any, go into a folder of their own inside: in the directory itself, transformers would load
    them once more on top of the merged weights."""
    from transformers import AutoTokenizer

    with replacing(path) as partial:
        lm.save_pretrained(partial, state_dict=dict(weights))
        if (
            any((Path(source) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
            or not Path(source).exists()
        ):
            AutoTokenizer.from_pretrained(source).save_pretrained(partial)
        if trained_adapters:
            adapters.save(lm, dict(trained_adapters), partial / ADAPTER_FOLDER, base=source)


def _has_frozen(engine: Any) -> bool:
    return not all(p.requires_grad for p in engine.module.parameters())


def _load_tag(engine: Any, path: Path, tag: str) -> None:
    loaded, _ = engine.load_checkpoint(str(path), tag=tag, load_module_strict=not _has_frozen(engine))
    if loaded is None:
        raise ValueError(f"DeepSpeed could not load {path / tag}")


def _convert(shards: Path, universal: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(universal, ignore_errors=True)
    # In this process and without a pool: forked workers of a process with running threads may deadlock.
    with contextlib.redirect_stdout(io.StringIO()):
        ds_to_universal.main(
            Namespace(
                input_folder=str(shards),
                output_folder=str(universal),
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
