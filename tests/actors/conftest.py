"""The tiny Qwen3 on disk, for engines and actors to load."""

from pathlib import Path

import pytest
from tiny_qwen3 import build_model, build_tokenizer


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    build_model(len(tokenizer), seed=0).save_pretrained(path)
    return path
