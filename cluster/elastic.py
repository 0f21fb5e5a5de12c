"""The rule for how many rollout actors the work needs, without the actors themselves.

    learners wait for groups  ──▶ there are too few engines ──▶ grow, by as much as the waiting implies, at most to twice
    engines have no work      ──▶ staleness is at its bound ──▶ shrink, by one at a time

Between the two thresholds the number stays. After each change, the rule waits until its effect can be seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.config import ElasticConfig


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured since the last decision."""

    num_steps: int
    learner_wait: float  # share of the time that the learners had no full step to train on, in [0, 1]
    engine_idle: float  # share of the time that ready engines had no group, in [0, 1]


@dataclass(frozen=True, slots=True)
class Decision:
    """The number of actors that there should be, and the reason, for the log."""

    target: int
    reason: str


def decide(window: Window, num_actors: int, num_joining: int, config: ElasticConfig) -> Decision:
    """The number of actors for the work seen in `window`; `num_joining` of `num_actors` aren't ready yet.

    If n engines let the learners wait a share w of the time, a step could take 1 - w of its time, and n/(1 - w) engines
    would just be enough. The number at most doubles at once, as w says little when it is near 1.
    """
    if num_actors < config.min_actors:
        return Decision(config.min_actors, f"{num_actors} actors, elastic.min_actors = {config.min_actors}")
    if num_joining:
        return Decision(num_actors, f"{num_joining} engines are still joining")
    if window.num_steps < config.window_steps:
        return Decision(num_actors, f"{window.num_steps} of {config.window_steps} steps seen")
    wait, idle = window.learner_wait, window.engine_idle
    seen = f"learners waited {wait:.0%}, engines idled {idle:.0%} of {window.num_steps} steps"
    # If engines are idle while learners wait, engines aren't missing: something else is slow, such as scoring or a sync.
    if wait > config.grow_above and idle <= config.shrink_above:
        if num_actors >= config.max_actors:
            return Decision(num_actors, f"{seen}; elastic.max_actors = {config.max_actors} is reached")
        wanted = math.ceil(num_actors / (1.0 - min(wait, 0.5)))
        return Decision(min(max(wanted, num_actors + 1), config.max_actors), f"{seen}: engines are short")
    if idle > config.shrink_above and wait <= config.grow_above and num_actors > config.min_actors:
        return Decision(num_actors - 1, f"{seen}: staleness holds the engines back")
    return Decision(num_actors, seen)


class LoadMeter:
    """Adds up the seconds during which learners waited or engines were idle, for `decide`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._num_steps = 0
        self._seconds = self._waited = self._engine_seconds = self._idled = 0.0

    def passed(self, seconds: float, *, learners_wait: bool, num_ready: int, num_idle: int) -> None:
        """Add `seconds` that were spent in this state."""
        self._seconds += seconds
        self._waited += seconds if learners_wait else 0.0
        self._engine_seconds += seconds * num_ready
        self._idled += seconds * num_idle

    def stepped(self, num_actors: int, num_joining: int, config: ElasticConfig) -> tuple[Window, Decision]:
        """Note the end of a step; returns what was measured and the decision.

        After a decision a new window begins, whatever was decided, so that a load which changes after a hundred quiet steps
        isn't averaged with them. It also begins again while engines join, as the measured pool isn't yet the wanted one."""
        self._num_steps += 1
        window = self.window
        decision = decide(window, num_actors, num_joining, config)
        if num_joining or window.num_steps >= config.window_steps or decision.target != num_actors:
            self.reset()
        return window, decision

    @property
    def window(self) -> Window:
        return Window(
            num_steps=self._num_steps,
            learner_wait=self._waited / self._seconds if self._seconds else 0.0,
            engine_idle=self._idled / self._engine_seconds if self._engine_seconds else 0.0,
        )
