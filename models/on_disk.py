"""The names and shapes of a checkpoint folder's weights, read from the headers of its files."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open


def tensor_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor in the folder's safetensors files. Raises ValueError if there are none."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if not shapes:
        raise ValueError(f"engine.model: no *.safetensors files in {model}")
    return shapes
