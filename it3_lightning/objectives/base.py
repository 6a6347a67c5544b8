"""What an objective is, and what one evaluation of it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SecondPass = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What one evaluation of an objective gives.

    Args:
        measure: ``(B,)``, the quantity itself for every sample: what is logged as distance.
        reliable: ``(B,)`` booleans, the samples whose measure is minimised.
        batch_term: a scalar added to the mean over the reliable samples, or ``None``.
        sample_term: ``(B,)``, added to the measure where it is minimised, or ``None``.
    """

    measure: Tensor
    reliable: Tensor
    batch_term: Tensor | None = None
    sample_term: Tensor | None = None

    @property
    def moves(self) -> Tensor:
        """``(B,)`` booleans, the samples that have something to minimise: all by a batch term."""
        return self.reliable if self.batch_term is None else torch.ones_like(self.reliable)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to minimise: no reliable sample and no batch term."""
        return self.batch_term is None and not bool(self.reliable.any())

    def loss(self) -> Tensor:
        """Return the scalar loss: the mean of the reliable samples' terms, and the batch term."""
        weights = self.reliable.to(self.measure.dtype)
        terms = self.measure if self.sample_term is None else self.measure + self.sample_term
        kept = torch.where(self.reliable, terms, 0.0)
        mean = kept.sum() / weights.sum().clamp_min(1)
        return mean if self.batch_term is None else mean + self.batch_term


class TestTimeObjective(Protocol):
    """What the engine asks of an objective."""

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at several samples at once, so that one alone makes no sense."""

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate at the first prediction ``(B, C, ...)``; ``second(y0)`` runs the anchor."""


TestTimeObjective.__test__ = False  # type: ignore[attr-defined]  # its name is no test's
