"""Checks of new weights, before an engine takes them."""

from __future__ import annotations

from models.weight_update import WeightUpdate


def check_backend(update: WeightUpdate, backend: str) -> None:
    """Raises ValueError unless `update` uses `backend`."""
    if update.backend != backend:
        raise ValueError(f"the engine takes weights by {backend!r} (engine.weight_transfer), not by {update.backend!r}")


def check_update(update: WeightUpdate, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless `update` has every tensor of the checkpoint, each with its shape."""
    given = dict(zip(update.names, update.shapes, strict=True))
    if given.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(
            f"policy version {update.policy_version} has other tensors than the engine's checkpoint: "
            f"missing {missing[:3]}, unknown {unknown[:3]} (first three of each)"
        )
    for name, shape in given.items():
        if tuple(shape) != expected[name]:
            raise ValueError(
                f"{name}: new weights of shape {tuple(shape)}, the engine's checkpoint has {expected[name]}"
            )
