r"""Iterates: predictions fed back as priors several times, and their mean; no weight moves.

:math:`y_0 = f(x, 0)`, :math:`y_k = F(x, y_{k-1})`, and the prediction :math:`\frac{1}{K + 1}
\sum_{k=0}^{K} y_k`, after Durasov et al., Enabling Uncertainty Estimation in Iterative Neural
Networks (ICML 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.idempotence import Idempotence
from it3_lightning.methods.terms import Distance, DistanceName, get_distance
from it3_lightning.utils.messages import unknown

Which = Literal["mean", "last"]


@dataclass(frozen=True)
class Iterates(TestTimeMethod):
    """Predicts the mean of a network's iterates, or the last of them, without a step.

    With ``count=1`` it is ``prediction="mean"`` or ``"second"`` of the callback. What is logged is
    the idempotence distance of the first two, the ZigZag score (Durasov et al., TMLR 2024).

    Args:
        count: how often ``K`` a prediction becomes the prior of the next; each is a forward pass.
        which: ``"mean"`` of all, the first one among them, or the ``"last"``.
        distance: that is logged; see :class:`Idempotence`.

    Raises:
        ValueError: ``count`` is not positive, or a name is unknown.

    >>> Iterates().defaults["steps"], Iterates().needs_prior
    (0, True)
    """

    count: int = 3
    which: Which = "mean"
    distance: DistanceName | Distance = "l2"
    needs_prior: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Expected at least one iterate, got count={self.count}.")
        if self.which not in get_args(Which):
            raise ValueError(unknown("which", self.which, get_args(Which)))
        get_distance(self.distance)

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the distance between the first and the second prediction."""
        return Idempotence(self.distance, reliability=None).loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        """Feed predictions back, and return their mean or the last one."""
        iterates = [passes.y0]
        for _ in range(self.count):
            iterates.append(passes.second(iterates[-1]))
        return torch.stack(iterates).mean(0) if self.which == "mean" else iterates[-1]
