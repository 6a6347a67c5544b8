r"""T3A: a classifier of prototypes, which confident predictions of the stream adjust; no gradient.

:math:`S_k = \{\omega_k / \|\omega_k\|\}` at first, of the classifier's own weights; each feature
:math:`z / \|z\|` joins the supports of the class it is predicted to be; of each class the ``M``
with the least entropy stay; :math:`p(k \mid z) \propto \exp(z^\top c_k)`, :math:`c_k` the mean of
:math:`S_k`, of length 1 (Iwasawa and Matsuo, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from it3_lightning.methods.base import Objective, Passes, TestTimeMethod
from it3_lightning.methods.tent import Entropy
from it3_lightning.methods.terms import check_classes, cross_entropy, samples_of

Supports = dict[str, Tensor]
"""``features`` ``(N, D)`` of length 1, their ``classes`` ``(N,)`` and ``entropies`` ``(N,)``."""


@dataclass(eq=False)
class T3A(TestTimeMethod):
    """Test-time template adjuster (Iwasawa and Matsuo, NeurIPS 2021).

    Supports are carried along the stream; the weights stay. What is logged is the entropy of the
    network's own prediction. It needs no prior: any LightningModule will do.

    Args:
        layer: the last linear layer, as ``"net.fc"``: what enters it are the features, and its
            weights, one row for each class, are the first supports.
        filter_k: how many supports ``M`` of each class stay; -1: all.

    Raises:
        ValueError: ``filter_k`` is neither -1 nor at least 1; when evaluated, predictions without
            classes, or maps, or a layer that is not linear with one output for each class.

    >>> T3A("net.fc").defaults["reset"]
    'never'
    """

    layer: str
    filter_k: int = 100
    defaults: ClassVar[Mapping[str, Any]] = {"steps": 0, "reset": "never"}
    _supports: Supports = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.filter_k != -1 and self.filter_k < 1:
            raise ValueError(f"Expected filter_k >= 1, or -1 for all, got {self.filter_k}.")
        self.layers = (self.layer,)

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the entropy of the network's prediction."""
        check_classes("T3A", passes.y0, maps=False)
        return Entropy().loss(passes)

    def predict(self, passes: Passes) -> Tensor:
        """Take the batch among the supports, and classify it by them."""
        y0, classes = passes.y0, passes.y0.shape[1]
        z = samples_of(passes.features(self.layer, entering=True), self.layer, len(y0))
        supports = self._supports or _first_supports(passes.layers[self.layer], self.layer, classes)
        supports = _joined(supports, _supports_of(z, y0.argmax(1), cross_entropy(y0, y0)))
        counts = supports["classes"].bincount(minlength=classes)
        self._supports, counts = _filtered(supports, counts, self.filter_k)
        sums = torch.segment_reduce(self._supports["features"], "sum", lengths=counts)
        prediction: Tensor = (z @ F.normalize(sums).to(z).T).softmax(1)
        return prediction

    def state_dict(self) -> dict[str, Any]:
        """Return the supports."""
        return dict(self._supports)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take supports; none: begin with the weights of the classifier."""
        self._supports = dict(state)


def _supports_of(features: Tensor, classes: Tensor, entropies: Tensor) -> Supports:
    return {"features": F.normalize(features), "classes": classes, "entropies": entropies}


def _first_supports(layer: nn.Module, name: str, classes: int) -> Supports:
    """Return the classifier's weights as supports, each of its own class."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or len(weight) != classes:
        raise ValueError(
            f"Expected the layer {name!r} to be linear, with one output for each of {classes} "
            f"classes, got {layer}. Name the last linear layer."
        )
    p = F.linear(weight, weight, bias).softmax(1)
    own = torch.arange(classes, device=weight.device)
    return _supports_of(weight.detach(), own, cross_entropy(p, p))


def _joined(supports: Supports, more: Supports) -> Supports:
    return {name: torch.cat([values, more[name].to(values)]) for name, values in supports.items()}


def _filtered(supports: Supports, counts: Tensor, most: int) -> tuple[Supports, Tensor]:
    """Return the supports class by class, the least entropy first, and how many there are.

    Args:
        supports: all of them.
        counts: how many there are of each class.
        most: of each class that stay; -1: all.
    """
    order = supports["entropies"].argsort(stable=True)
    order = order[supports["classes"][order].argsort(stable=True)]
    if most != -1:
        firsts = counts.cumsum(0) - counts
        ranks = torch.arange(len(order), device=order.device) - firsts.repeat_interleave(counts)
        order, counts = order[ranks < most], counts.clamp_max(most)
    return {name: values[order] for name, values in supports.items()}, counts
