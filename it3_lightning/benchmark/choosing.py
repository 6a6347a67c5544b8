"""The rule by which tuning chooses: the largest gain among what does no harm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from it3_lightning.benchmark.cell import Cell

Gains = Mapping[str, Sequence[float]]
"""Improvements over the strongest unadapted row, by name of the samples, one for each seed."""


@dataclass(frozen=True)
class Rule:
    """Chooses among candidates, on validation samples, by one rule for every domain.

    A candidate is *harmless* if it loses no more than what is tolerated, on clean samples and under
    every shift, mean over seeds. It *gains* if its mean gain over the shifts is larger than what is
    tolerated as a loss, larger than ``significance`` times its standard error over seeds, and above
    zero in every seed. Chosen is the harmless one that gains most; where none does, nothing is.

    What is tolerated is a share of the unadapted error, mean over clean and shifted samples, or the
    standard error over seeds of a gain on one kind of samples, where that is larger: the median of
    it over all candidates and kinds, so that wild candidates are not tolerated more.

    Args:
        tolerance: the share.
        significance: standard errors by which a gain must differ from zero.

    Raises:
        ValueError: one is negative.
    """

    tolerance: float = 0.01
    significance: float = 2.0

    def __post_init__(self) -> None:
        if self.tolerance < 0 or self.significance < 0:
            raise ValueError(
                f"Expected tolerance and significance >= 0, got {self.tolerance} and "
                f"{self.significance}."
            )

    def tolerated(self, gains: Sequence[Gains], error: float) -> float:
        """Return the loss that is tolerated, in units of the score.

        Args:
            gains: of all candidates.
            error: of the unadapted row.

        >>> Rule(tolerance=0.01).tolerated([{"clean": [0.0, 0.4], "noise": [1.0, 1.0]}], 25.0)
        0.25
        """
        errors = [_standard_error(values) for each in gains for values in each.values()]
        return max(self.tolerance * error, statistics.median(errors) if errors else 0.0)

    def verdict(self, gains: Gains, tolerated: float) -> Verdict:
        """Judge a candidate by its gains; ``"clean"`` is no shift."""
        means = {name: statistics.fmean(values) for name, values in gains.items()}
        shifted = [values for name, values in gains.items() if not is_clean(name)]
        by_seed = [statistics.fmean(values) for values in zip(*shifted, strict=True)]
        worst = min(means, key=lambda name: means[name])
        least = max(tolerated, self.significance * _standard_error(by_seed))
        return Verdict(
            clean=Cell.of(_clean(gains)),
            gain=Cell.of(by_seed),
            worst=worst,
            loss=-means[worst],
            harmless=-means[worst] <= tolerated,
            gains=statistics.fmean(by_seed) > least and min(by_seed) > 0,
        )

    def chosen(self, verdicts: Sequence[Verdict]) -> int | None:
        """Return the index of the one that is chosen; ``None``: adapt nothing."""
        good = [i for i, verdict in enumerate(verdicts) if verdict.harmless and verdict.gains]
        return max(good, key=lambda i: verdicts[i].gain.mean, default=None)


@dataclass(frozen=True)
class Verdict:
    """What the rule says of a candidate.

    Args:
        clean: gain on clean samples.
        gain: mean gain over the shifts.
        worst: the samples it gains least on.
        loss: how much it loses there; negative for a gain.
        harmless: whether it loses nowhere more than is tolerated.
        gains: whether it gains.
    """

    clean: Cell
    gain: Cell
    worst: str
    loss: float
    harmless: bool
    gains: bool


def is_clean(name: str) -> bool:
    """Whether samples are clean ones, of whichever stream.

    >>> is_clean("clean, unequal"), is_clean("fog")
    (True, False)
    """
    return name.partition(",")[0] == "clean"


def _clean(gains: Gains) -> list[float]:
    kept = [values for name, values in gains.items() if is_clean(name)]
    return [statistics.fmean(values) for values in zip(*kept, strict=True)]


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
