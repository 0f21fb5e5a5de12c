"""Checks of a model's folder that only read its files, without torch and transformers, in under a second."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from autotraj.errors import UserError
from learners.config import LearnerConfig

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""`owner/name`."""
LFS_POINTER = b"version https://git-lfs"


def check_policy(key: str, folder: Path, *, max_model_len: int) -> None:
    """Raises UserError, which begins with the setting `key`, for a folder whose model can't be sampled from."""
    config = check_weights(key, folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{key}: {folder} holds no tokenizer (tokenizer.json)")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read(key, folder / name)
    if (folder / "tokenizer.json").is_file() and "model" not in _read(key, folder / "tokenizer.json"):
        raise UserError(f"{key}: {folder / 'tokenizer.json'} has no `model`: it is no tokenizer; download it again")
    if not _has_chat_template(key, folder):
        raise UserError(
            f"{key}: the tokenizer of {folder} has no chat template, so that no question can be put to it: use an instruct "
            "model, or write its template to chat_template.jinja in that folder"
        )
    text = config.get("text_config")  # for a model that also reads images
    positions = (text if isinstance(text, dict) else config).get("max_position_embeddings")
    if isinstance(positions, int) and max_model_len > positions:
        raise UserError(
            f"engine.max_model_len = {max_model_len} exceeds the model's max_position_embeddings = {positions}"
        )


def check_heads(folder: Path, learner: LearnerConfig) -> None:
    """Raises UserError if the ranks of `learner.sequence_parallel_size` can't share the attention heads of this model."""
    config = _read("model", folder / "config.json")
    config = config.get("text_config") or config  # for a model that also reads images
    num_heads = config.get("num_attention_heads")
    if num_heads is None:  # under another name, which transformers knows, when the learner loads it
        return
    try:
        learner.check_heads(num_heads, config.get("num_key_value_heads") or num_heads)
    except ValueError as error:
        raise UserError(f"learner.{error}") from error


def check_weights(key: str, folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises UserError for a folder whose weights can't be loaded."""
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: {folder} holds adapters without their model; merge them first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…))"
        )
    if not folder.exists() and HUB_NAME.fullmatch(str(folder)):
        raise UserError(
            f"{key}: there is no folder {folder} here. If it is a model of the Hugging Face hub, download it with "
            f"`hf download {folder} --local-dir models/{folder.name}` and set {key}=models/{folder.name}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{key}: no Hugging Face checkpoint at {folder} (config.json is missing); download one, or use "
            "examples/tiny/base"
        )
    config = _read(key, folder / "config.json")
    paths = list(_weights(key, folder))
    if not paths:
        raise UserError(f"{key}: {folder} holds no *.safetensors weights")
    for path in paths:
        _check_file(key, path)
    return config


def _weights(key: str, folder: Path) -> Iterator[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        yield from sorted(folder.glob("*.safetensors"))
        return
    names = _read(key, index).get("weight_map")
    if not isinstance(names, dict):
        raise UserError(f"{key}: {index} has no weight_map; download the model again")
    for name in sorted({str(name) for name in names.values()}):
        if not (folder / name).is_file():
            raise UserError(f"{key}: {folder} lacks {name}, which {index.name} names; download the model again")
        yield folder / name


def _check_file(key: str, path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{key}: {path} is a pointer of git-lfs, not the weights; fetch them with `git lfs pull`")
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{key}: {path} is damaged or cut short ({error}); download the model again") from error


def _read(key: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path} can't be read: {error}; if it is damaged, download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{key}: {path} is no JSON object")
    return found


def _has_chat_template(key: str, folder: Path) -> bool:
    """Whether there is a chat template in one of the files in which transformers (5.19) looks for it."""
    if (folder / "chat_template.jinja").is_file() or list(folder.glob("additional_chat_templates/*.jinja")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(_read(key, path).get("chat_template"))
