"""Which sequences go together into a batch of so many tokens. Plain Python."""

from __future__ import annotations

from collections.abc import Sequence


def assign(
    sizes: Sequence[int], token_budget: int, world_size: int = 1, *, padded: bool = True
) -> list[list[tuple[int, ...]]]:
    """Which items go together into a micro-batch, and on which rank.

    Args:
        sizes: tokens of each item of the batch, in an order all ranks agree on.
        token_budget: most tokens in a micro-batch. With `padded`, items × longest counts (right-padded rectangles, so
            neighbours in length go together); otherwise the sum of sizes (first-fit decreasing).
        world_size: number of ranks.

    Returns:
        One list of micro-batches (tuples of indices) a rank, all of the same length ≥ 1 (ZeRO's collectives need that),
        each item exactly once. An empty micro-batch is a place to fill with something that doesn't count. Ranks' token
        counts differ by at most the longest item's.

    Raises:
        ValueError: no items, or one is larger than the budget.
    """
    if not sizes:
        raise ValueError("no samples to pack")
    if max(sizes) > token_budget:
        raise ValueError(
            f"a sample of {max(sizes)} tokens exceeds a micro-batch of {token_budget}; raise micro_batch_tokens or "
            "sequence_parallel_size"
        )
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for i in longest_first(sizes):  # longest first to the least loaded rank
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += sizes[i]
    fit = padded_batches if padded else packed_batches
    ranks = [fit(sizes, token_budget, share) for share in shares]
    count = max(map(len, ranks))
    for bins in ranks:
        while len(bins) < count:
            widest = max(bins, key=len, default=[])
            if len(widest) > 1:
                bins.remove(widest)
                bins += [widest[::2], widest[1::2]]
            else:
                bins.append([])
    return [[tuple(b) for b in bins] for bins in ranks]


def padded_batches(sizes: Sequence[int], token_budget: int, items: Sequence[int] | None = None) -> list[list[int]]:
    """Indices into `sizes`, longest first, in batches of at most `token_budget` tokens when padded to their longest.

    An item larger than the budget is a batch of its own. `items`: the indices to batch, None: all.
    """
    batches: list[list[int]] = []
    for i in longest_first(sizes, items):
        if batches and (len(batches[-1]) + 1) * sizes[batches[-1][0]] <= token_budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def packed_batches(sizes: Sequence[int], token_budget: int, items: Sequence[int] | None = None) -> list[list[int]]:
    """Likewise by the sum of sizes, none of which exceeds the budget: first-fit decreasing."""
    bins: list[list[int]] = []
    room: list[int] = []
    for i in longest_first(sizes, items):
        place = next((k for k, free in enumerate(room) if free >= sizes[i]), len(bins))
        if place == len(bins):
            bins.append([])
            room.append(token_budget)
        bins[place].append(i)
        room[place] -= sizes[i]
    return bins


def longest_first(sizes: Sequence[int], items: Sequence[int] | None = None) -> list[int]:
    return sorted(range(len(sizes)) if items is None else items, key=lambda i: -sizes[i])
