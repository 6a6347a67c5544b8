"""What one evaluation of an objective gives on a batch, or why there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from it3_lightning.objectives import Objective

Forward = Callable[[Any, Tensor | None], Tensor]
"""``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one."""

ToLabel = Callable[[Tensor], Tensor]
"""Brings outputs into label space."""


class Skip(Exception):  # noqa: N818  # no error: the batch keeps its source prediction
    """The batch cannot be adapted to; the message says why."""


@dataclass(frozen=True)
class Evaluation:
    """Outputs ``(B, ...)`` of the first pass, and what the objective makes of them."""

    outputs: Tensor
    objective: Objective

    def detached(self) -> Evaluation:
        """Return the same without the graph."""
        measure = self.objective.measure.detach()
        objective = replace(self.objective, measure=measure, batch_term=None, sample_term=None)
        return Evaluation(self.outputs.detach(), objective)
