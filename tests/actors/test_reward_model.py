"""The reward model served: equal to Hugging Face's own forward, in common batches, through swaps, with every failure named.

Most tests run the actor's class inside this process, on a real tiny checkpoint; one makes it a Ray actor.
"""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_qwen3 import build_model
from transformers import AutoModelForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from actors.config import ScorerConfig
from actors.reward_model.actor import RewardModelActor, RewardModelError, RewardModelTimeout
from models.packing import padded_batches

VOCAB = 300


def make_checkpoint(path: Path, seed: int, **settings: object) -> str:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=600,
        initializer_range=0.2,
        pad_token_id=0,
        **{"num_labels": 1, **settings},
    )
    Qwen3ForSequenceClassification(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [make_checkpoint(tmp_path_factory.mktemp(f"rm{seed}"), seed) for seed in range(2)]


def make_sequences(n: int, *, seed: int = 0, longest: int = 120) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, VOCAB, rng.integers(1, longest)).astype(np.int32) for _ in range(n)]


def reference(path: str, sequences: list[np.ndarray]) -> np.ndarray:
    """Hugging Face's own classifier, a sequence at a time, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return np.array([model(torch.tensor(ids[None].astype(np.int64))).logits[0, 0].item() for ids in sequences])


async def serving(path: str, **settings: object) -> RewardModelActor:
    actor = RewardModelActor(ScorerConfig(**settings))
    await actor.start(path, version=1)
    return actor


async def test_scores_are_hugging_faces(checkpoints: list[str]) -> None:
    actor = await serving(checkpoints[0], micro_batch_tokens=256)
    sequences = make_sequences(40)
    scores = await actor.score(sequences)
    assert (scores.version, scores.values.dtype, scores.values.shape) == (1, np.float32, (40,))
    np.testing.assert_allclose(scores.values, reference(checkpoints[0], sequences), atol=1e-5)
    assert np.ptp(scores.values) > 1e-2, "the model tells sequences apart"
    assert (await actor.score([])).values.shape == (0,)
    await actor.shutdown()


async def test_concurrent_calls_share_batches_and_keep_their_own_scores(checkpoints: list[str]) -> None:
    actor = await serving(checkpoints[0], micro_batch_tokens=2000)
    calls = [make_sequences(3, seed=seed, longest=20) for seed in range(30)]
    answers = await asyncio.gather(*(actor.score(call) for call in calls))
    stats = await actor.stats()
    assert (stats["calls"], stats["answered"], stats["sequences"], stats["queued_calls"]) == (30, 30, 90, 0)
    assert stats["batches"] <= 2, "90 sequences of under 20 tokens fit one batch of 2000"
    assert stats["tokens"] == sum(len(ids) for call in calls for ids in call)
    for call, answer in zip(calls, answers, strict=True):
        np.testing.assert_allclose(answer.values, reference(checkpoints[0], call), atol=1e-5)
    await actor.shutdown()


async def test_a_swap_drops_nothing_and_each_answer_names_its_model(checkpoints: list[str]) -> None:
    actor = await serving(checkpoints[0], micro_batch_tokens=512)
    sequences = make_sequences(24)
    expected = {version: reference(path, sequences) for version, path in enumerate(checkpoints, start=1)}
    versions: list[int] = []
    first, loaded = asyncio.Event(), asyncio.Event()

    async def caller() -> None:
        while not (loaded.is_set() and versions[-1] == 2):
            scores = await actor.score(sequences)
            np.testing.assert_allclose(scores.values, expected[scores.version], atol=1e-5)
            versions.append(scores.version)
            first.set()

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    await first.wait()
    await actor.load(checkpoints[1], version=2)
    loaded.set()
    await asyncio.gather(*callers)
    stats = await actor.stats()
    assert versions == sorted(versions)
    assert set(versions) == {1, 2}
    assert (stats["failed"], stats["timed_out"], stats["swaps"], stats["version"]) == (0, 0, 1, 2)
    await actor.load(checkpoints[0], version=1)  # a run that was set back
    again = await actor.score(sequences)
    assert again.version == 1
    np.testing.assert_allclose(again.values, expected[1], atol=1e-5)
    await actor.shutdown()


async def test_a_deadline_is_named_and_leaves_the_others_alone(checkpoints: list[str]) -> None:
    actor = await serving(checkpoints[0], micro_batch_tokens=600)
    long_call = asyncio.create_task(actor.score(make_sequences(60, longest=590)))
    await asyncio.sleep(0)
    with pytest.raises(
        RewardModelTimeout, match=r"waited 0\.01 s for RewardModelActor\(0\) to score 2 seq.*on one batch"
    ):
        await actor.score(make_sequences(2), deadline_s=0.01)
    assert len((await long_call).values) == 60
    stats = await actor.stats()
    assert (stats["timed_out"], stats["answered"], stats["sequences"]) == (1, 1, 60), "what nobody waits for isn't run"
    await actor.shutdown()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(0, np.int32), "sequence 1 has 0 tokens; the reward model reads 1 to 600"),
        (np.ones(601, np.int32), "sequence 1 has 601 tokens"),
        (np.array([5, VOCAB], np.int32), "sequence 1 holds token ids from 5 to 300.*vocabulary has 300"),
        (np.array([-1, 5], np.int32), "sequence 1 holds token ids from -1"),
    ],
)
async def test_a_sequence_that_cannot_be_read_fails_its_own_call_alone(
    checkpoints: list[str], ids: np.ndarray, message: str
) -> None:
    actor = await serving(checkpoints[0])
    good = make_sequences(3)
    bad, answer = await asyncio.gather(actor.score([good[0], ids]), actor.score(good), return_exceptions=True)
    assert isinstance(bad, ValueError)
    with pytest.raises(ValueError, match=message):
        raise bad
    assert not isinstance(answer, BaseException)
    np.testing.assert_allclose(answer.values, reference(checkpoints[0], good), atol=1e-5)
    await actor.shutdown()


async def test_what_is_no_reward_model_is_refused_and_the_present_one_goes_on(
    checkpoints: list[str], tmp_path: Path
) -> None:
    build_model(VOCAB, seed=0).save_pretrained(tmp_path / "policy")
    make_checkpoint(tmp_path / "three", 0, num_labels=3)
    actor = await serving(checkpoints[0])
    with pytest.raises(ValueError, match=r"not a trained reward model: it lacks score\.weight"):
        await actor.load(str(tmp_path / "policy"), version=2)
    with pytest.raises(ValueError, match="with 3 labels is not a reward model"):
        await actor.load(str(tmp_path / "three"), version=2)
    with pytest.raises(RewardModelError, match=r"RewardModelActor\(0\) could not load .*absent"):
        await actor.load(str(tmp_path / "absent"), version=2)
    assert (await actor.score(make_sequences(2))).version == 1
    await actor.shutdown()


async def test_a_checkpoint_that_loads_too_slowly_has_a_deadline(checkpoints: list[str]) -> None:
    actor = await serving(checkpoints[0])
    actor._config = ScorerConfig(load_timeout_s=1e-4)
    with pytest.raises(
        RewardModelTimeout, match=r"RewardModelActor\(0\) did not load .* within load_timeout_s = 0\.0001 s"
    ):
        await actor.load(checkpoints[1], version=2)
    assert (await actor.score(make_sequences(2))).version == 1
    await actor.shutdown()


async def test_a_broken_checkpoint_is_named_and_never_a_score(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 0)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(path)
    actor = await serving(path)
    with pytest.raises(RewardModelError, match=r"RewardModelActor\(0\), version 1, scored nan"):
        await actor.score(make_sequences(2))
    assert (await actor.stats())["failed"] == 1
    await actor.shutdown()


async def test_before_the_start_and_after_the_end(checkpoints: list[str]) -> None:
    actor = RewardModelActor(ScorerConfig(), index=3)
    with pytest.raises(RewardModelError, match=r"RewardModelActor\(3\) was asked before start"):
        await actor.score(make_sequences(1))
    await actor.start(checkpoints[0], version=1)
    waiting = asyncio.create_task(actor.score(make_sequences(60, longest=590)))
    await asyncio.sleep(0.05)
    await actor.shutdown()
    with pytest.raises(RewardModelError, match="was shut down"):
        await waiting
    with pytest.raises(RewardModelError, match="has stopped serving"):
        await actor.score(make_sequences(1))


@pytest.mark.ray
def test_as_a_ray_actor(checkpoints: list[str]) -> None:
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, object_store_memory=100 * 1024**2, log_to_driver=False
    )
    try:
        actor = ray.remote(RewardModelActor).options(num_cpus=1).remote(ScorerConfig())
        ray.get(actor.start.remote(checkpoints[0], 1), timeout=120)
        sequences = make_sequences(10)
        answers = [actor.score.remote(sequences[i : i + 5]) for i in (0, 5)]
        values = np.concatenate([scores.values for scores in ray.get(answers, timeout=60)])
        np.testing.assert_allclose(values, reference(checkpoints[0], sequences), atol=1e-5)
        with pytest.raises(RewardModelTimeout, match="to score 1 sequences"):
            ray.get(actor.score.remote(sequences[:1], 1e-6), timeout=60)
        ray.get(actor.load.remote(checkpoints[1], 7), timeout=60)
        assert ray.get(actor.score.remote(sequences), timeout=60).version == 7
        ray.get(actor.shutdown.remote(), timeout=60)
    finally:
        ray.shutdown()


def test_batches_by_hand() -> None:
    # Padded to 10: two rows are 20; then 6 and 5 pad to 12; 4 alone is what is left. 25 exceeds the budget alone.
    assert padded_batches([5, 10, 4, 25, 10, 6], 20) == [[3], [1, 4], [5, 0, 2]]
    assert padded_batches([5, 10, 4, 25, 10, 6], 12) == [[3], [1], [4], [5, 0], [2]]
    assert padded_batches([], 12) == []


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = padded_batches(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches)
