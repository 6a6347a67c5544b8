"""The gate: samples whose distance is usual, as on validation data, do not move the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from it3_lightning.engine.evaluation import Evaluator
from it3_lightning.engine.outcome import Evaluation
from it3_lightning.engine.samples import divisible, taken
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.state import State


@dataclass(frozen=True)
class Gate:
    """What the gate says of a batch.

    Args:
        before: the evaluation it says so by.
        within: ``(B,)`` booleans, samples that do not move the weights.
        movers: inputs to step on: the samples beyond the gate, or all where BatchNorm needs them.
        alone: whether these are only the samples beyond.
    """

    before: Evaluation
    within: Tensor
    movers: Any
    alone: bool

    @classmethod
    def of(
        cls,
        limit: float,
        state: State,
        inputs: Any,
        evaluate: Evaluator,
        settings: Settings,
        *,
        at_source: bool,
    ) -> Gate:
        """Measure a batch with the weights in place; ``at_source``: both passes have the source's.

        Raises:
            Skip: an output is not finite.
        """
        before = evaluate.measured(inputs, state.anchor, at_source=at_source)
        evaluate.forget()
        within = before.objective.measure <= limit
        alone = settings.norm_stats == "source" and divisible(inputs)
        rows = (~within).nonzero()[:, 0].tolist()
        movers = taken(inputs, rows) if alone and rows else inputs
        return cls(before, within, movers, alone and bool(rows))

    @property
    def closed(self) -> bool:
        """Whether no sample moves the weights."""
        return bool(self.within.all())

    def masked(self, evaluation: Evaluation) -> Evaluation:
        """Return an evaluation of the movers in which no other sample counts."""
        if self.alone:
            return evaluation
        reliable = evaluation.objective.reliable & ~self.within
        return replace(evaluation, objective=replace(evaluation.objective, reliable=reliable))

    def whole(self, first: Evaluation | None) -> Evaluation:
        """Return the evaluation before the first step, of the whole batch."""
        reliable = torch.zeros_like(self.within)
        if first is not None:
            reliable[~self.within] = (
                first.objective.reliable if self.alone else first.objective.reliable[~self.within]
            )
        objective = replace(self.before.objective, reliable=reliable)
        return replace(self.before, objective=objective)
