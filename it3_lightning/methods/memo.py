r"""MEMO: the entropy of the mean prediction over augmented views of one input, one step, episodic.

:math:`\ell(\theta; x) = H\left(\frac{1}{B} \sum_{i=1}^{B} p_\theta(y \mid \tilde x_i)\right)`, with
:math:`\tilde x_i = a_i(x)` views of the input (Zhang, Levine and Finn, NeurIPS 2022, eq. 1 and 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy
from it3_lightning.methods.views import View, crop_and_flip


@dataclass(frozen=True)
class MEMO(TestTimeMethod):
    """Marginal entropy minimisation with one test point (Zhang et al., NeurIPS 2022).

    Every sample of a batch adapts by itself (``scope="sample"``). It needs no prior: any
    LightningModule will do. Views are drawn by the random numbers of the process: give several
    processes the same seed, as ``seed_everything`` does.

    Args:
        views: number of augmented views ``B`` of each input.
        augment: makes a view of inputs ``(B, ...)``, as transforms of torchvision do. Default:
            :func:`~it3_lightning.methods.views.crop_and_flip`, for images.

    Raises:
        ValueError: fewer than one view.

    >>> MEMO().defaults["scope"]
    'sample'
    """

    views: int = 32
    augment: View | None = None
    defaults: ClassVar[Mapping[str, Any]] = {
        "scope": "sample",
        "backend": "loop",
        "optimizer": "sgd",
        "lr": 5e-3,
    }

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"Expected at least one view, got {self.views}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the mean prediction over the views."""
        check_classes("MEMO", passes.y0)
        augment = crop_and_flip if self.augment is None else self.augment
        total = sum(passes.other(augment(passes.inputs)) for _ in range(self.views))
        mean = torch.as_tensor(total) / self.views
        measure = cross_entropy(mean, mean, passes.valid)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))
