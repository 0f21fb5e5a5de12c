"""A tiny random Qwen3, samples for it, and a process group of one for engines inside the test process."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from learners.batching import Pair, Sample

VOCAB = 330
PAD = 329


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=False,
        max_position_embeddings=512,
        pad_token_id=PAD,
    )
    path = tmp_path_factory.mktemp("tiny_qwen3")
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Eleven of unequal lengths, with tool results (mask False) in the middle of some."""
    rng = np.random.default_rng(1)
    made = []
    for i in range(11):
        prompt_len, response = int(rng.integers(3, 12)), int(rng.integers(5, 40))
        mask = np.ones(response, dtype=np.bool_)
        if i % 2:
            mask[response // 3 : response // 2 + 1] = False
        made.append(
            Sample(
                ids=rng.integers(0, VOCAB, prompt_len + response).astype(np.int32),
                prompt_len=prompt_len,
                mask=mask,
                behaviour_logprobs=np.where(mask, rng.normal(-5.8, 0.3, response), 0.0).astype(np.float32),
                advantage=float(rng.normal()),
            )
        )
    return made


@pytest.fixture(scope="session")
def pairs() -> list[Pair]:
    """Seven, with a common prompt and sides of unequal lengths, some with a margin; the chosen side has more of token 7."""
    rng = np.random.default_rng(2)
    made = []
    for i in range(7):
        prompt = rng.integers(0, PAD, int(rng.integers(3, 10)))
        sides = [rng.integers(0, PAD, int(rng.integers(4, 30))) for _ in range(2)]
        sides[0][::2] = 7
        chosen, rejected = (np.concatenate([prompt, side]).astype(np.int32) for side in sides)
        made.append(Pair(chosen=chosen, rejected=rejected, margin=0.5 * (i % 3)))
    return made


@pytest.fixture(scope="session")
def single_rank() -> Iterator[None]:
    """Engines in this process join a group of one; nothing of it is left behind for other tests."""
    import torch
    import torch.distributed as dist

    before = dict(os.environ)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(before)
