r"""LAME: predictions of near samples drawn together, by the batch as a whole; no weight moves.

:math:`\min_Z \sum_i \mathrm{KL}(z_i \| p_i) - \sum_{i,j} w_{ij} z_i^\top z_j`, each :math:`z_i` a
distribution over classes, by :math:`z_i \propto p_i \circ \exp(\sum_j w_{ij} z_j)` again and again
(Boudiaf, Mueller, Ben Ayed and Bertinetto, CVPR 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.tent import Entropy
from it3_lightning.methods.terms import check_classes, samples_of
from it3_lightning.priors.classes import unrounded
from it3_lightning.utils.messages import unknown

Affinity = Literal["knn", "rbf", "linear"]

_MOST = 100  # iterations
_STILL = 1e-8  # share of the objective: it has converged where it changes by less


@dataclass(frozen=True)
class LAME(TestTimeMethod):
    r"""Laplacian-adjusted maximum-likelihood estimation (Boudiaf et al., CVPR 2022).

    For streams in which near samples are of one class, as frames of a video: where they are not,
    it gains nothing. What is logged is the entropy of the network's own prediction. It needs no
    prior: any LightningModule will do.

    Args:
        affinity: :math:`w_{ij}` of features of length 1. ``"knn"``: 1 where j is among the nearest
            neighbours of i, else 0; ``"rbf"``: :math:`\exp(-d_{ij}^2 / 2 \sigma^2)`,
            :math:`\sigma` the mean distance to the last of the nearest, of which a sample itself is
            the first; ``"linear"``: the inner product.
        neighbours: how many are the nearest.
        layers: whose outputs are the features, side by side: name the last one before the
            classifier, as the paper does. Default: the probabilities themselves.

    Raises:
        ValueError: the affinity is unknown or there is no neighbour; when evaluated, predictions
            without classes, or maps.

    >>> LAME().neighbours
    5
    """

    affinity: Affinity = "knn"
    neighbours: int = 5
    layers: Sequence[str] = ()
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0}

    def __post_init__(self) -> None:
        if self.affinity not in get_args(Affinity):
            raise ValueError(unknown("affinity", self.affinity, get_args(Affinity)))
        if self.neighbours < 1:
            raise ValueError(f"Expected neighbours >= 1, got {self.neighbours}.")

    @property
    def needs_batch(self) -> bool:
        """A sample alone has no neighbours."""
        return True

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the network's prediction."""
        check_classes("LAME", passes.y0, maps=False)
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        """Return the assignments of the whole batch."""
        y0 = unrounded(passes.y0)
        named = [(name, passes.features(name)) for name in self.layers]
        features = [samples_of(each, name, len(y0)).flatten(1) for name, each in named]
        return assignments(y0, self._weights(F.normalize(torch.cat(features or [y0], 1))))

    def _weights(self, features: Tensor) -> Tensor:
        if self.affinity == "linear":
            return features @ features.T
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        count = len(features)
        if self.affinity == "rbf":
            nearest = distances.topk(min(self.neighbours, count), largest=False).values
            square = nearest[:, -1].mean().square().clamp_min(torch.finfo(features.dtype).tiny)
            return (-distances.square() / (2 * square)).exp()
        distances.fill_diagonal_(torch.inf)
        nearest = distances.topk(min(self.neighbours, count - 1), largest=False).indices
        return torch.zeros_like(distances).scatter_(1, nearest, 1.0)


def assignments(p: Tensor, w: Tensor) -> Tensor:
    """Return the assignments ``z`` ``(B, C)`` that LAME comes to.

    Args:
        p: predictions ``(B, C)``.
        w: affinities ``(B, B)``.

    >>> p = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    >>> assignments(p, torch.ones(2, 2) - torch.eye(2)).argmax(1)
    tensor([0, 0])
    """
    tiny = torch.finfo(p.dtype).tiny
    log_p = p.clamp_min(tiny).log()
    z, before = p, torch.inf
    for step in range(_MOST):
        exponents = log_p + w @ z
        z = exponents.softmax(1)
        bound = float((z * (z.clamp_min(tiny).log() - exponents)).sum())
        if step > 1 and abs(bound - before) <= _STILL * abs(before):
            break
        before = bound
    return z
