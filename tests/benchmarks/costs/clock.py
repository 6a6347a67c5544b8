"""Takes times side by side: in turns, again and again, so that noise meets all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

_COLLECT = 0.2  # seconds between collections of garbage: often enough, and seldom beside a median
_SHORT = 0.05  # seconds of a call that the caches, emptied by another, make much of a difference to


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Piece:
    """Something to be timed.

    Args:
        name: to find its times by.
        run: what is timed; takes what ``prepare`` returns.
        prepare: what has to be done before, not timed.
        per: number of samples that the time is divided by.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = _nothing
    per: int = 1


@dataclass(frozen=True)
class Plan:
    """How often things are timed.

    Args:
        seconds: for one comparison; ends it after the round it runs out in.
        least: rounds at least, besides the first one.
        most: rounds at most.
        clock: tells the seconds: those that pass, or those that the process runs. On a busy machine
            the first are biased against whatever takes longer than the process is let run at once.
    """

    seconds: float
    least: int
    most: int
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Times:
    """Seconds by piece, one for each round, and the share of them that the process ran.

    Args:
        by_name: seconds of a piece in each round.
        running: CPU seconds of the process over seconds passed, on one thread; below one where the
            machine did something else meanwhile.

    >>> times = Times({"a": [1.0, 1.0, 2.0], "b": [2.0, 3.0, 9.0]})
    >>> times.milliseconds("a"), times.ratio(["b"], ["a"])
    (1000.0, 3.0)
    """

    by_name: dict[str, list[float]] = field(default_factory=dict)
    running: float = 1.0

    def milliseconds(self, *names: str) -> float:
        """Return the sum of the medians."""
        return 1000 * sum(median(self.by_name[name]) for name in names)

    def ratio(self, above: Sequence[str], below: Sequence[str]) -> float:
        """Return the median over rounds of the ratio of two sums, each within a round."""
        return median(self._ratios(above, below))

    def spread(self, above: Sequence[str], below: Sequence[str]) -> tuple[float, float]:
        """Return the first and the third quartile of the ratio."""
        ratios = self._ratios(above, below)
        if len(ratios) < 2:
            return ratios[0], ratios[0]
        first, _, third = quantiles(ratios, n=4, method="inclusive")
        return first, third

    @property
    def rounds(self) -> int:
        """The number of rounds."""
        return min(map(len, self.by_name.values()))

    def _ratios(self, above: Sequence[str], below: Sequence[str]) -> list[float]:
        return [a / b for a, b in zip(self._sums(above), self._sums(below), strict=True)]

    def _sums(self, names: Sequence[str]) -> list[float]:
        return [sum(each) for each in zip(*(self.by_name[n] for n in names), strict=True)]


def side_by_side(pieces: Sequence[Piece], plan: Plan) -> Times:
    """Time the pieces in turns: all of them once, then all of them again, and so on.

    More than two come in another order in every round, so that none always comes after the same.
    In its turn a short piece is run twice, and the second time counts: the first one fills the
    caches with what is its own, as where it runs alone. The first round does not count: memory is
    allocated, backends are chosen. Between rounds garbage is collected, so that what one leaves in
    reference cycles does not burden the others.
    """
    order, dice = list(pieces), random.Random(0)
    by_name: dict[str, list[float]] = {piece.name: [] for piece in pieces}
    for piece in pieces:
        _seconds(piece, plan.clock)
    wall, cpu = time.perf_counter(), time.process_time()
    collected = 0.0
    for count in range(1, plan.most + 1):
        if time.perf_counter() - collected > _COLLECT:
            gc.collect()
            collected = time.perf_counter()
        if len(order) > 2:
            dice.shuffle(order)
        for piece in order:
            by_name[piece.name].append(_seconds(piece, plan.clock))
        if count >= plan.least and time.perf_counter() - wall > plan.seconds:
            break
    passed = time.perf_counter() - wall
    return Times(by_name, min(1.0, (time.process_time() - cpu) / passed))


def _seconds(piece: Piece, clock: Callable[[], float]) -> float:
    first = _once(piece, clock)
    return (first if first > _SHORT else _once(piece, clock)) / piece.per


def _once(piece: Piece, clock: Callable[[], float]) -> float:
    state = piece.prepare()
    wait()
    started = clock()
    result = piece.run(state)
    wait()
    passed = clock() - started
    del result
    return passed


def wait() -> None:
    """Wait until a GPU has done what it was told."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
