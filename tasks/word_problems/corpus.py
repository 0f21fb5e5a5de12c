"""A small invented world for lookups: the prices of things from different towns. The same facts in every process and split.

The tier `lookup` asks for these facts, and `examples/tiny` indexes them for the tool `search`. No model can know them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

COLOURS = ("red", "blue", "green", "black", "white")
THINGS = ("lamp", "chair", "kettle", "clock", "bowl", "vase", "drum", "tent")
TOWNS = ("Oslo", "Rome", "Lima", "Bern", "Cairo", "Kyoto", "Quito", "Dakar")

MIN_PRICE, MAX_PRICE = 12, 99


@dataclass(frozen=True, slots=True)
class Fact:
    """The price of one thing from one town."""

    colour: str
    thing: str
    town: str

    @property
    def id(self) -> str:
        return f"{self.colour}-{self.thing}-{self.town}".lower()

    @property
    def price(self) -> int:
        digest = hashlib.sha256(self.id.encode()).digest()
        return MIN_PRICE + int.from_bytes(digest[:8], "big") % (MAX_PRICE - MIN_PRICE + 1)

    @property
    def contents(self) -> str:
        return f"A {self.colour} {self.thing} from {self.town} costs {self.price} dollars."

    @property
    def query(self) -> str:
        """The text to search for; a story uses the same words."""
        return f"a {self.colour} {self.thing} from {self.town}"


def facts() -> Iterator[Fact]:
    """All facts, in a fixed order."""
    for town in TOWNS:
        for thing in THINGS:
            for colour in COLOURS:
                yield Fact(colour, thing, town)


def corpus() -> list[dict[str, str]]:
    """The facts as documents, each `{"id", "contents"}`: the lines that `tool_sandbox.search.index.build_index` reads."""
    return [{"id": fact.id, "contents": fact.contents} for fact in facts()]
