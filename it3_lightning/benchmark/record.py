"""One score of a benchmark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """One score.

    Args:
        training: which trained model.
        row: what happened at test time.
        stream: ``"equal"`` or ``"unequal"`` classes.
        seed: of training, split and shifts.
        shift: its name; ``"clean"`` for none.
        score: in the units of the metric.
        ms_per_sample: milliseconds of adaptation per sample; 0 where nothing adapts.
        adapted: number of weights that adapt.
    """

    training: str
    row: str
    stream: str
    seed: int
    shift: str
    score: float
    ms_per_sample: float
    adapted: int
