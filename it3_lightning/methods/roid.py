"""ROID: certain, diverse predictions are made more certain; weights are held near the source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy
from it3_lightning.methods.views import View, crop_and_flip, drawn_by

_CERTAIN = 0.99  # above it the likelihood ratio has no gradient
_TINY = 1e-5  # keeps the logarithm of a ratio finite


@dataclass
class ROID(TestTimeMethod):
    r"""Universal test-time adaptation (Marsden, Döbler and Yang, WACV 2024).

    .. math::

        L(\theta) = \frac{1}{B} \sum_i w_i \left(
            L_{SLR}(\hat y_i) + \tfrac12 H(\hat y_i, \tilde y_i) + \tfrac12 H(\tilde y_i, \hat y_i)
        \right), \qquad
        L_{SLR}(\hat y) = -\sum_c \hat y_c \log \frac{\hat y_c}{\sum_{j \neq c} \hat y_j}

    with :math:`\tilde y` the prediction on an augmented view, ``H(p, q)`` the cross-entropy, and
    weights :math:`w = e^{w_d w_c / \tau}`: diversity :math:`w_d = 1 - \cos(\hat y, \bar y)` to the
    moving mean of the predictions :math:`\bar y`, certainty :math:`w_c = -H(\hat y)`, both scaled
    to [0, 1] in the batch. Samples of a diversity below its mean do not count. No gradient goes
    through the weights.

    After each step the weights go back by a share (``weight_ensembling=0.01``). The prediction is
    corrected by the class frequencies of the batch, :math:`\hat y \, (\hat p + \gamma) / (1 + C
    \gamma)` up to its sum, with :math:`\hat p` the mean prediction and :math:`\gamma = \max(1/B,
    1/C) / \max_c \hat p_c`. It needs no prior of the network: any LightningModule will do.

    Written after the published code, with these differences: the view is of all samples of the
    batch, not of those that count, so that batch statistics are those of the batch; probabilities,
    not logits, are corrected, and those after the step; momentum is not Nesterov's.

    Args:
        augment: makes a view of inputs ``(B, ...)``, as transforms of torchvision do. Default:
            :func:`~it3_lightning.methods.views.crop_and_flip`.
        temperature: :math:`\tau`.
        momentum: share of the old mean of the predictions that is kept at each step.
        seed: of the views, which differ from step to step.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no class vectors.

    >>> ROID().defaults["weight_ensembling"]
    0.01
    """

    augment: View | None = None
    temperature: float = 1 / 3
    momentum: float = 0.9
    seed: int = 0
    _mean: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _steps: int = field(default=0, init=False, repr=False, compare=False)
    defaults: ClassVar[Mapping[str, Any]] = {
        "parameters": "norm",
        "norm_stats": "batch",
        "reset": "never",
        "optimizer": "momentum",
        "lr": 2.5e-4,
        "weight_ensembling": 0.01,
    }

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"Expected temperature > 0, got {self.temperature}.")
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"Expected momentum in [0, 1], got {self.momentum}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate likelihood ratio and consistency, and which samples count by how much."""
        y0 = passes.y0
        check_classes("ROID", y0, maps=False)
        weights, counts = self._weights(y0.detach())
        augment = crop_and_flip if self.augment is None else self.augment
        with drawn_by(self.seed, self._steps, inputs := passes.inputs):
            view = augment(inputs)
        y1 = passes.other(view)
        ratio = soft_likelihood_ratio(y0)
        consistency = (cross_entropy(y0, y1) + cross_entropy(y1, y0)) / 2
        share = counts.to(y0.dtype).mean()  # a mean over those that count, for one over all
        return Objective(ratio, counts, None, share * weights * (ratio + consistency) - ratio)

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take a step, and let the mean follow the predictions before it."""
        objective = super().step(passes, state)
        y0 = passes.y0.detach()
        self._mean = torch.lerp(y0.mean(0), self._known(y0), self.momentum)
        self._steps += 1
        return objective

    def predict(self, passes: Passes) -> Tensor:
        """Return the prediction, corrected by the class frequencies of the batch."""
        samples, classes = passes.y0.shape
        prior = passes.y0.mean(0)
        smooth = max(1 / samples, 1 / classes) / prior.max()
        corrected = passes.y0 * (prior + smooth) / (1 + smooth * classes)
        return corrected / corrected.sum(1, keepdim=True)

    def _weights(self, y0: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of each sample, and whether it counts."""
        diversity = _scaled(1 - F.cosine_similarity(self._known(y0)[None], y0, dim=1))
        certainty = _scaled(-cross_entropy(y0, y0))
        counts = diversity >= diversity.mean()
        return (diversity * certainty / self.temperature).exp(), counts

    def _known(self, y0: Tensor) -> Tensor:
        """Return the moving mean, which is uniform at first."""
        return torch.full_like(y0[0], 1 / y0.shape[1]) if self._mean is None else self._mean

    def state_dict(self) -> dict[str, Any]:
        """Return the moving mean, and the number of steps, which views depend on."""
        return {"mean": self._mean, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._mean, self._steps = state["mean"], state["steps"]


def soft_likelihood_ratio(p: Tensor) -> Tensor:
    r"""Return :math:`-\sum_k p_k \log (p_k / (1 - p_k))`, shape ``(B,)``, with ``p`` below 0.99.

    >>> soft_likelihood_ratio(torch.tensor([[0.8, 0.2]]))
    tensor([-0.8318])
    """
    p = p.clamp(max=_CERTAIN)
    return -(p * (p / (1 - p) + _TINY).log()).sum(1)


def _scaled(values: Tensor) -> Tensor:
    """Return values moved and scaled to [0, 1]; equal ones are 0."""
    least, most = values.aminmax()
    return (values - least) / (most - least).clamp_min(torch.finfo(values.dtype).tiny)
