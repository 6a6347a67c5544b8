"""The entropy of the prediction, to compare with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from it3_lightning.distances import cross_entropy
from it3_lightning.objectives.base import Objective, SecondPass
from it3_lightning.objectives.terms import balance_term, check_classes, check_settings, confident


@dataclass(frozen=True)
class Entropy:
    r"""The entropy of the prediction, :math:`-\sum_k p_k \log p_k` (Tent: Wang et al., ICLR 2021).

    Args:
        reliability: confidence above which a sample counts; ``None``: all, as published.
        balance: see :class:`Idempotence`.

    >>> import torch
    >>> Entropy()(torch.tensor([[0.5, 0.5]]), lambda prior: prior).measure
    tensor([0.6931])
    """

    reliability: float | None = None
    balance: float = 0.0

    def __post_init__(self) -> None:
        check_settings(self.reliability, self.balance)

    @property
    def needs_batch(self) -> bool:
        """Whether the balance term is on."""
        return self.balance > 0

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate the entropy of the first prediction; the second is not asked for."""
        check_classes("Entropy", y0)
        measure = cross_entropy(y0, y0)
        return Objective(measure, confident(y0, self.reliability), balance_term(y0, self.balance))
