"""SAR: entropy of reliable samples, towards flat minima; a collapsed network begins anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy

_KEPT = 0.9  # share of the old mean of losses
_TINY = 1e-12


@dataclass
class SAR(TestTimeMethod):
    r"""Sharpness-aware and reliable entropy minimisation (Niu et al., ICLR 2023).

    .. math::

        \min_\theta \; [E(x; \theta) < E_0] \max_{\lVert\epsilon\rVert \le \rho}
        E(x; \theta + \epsilon), \qquad
        \hat\epsilon = \rho \, \nabla_\theta E / \lVert \nabla_\theta E \rVert

    in two passes (eq. 2 to 5): the gradient at :math:`\theta + \hat\epsilon`, of the samples whose
    entropy ``E`` lies below ``E_0`` there too, moves :math:`\theta`. Where the moving mean of that
    loss falls below ``recovery``, the weights have collapsed: weights, optimizer and mean begin
    anew. A batch without a sample that counts changes nothing. In maps ``(B, C, ...)`` the entropy
    is the mean over positions. It needs no prior: any LightningModule will do.

    All norm layers move by default. The paper holds those of the top still, by names: for
    torchvision's ResNet ``parameters=["net.bn1.*", "net.layer[123].*.bn*",
    "net.layer[123].*.downsample.1.*"]``, for timm's ViT-B ``["net.blocks.[0-8].norm*"]``, or a
    function of name and parameter. It advises GroupNorm and LayerNorm; with these alone, batches
    may hold one sample under ``norm_stats="source"``. The learning rate is that of ResNets with
    batches of 64; ViT-B has 1e-3.

    Args:
        margin: ``E_0`` as a share of ``ln C``, that of ``C`` equal probabilities.
        rho: radius in which the sharpest point is sought.
        recovery: ``e_0``, entropy below which the moving mean means collapse; the paper's is of
            1000 classes. A network that is surer than that on all samples would never adapt: lower
            it; 0 never resets.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no classes.

    >>> SAR().defaults["optimizer"]
    'momentum'
    """

    margin: float = 0.4
    rho: float = 0.05
    recovery: float = 0.2
    _mean: float | None = field(default=None, init=False, repr=False, compare=False)
    defaults: ClassVar[Mapping[str, Any]] = {
        "parameters": "norm",
        "norm_stats": "batch",
        "reset": "never",
        "optimizer": "momentum",
        "lr": 2.5e-4,
    }

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"Expected margin > 0, a share of ln C, got {self.margin}.")
        if not 0 <= self.rho < math.inf:
            raise ValueError(f"Expected a finite rho >= 0, got {self.rho}.")
        if not self.recovery >= 0:
            raise ValueError(f"Expected recovery >= 0, got {self.recovery}.")

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy, and whose is low enough."""
        check_classes("SAR", passes.y0)
        entropy = cross_entropy(passes.y0, passes.y0, passes.valid)
        return Objective(entropy, entropy < self.margin * math.log(passes.y0.shape[1]))

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take a step by the gradient at the sharpest point near; recover from collapse."""
        objective = self.loss(passes)
        if objective.empty:
            return objective
        with state.moved_by(self._uphill(state.gradients(objective.loss()))):
            sharp = self.loss(passes.again())
            sharp = replace(sharp, reliable=sharp.reliable & objective.reliable)
            if sharp.empty:
                return objective
            loss = sharp.loss()
            gradients = state.gradients(loss)
        state.step_by(gradients, loss)
        self._recover(loss.item(), state)
        return objective

    def _uphill(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        norm = torch.nn.utils.get_total_norm([*gradients.values()])
        scale = self.rho / (norm + _TINY)
        return {name: scale.to(g.device) * g for name, g in gradients.items()}

    def _recover(self, loss: float, state: Steps) -> None:
        """Let the mean follow the loss; where it is too small, begin anew."""
        self._mean = loss if self._mean is None else _KEPT * self._mean + (1 - _KEPT) * loss
        if self._mean < self.recovery:
            state.reset()
            self._mean = None

    def state_dict(self) -> dict[str, Any]:
        """Return the moving mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._mean = state["mean"]
