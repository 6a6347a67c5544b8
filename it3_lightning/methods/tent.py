"""Tent: the entropy of the prediction, of the affine weights of norm layers, online."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, SecondPass, TestTimeMethod
from it3_lightning.methods.terms import (
    balance_term,
    check_classes,
    check_settings,
    confident,
    cross_entropy,
)


@dataclass(frozen=True)
class Entropy(TestTimeMethod):
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
    vmappable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_settings(self.reliability, self.balance)

    @property
    def needs_batch(self) -> bool:
        """Whether the balance term is on."""
        return self.balance > 0

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the first prediction."""
        if passes.valid is None:  # a subclass may know of none
            return self(passes.y0, passes.second)
        return self(passes.y0, passes.second, passes.valid)

    def __call__(self, y0: Tensor, second: SecondPass, valid: Tensor | None = None) -> Objective:
        """Evaluate the entropy of the first prediction; the second is not asked for."""
        check_classes("Entropy", y0)
        measure, reliable = cross_entropy(y0, y0, valid), confident(y0, self.reliability, valid)
        return Objective(measure, reliable, balance_term(y0, self.balance, valid))


@dataclass(frozen=True)
class Tent(Entropy):
    """Test-time entropy minimisation with the settings of its paper (Wang et al., ICLR 2021).

    Scale and shift of the norm layers move, online, with the statistics of the batch, by Adam with
    a learning rate of 1e-3 (the paper's on CIFAR-10-C). It needs no prior: any LightningModule will
    do.

    >>> Tent().defaults["parameters"]
    'norm'
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "parameters": "norm",
        "norm_stats": "batch",
        "reset": "never",
        "optimizer": "adam",
        "lr": 1e-3,
    }
