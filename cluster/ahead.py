"""Machines asked for before the parts that need them are made, so that they come up side by side.

A cloud's machine takes minutes. Parts that are made one after the other, each waiting for its own, would add those up.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ray.util.placement_group import placement_group, remove_placement_group

from cluster.roles import Ask


@contextmanager
def asked_ahead(asks: Sequence[Ask]) -> Iterator[None]:
    """Placement groups for `asks`, which nobody waits for: to the autoscaler they are demand. Leave the block before the
    parts themselves are placed, as the groups hold what they were given; they end with the driver, too."""
    run = uuid.uuid4().hex[:6]  # a group's name is one's in the whole namespace
    groups = [
        placement_group([dict(ask.resources)] * ask.count, name=f"ahead-{index}-{run}")
        for index, ask in enumerate(asks)
        if ask.count
    ]
    try:
        yield
    finally:
        for group in groups:
            remove_placement_group(group)
