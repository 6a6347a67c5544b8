"""CoTTA: a mean teacher, averaged over views, and weights of which some come back at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy
from it3_lightning.methods.views import View, crop_and_flip, drawn_by


@dataclass
class CoTTA(TestTimeMethod):
    r"""Continual test-time adaptation (Wang, Fink, Van Gool and Dai, CVPR 2022).

    .. math::

        L_{\theta_t}(x_t) = -\sum_c y'_{tc} \log \hat y_{tc}, \qquad
        y'_t = \begin{cases}
            f_{\theta'_t}(x_t), & \mathrm{conf}(f_{\theta_0}(x_t)) \geq p_{th} \\
            \frac{1}{N} \sum_i f_{\theta'_t}(\mathrm{aug}_i(x_t)), & \text{otherwise}
        \end{cases}

    (eq. 3 to 5): the teacher :math:`\theta'` is the moving average of the weights (eq. 2), the
    anchor with ``anchor="ema"``, and the confidence is the source's largest probability, on the
    mean of the batch. After each step, each element of a weight goes back to the source with
    probability ``p`` (eq. 7 and 8). All weights adapt, online, with the statistics of the batch.
    The prediction is the teacher's, after the step. It needs no prior: any LightningModule will do.

    The views make it dear: ``N + 2`` passes a step, and again wherever the distance is measured;
    ``measure=False`` leaves that out. Views and restored elements are drawn by ``seed``, and differ
    from step to step.

    Args:
        views: number of augmented views ``N``.
        augment: makes a view of inputs ``(B, ...)``, as transforms of torchvision do. Default:
            :func:`~it3_lightning.methods.views.crop_and_flip`; the paper's, for images in [0, 1],
            are like :func:`~it3_lightning.methods.views.jitter_and_warp`.
        confidence: ``p_th``; the published code takes 0.92 on CIFAR-10-C and 0.72 on CIFAR-100-C.
        restore: probability ``p``.
        seed: of the views and of what is restored.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no class vectors.

    >>> CoTTA().defaults["anchor"], CoTTA().defaults["ema_decay"]
    ('ema', 0.999)
    """

    views: int = 32
    augment: View | None = None
    confidence: float = 0.92
    restore: float = 0.01
    seed: int = 0
    _steps: int = field(default=0, init=False, repr=False, compare=False)
    defaults: ClassVar[Mapping[str, Any]] = {
        "norm_stats": "batch",
        "reset": "never",
        "anchor": "ema",
        "ema_decay": 0.999,
        "optimizer": "adam",
        "lr": 1e-3,
    }

    def __post_init__(self) -> None:
        if self.views < 1:
            raise ValueError(f"Expected at least one view, got {self.views}.")
        for name, value in (("confidence", self.confidence), ("restore", self.restore)):
            if not 0 <= value <= 1:
                raise ValueError(f"Expected {name} in [0, 1], got {value}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the cross-entropy with the teacher's pseudo-labels."""
        check_classes("CoTTA", passes.y0, maps=False)
        measure = cross_entropy(passes.y0, self._pseudo_labels(passes))
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take a step, the teacher following, and restore some elements of the weights."""
        objective = super().step(passes, state)
        if self.restore:
            state.assign(self._restored(state))
        self._steps += 1
        return objective

    def predict(self, passes: Passes) -> Tensor:
        """Return the teacher's prediction."""
        return passes.anchor(passes.inputs)

    def _pseudo_labels(self, passes: Passes) -> Tensor:
        """Return what the teacher says, of views where the source is not confident."""
        inputs = passes.inputs
        if passes.unadapted(inputs).amax(1).mean() >= self.confidence:
            return passes.anchor(inputs)
        augment = crop_and_flip if self.augment is None else self.augment
        with drawn_by(self.seed, self._steps, inputs):
            total = sum(passes.anchor(augment(passes.inputs)) for _ in range(self.views))
        return torch.as_tensor(total) / self.views

    def _restored(self, state: Steps) -> dict[str, Tensor]:
        """Return the weights with some elements as the source has them, on any device the same."""
        restored = {}
        with drawn_by(self.seed, -1 - self._steps):  # other numbers than those of the views
            for name, weight in state.weights.items():
                chosen = (torch.rand(weight.shape) < self.restore).to(weight.device)
                restored[name] = torch.where(chosen, state.source[name], weight)
        return restored

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps, which views and restored elements depend on."""
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._steps = state["steps"]
