from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learners.batching import (
    MicroBatch,
    Pair,
    Sample,
    check_pairs,
    collate,
    collate_pairs,
    collate_sequences,
    minibatches,
    pack,
)


def sample(length: int, prompt_len: int = 1) -> Sample:
    return Sample(
        ids=np.arange(100, 100 + length, dtype=np.int32),
        prompt_len=prompt_len,
        mask=np.ones(length - prompt_len, dtype=np.bool_),
    )


def cost(batch: MicroBatch, padded: bool) -> int:
    return len(batch) * max(map(len, batch)) if padded else sum(map(len, batch))


@settings(max_examples=200)
@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    budget=st.integers(60, 300),
    world_size=st.integers(1, 5),
    padded=st.booleans(),
)
def test_packing_keeps_its_promises(lengths: list[int], budget: int, world_size: int, padded: bool) -> None:
    samples = [sample(n) for n in lengths]
    ranks = pack(samples, budget, world_size, padded=padded)
    assert len(ranks) == world_size
    assert len({len(r) for r in ranks}) == 1, "ZeRO's collectives need as many micro-batches on every rank"
    assert len(ranks[0]) >= 1
    batches = [b for r in ranks for b in r]
    assert all(len(b) > 0 and cost(b, padded) <= budget for b in batches)
    originals = {id(s) for s in samples}
    placed = Counter(id(s) for b in batches for s in b if id(s) in originals)
    assert placed == Counter(dict.fromkeys(originals, 1)), "each sample exactly once"
    fillers = [s for b in batches for s in b if id(s) not in originals]
    assert all(s.num_loss_tokens == 0 for s in fillers)
    assert sum(s.num_loss_tokens for b in batches for s in b) == sum(n - 1 for n in lengths)
    loads = [sum(len(s) for b in r for s in b if id(s) in originals) for r in ranks]
    assert max(loads) - min(loads) <= max(lengths)


def test_first_fit_decreasing_fills_bins() -> None:
    """12 + 8 and 9 + 6 + 5: two full bins of 20, where filling up in order of arrival would take three."""
    (bins,) = pack([sample(n) for n in (5, 6, 8, 9, 12)], 20, padded=False)
    assert [[len(s) for s in b] for b in bins] == [[12, 8], [9, 6, 5]]


def test_padded_batches_join_neighbours_in_length() -> None:
    (bins,) = pack([sample(n) for n in (3, 10, 9, 2, 10, 3)], 30)
    assert [[len(s) for s in b] for b in bins] == [[10, 10, 9], [3, 3, 2]]


def test_too_long_a_sample_names_the_setting() -> None:
    with pytest.raises(ValueError, match="a micro-batch of 8; raise micro_batch_tokens"):
        pack([sample(9)], 8)
    with pytest.raises(ValueError, match="no samples"):
        pack([], 8)


def test_minibatches_spread_siblings() -> None:
    """Two groups of four siblings, two minibatches: each gets two of both."""
    samples = [replace(sample(5), advantage=1.0) for _ in range(8)]
    first, second = minibatches(samples, 2, with_kl=False)
    assert [samples.index(s) for s in first.samples] == [0, 2, 4, 6]
    assert [samples.index(s) for s in second.samples] == [1, 3, 5, 7]
    assert (first.num_tokens, first.num_sequences) == (16, 4)


def test_minibatches_of_what_has_a_gradient_by_hand() -> None:
    """Three samples of 4, 2 and 2 loss tokens have an advantage, five of 2 tokens don't: 18 tokens in 8 sequences.

    Eight minibatches can't be made of three, so it is three. Each stands for its share of the zeros: 18/8 of its tokens
    and 8/3 of its sequences, so that the mean of the three losses is the mean over all.
    """
    moving = [replace(sample(n), advantage=1.0) for n in (5, 3, 3)]
    still = [sample(3) for _ in range(5)]
    found = minibatches([*still[:2], *moving, *still[2:]], 8, with_kl=False)
    assert [len(m.samples) for m in found] == [1, 1, 1]
    assert [m.num_tokens for m in found] == pytest.approx([9, 4.5, 4.5])
    assert [m.num_sequences for m in found] == pytest.approx([8 / 3] * 3)
    two = minibatches([*moving, *still], 2, with_kl=False)
    assert [len(m.samples) for m in two] == [2, 1]
    assert [m.num_tokens for m in two] == pytest.approx([13.5, 4.5])
    assert [m.num_sequences for m in two] == pytest.approx([16 / 3, 8 / 3])


def test_with_a_reference_all_that_was_sampled_has_a_gradient() -> None:
    nothing_sampled = replace(sample(4), mask=np.zeros(3, dtype=np.bool_))
    (one,) = minibatches([sample(4), nothing_sampled], 1, with_kl=True)
    assert len(one.samples) == 1
    assert (one.num_tokens, one.num_sequences) == (3, 2)
    with pytest.raises(ValueError, match="none of the 2 samples has a gradient"):
        minibatches([sample(4), nothing_sampled], 1, with_kl=False)


