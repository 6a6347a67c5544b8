"""What a benchmark finds: rows with what is required of them, points of curves, deeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from costs.clock import Times

Axis = Literal["batch size", "steps", "parameters"]


@dataclass(frozen=True)
class Required:
    """A bound on a ratio: at least, or at most.

    >>> Required(2.0).holds(2.5), str(Required(1.1, at_most=True))
    (True, '<= 1.1')
    """

    bound: float
    at_most: bool = False

    def holds(self, ratio: float) -> bool:
        """Whether a ratio is good enough."""
        return ratio <= self.bound if self.at_most else ratio >= self.bound

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison.

    Args:
        section: of the table.
        case: network, where the prior enters, how many samples.
        against: what it is compared with.
        ours: median, in ``unit``.
        other: the same of what it is compared with.
        ratio: median of the ratio within a round, so not quite that of the medians.
        required: of the ratio; ``None``: nothing, the row is there to be read.
        unit: of ``ours`` and ``other``.
        quartiles: first and third of the ratio over the rounds.
        rounds: how many there were.
        running: share of the time that the process ran.
        with_update: the ratio with the update of the weights counted as unavoidable.
        note: what else there is to say.
    """

    section: str
    case: str
    against: str
    ours: float
    other: float
    ratio: float
    required: Required | None
    unit: str = "ms"
    quartiles: tuple[float, float] | None = None
    rounds: int = 1
    running: float = 1.0
    with_update: float | None = None
    note: str = ""

    @classmethod
    def timed(
        cls,
        times: Times,
        *,
        section: str,
        case: str,
        against: str,
        ours: Sequence[str],
        other: Sequence[str],
        required: Required,
        judged: bool = True,
        note: str = "",
    ) -> Row:
        """Return a row of times: ours over the other's where it may be at most so much, or back.

        Args:
            times: of all pieces.
            section: see :class:`Row`, as all others.
            case: what is timed.
            against: what it is compared with.
            ours: names of the pieces that are ours, to be summed.
            other: the same of what they are compared with.
            required: of the ratio.
            judged: whether it is; else the row is there to be read.
            note: what else there is to say.
        """
        above, below = (ours, other) if required.at_most else (other, ours)
        return cls(
            section=section,
            case=case,
            against=against,
            ours=times.milliseconds(*ours),
            other=times.milliseconds(*other),
            ratio=times.ratio(above, below),
            required=required if judged else None,
            quartiles=times.spread(above, below),
            rounds=times.rounds,
            running=times.running,
            note=note,
        )

    @property
    def verdict(self) -> Literal["ok", "missed", ""]:
        """Whether what is required holds; empty where nothing is."""
        if self.required is None:
            return ""
        return "ok" if self.required.holds(self.ratio) else "missed"


@dataclass(frozen=True)
class Point:
    """A point of a curve: milliseconds of one call of an engine."""

    network: str
    axis: Axis
    at: int
    engine: str
    milliseconds: float


@dataclass(frozen=True)
class Deeds:
    """What an engine does for one batch.

    Args:
        case: network, where the prior enters.
        engine: its name.
        weights: number of elements adapted.
        forwards: forward passes, the final one included.
        backwards: backward passes.
        answered: calls of modules in these passes that were answered from a record.
    """

    case: str
    engine: str
    weights: int
    forwards: int
    backwards: int
    answered: int


Item = Row | Point | Deeds


@dataclass(frozen=True)
class Job:
    """A piece of the benchmark, to be run when its turn comes."""

    label: str
    run: Callable[[], Sequence[Item]]
