"""EATA: entropy of reliable, non-redundant samples; weights that matter to the source are held."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.methods.base import Objective, Passes, Steps, TestTimeMethod
from it3_lightning.methods.terms import check_classes, cross_entropy
from it3_lightning.priors.classes import unrounded

_KEPT = 0.9  # share of the old mean, of which the paper adds 1 - 0.9 of the new


@dataclass
class EATA(TestTimeMethod):
    r"""Efficient test-time adaptation without forgetting (Niu et al., ICML 2022).

    .. math::

        \min_\theta \; S(x) \, E(x; \theta)
        + \beta \sum_i \omega(\theta_i) (\theta_i - \theta_i^o)^2, \qquad
        S(x) = e^{E_0 - E(x; \theta)} \, [E(x; \theta) < E_0] \,
        [\lvert\cos(f_\theta(x), m)\rvert < \epsilon]

    (eq. 3, 5 and 8), averaged over the samples that count, without a gradient through ``S``.
    ``E`` is the entropy, and ``m`` the moving mean of the predictions that were adapted to (eq. 4),
    of which there is none at first.

    The importance :math:`\omega(\theta_i) = \frac{1}{Q} \sum_q (\partial_{\theta_i} L_{CE}(f(x_q),
    \hat y_q))^2`, :math:`\hat y_q` the network's own label (eq. 9), is measured on source data:
    ``Trainer(callbacks=[callback]).validate(model, loader)``, once, before a test. Without it
    (``fisher_weight=0``, the paper's "ETA") no source data are needed. It needs no prior: any
    LightningModule will do.

    The published code squares the mean gradient of a batch of 64, not each sample's as eq. 9 has
    it. That makes its importance smaller, up to 64 times, at the same weight.

    Args:
        margin: ``E_0`` as a share of ``ln C``, that of ``C`` equal probabilities.
        epsilon: cosine similarity to ``m`` from which a sample is redundant. With few classes it
            must be larger: where ``m`` is uniform, a certain prediction has ``1 / sqrt(C)``, 0.32
            of ten classes, for which the paper takes 0.4.
        fisher_weight: ``beta``; the paper takes 2000 on ImageNet and 1 on CIFAR-10.
        fisher_samples: ``Q``, of the source data, the first; each costs a backward pass.

    Raises:
        ValueError: a value is out of range; when evaluated, predictions that are no class vectors,
            or weights whose importance was not measured.

    >>> EATA().needs_source, EATA(fisher_weight=0).needs_source
    (True, False)
    """

    margin: float = 0.4
    epsilon: float = 0.05
    fisher_weight: float = 2000.0
    fisher_samples: int = 2000
    _mean: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _fisher: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _seen: int = field(default=0, init=False, repr=False, compare=False)
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
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"Expected epsilon in [0, 1], got {self.epsilon}.")
        if not self.fisher_weight >= 0:
            raise ValueError(f"Expected fisher_weight >= 0, got {self.fisher_weight}.")
        if self.fisher_samples < 1:
            raise ValueError(f"Expected fisher_samples >= 1, got {self.fisher_samples}.")

    @property
    def needs_source(self) -> bool:
        """Whether weights are held by their importance to the source."""
        return self.fisher_weight > 0

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the weighted entropy, which samples count, and the regulariser."""
        check_classes("EATA", passes.y0, maps=False)
        entropy = cross_entropy(passes.y0, passes.y0)
        limit = self.margin * math.log(passes.y0.shape[1])
        reliable = (entropy < limit) & ~self._redundant(passes.y0.detach())
        weights = (limit - entropy.detach()).exp()
        return Objective(entropy, reliable, self._forgetting(passes), (weights - 1) * entropy)

    def step(self, passes: Passes, state: Steps) -> Objective:
        """Take a step, if a sample counts, and let the mean follow these samples' predictions."""
        objective = self.loss(passes)
        if objective.reliable.any():
            state.step(objective.loss())
            mean = passes.y0.detach()[objective.reliable].mean(0)
            self._mean = mean if self._mean is None else _KEPT * self._mean + (1 - _KEPT) * mean
        return objective

    def _redundant(self, y0: Tensor) -> Tensor:
        if self._mean is None:
            return torch.zeros(len(y0), dtype=torch.bool, device=y0.device)
        return F.cosine_similarity(y0, self._mean[None], dim=1).abs() >= self.epsilon

    def _forgetting(self, passes: Passes) -> Tensor | None:
        """Return the regulariser, ``None`` where there is none."""
        if not self.needs_source:
            return None
        if unknown := [name for name in passes.weights if name not in self._fisher]:
            raise ValueError(
                f"EATA must know how much {unknown[0]!r} matters to the source, and has measured "
                f"{len(self._fisher)} other weights. Show it source data with the same parameters, "
                "by Trainer(callbacks=[callback]).validate(model, loader), or set fisher_weight=0."
            )
        terms = [
            (self._fisher[name].to(weight.device) * (weight - passes.source[name]).square()).sum()
            for name, weight in passes.weights.items()
        ]
        return self.fisher_weight * sum(terms[1:], terms[0])

    def fit_source(self, passes: Passes) -> None:
        """Let the importance of each weight be the mean over these samples, too."""
        if not self.needs_source:
            return
        check_classes("EATA", passes.y0, maps=False)
        own = F.one_hot(passes.y0.argmax(1), passes.y0.shape[1])
        for loss in cross_entropy(passes.y0, own)[: self.fisher_samples - self._seen]:
            self._seen += 1
            weights = [*passes.weights.values()]
            found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)
            for name, gradient in zip(passes.weights, found, strict=True):
                square = unrounded(gradient).square()
                before = self._fisher.get(name, torch.zeros_like(square))
                self._fisher[name] = before + (square - before) / self._seen

    def source_dict(self) -> dict[str, Any]:
        """Return the importance of each weight, and the number of samples it was measured on."""
        return {"fisher": dict(self._fisher), "samples": self._seen} if self._fisher else {}

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        """Take them back; from nothing, begin anew."""
        self._fisher, self._seen = dict(source.get("fisher", {})), source.get("samples", 0)

    def state_dict(self) -> dict[str, Any]:
        """Return the moving mean."""
        return {"mean": self._mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self._mean = state["mean"]