def test_layouts_by_hand() -> None:
    """Prompt 10 11 with response 12 [13] 14 (the middle one a tool's), and prompt 20 with response 21."""
    a = Sample(
        ids=np.array([10, 11, 12, 13, 14], dtype=np.int32),
        prompt_len=2,
        mask=np.array([True, False, True]),
        behaviour_logprobs=np.array([-1.0, 0.0, -3.0], dtype=np.float32),
        advantage=2.0,
    )
    b = Sample(ids=np.array([20, 21], dtype=np.int32), prompt_len=1, mask=np.array([True]), advantage=-1.0)
    padded, packed = collate((a, b), padded=True), collate((a, b), padded=False)
    assert padded.layout.input_ids.tolist() == [[10, 11, 12, 13, 14], [20, 21, 0, 0, 0]]
    assert padded.layout.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert padded.source.tolist() == [1, 3, 5]  # the positions before 12, 14 and 21
    assert packed.layout.input_ids.tolist() == [[10, 11, 12, 13, 14, 20, 21]]
    assert packed.layout.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1]]
    assert packed.source.tolist() == [1, 3, 5]
    assert packed.layout.borders is not None
    assert packed.layout.borders.tolist() == [0, 5, 7]
    assert padded.layout.borders is None
    for batch in (padded, packed):
        assert batch.targets.tolist() == [12, 14, 21]
        assert batch.mask.tolist() == [[True, False, True], [True, False, False]]
        assert batch.behaviour_logprobs.tolist() == [[-1.0, 0.0, -3.0], [0.0, 0.0, 0.0]]
        assert batch.advantages.tolist() == [2.0, -1.0]


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, dtype=np.int32)


def test_pairs_that_prefer_nothing_are_refused_by_number() -> None:
    good = Pair(chosen=ids(1, 2), rejected=ids(1, 3))
    check_pairs([good])
    for bad, message in (
        (Pair(chosen=ids(1, 2), rejected=ids(1, 2)), "pair 1: both sides are the same 2 tokens"),
        (Pair(chosen=ids(), rejected=ids(1)), "pair 1: the chosen side is empty"),
        (Pair(chosen=ids(1), rejected=ids()), "pair 1: the rejected side is empty"),
        (Pair(chosen=ids(1), rejected=ids(2), margin=float("nan")), "pair 1: margin=nan"),
    ):
        with pytest.raises(ValueError, match=message):
            check_pairs([good, bad])
    with pytest.raises(ValueError, match="no pairs"):
        check_pairs([])


def test_score_layouts_by_hand() -> None:
    """Padding is token 9. One pair of 3 and 2 tokens, whose second side ends in a 9, which is no place to read at."""
    pair = Pair(chosen=ids(1, 2, 3), rejected=ids(4, 9), margin=0.5)
    (padded,) = collate_pairs([pair], 6, 0, 1, pad_token_id=9, padded=True)
    (packed,) = collate_pairs([pair], 5, 0, 1, pad_token_id=9, padded=False)
    assert padded.layout.input_ids.tolist() == [[1, 2, 3], [4, 9, 0]]
    assert packed.layout.input_ids.tolist() == [[1, 2, 3, 4, 9]]
    assert padded.source.tolist() == packed.source.tolist() == [2, 3]
    assert padded.margins is not None
    assert padded.margins.tolist() == [0.5]
    with pytest.raises(ValueError, match="a micro-batch of 5; raise micro_batch_tokens"):
        collate_pairs([pair], 5, 0, 1, pad_token_id=9, padded=True)
    (nothing_else,) = collate_sequences([ids(9, 9)], 5, 0, 1, pad_token_id=9, padded=True)
    assert nothing_else.source.tolist() == [0]
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        collate_sequences([ids(1), ids()], 5, 0, 1, pad_token_id=9, padded=True)


@pytest.mark.parametrize("padded", [True, False])
def test_every_pair_and_sequence_is_on_one_rank_once_and_fillers_have_no_items(padded: bool) -> None:
    pairs = [Pair(chosen=ids(*range(n)), rejected=ids(*range(n + 1))) for n in (3, 9, 4)]
    ranks = [collate_pairs(pairs, 20, rank, 4, pad_token_id=0, padded=padded) for rank in range(4)]
    assert sorted(i for batches in ranks for b in batches for i in b.items) == [0, 1, 2]
    assert {len(batches) for batches in ranks} == {1}
    (filler,) = [b for batches in ranks for b in batches if not b.items]
    assert filler.margins is not None
    assert (len(filler.source), len(filler.margins)) == (2, 0)
    sequences = [p.chosen for p in pairs]
    batches = [b for rank in range(2) for b in collate_sequences(sequences, 9, rank, 2, pad_token_id=0, padded=padded)]
    assert sorted(i for b in batches for i in b.items) == [0, 1, 2]
