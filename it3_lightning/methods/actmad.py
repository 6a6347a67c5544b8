r"""ActMAD: means and variances of activations drawn back to those on source data.

:math:`\mathcal{L}(\theta) = \sum_l |\mu_l(B; \theta) - \hat\mu_l|_1 +
|\sigma^2_l(B; \theta) - \hat\sigma^2_l|_1`, :math:`\mu_l` and :math:`\sigma^2_l` over the samples
of the batch at each channel and position of what layer :math:`l` puts out, :math:`|\cdot|_1` the
mean over these (Mirza, Soneira, Lin, Kozinski, Possegger and Bischof, CVPR 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from it3_lightning.methods.base import Layers, Objective, Passes, TestTimeMethod
from it3_lightning.methods.terms import samples_of

Moments = dict[str, Any]
"""Samples that were seen, ``count``; their ``mean``; ``squares``, the sum of squares about it."""


@dataclass(eq=False)
class ActMAD(TestTimeMethod):
    """Activation matching (Mirza et al., CVPR 2023).

    Online, all weights, by SGD with momentum and the learning rate of the paper's code for
    CIFAR-100 (1e-2 there for CIFAR-10, 2.5e-4 for ImageNet, 1e-4 for KITTI; that code also decays
    weights, and its momentum is Nesterov's). BatchNorm layers keep the statistics of the source.

    It must see source data first, and test inputs of the same size. It needs neither a prior nor
    classes: with ``IT3Mixin``, modules that predict values or masks will do, too.

    Args:
        layers: whose outputs are compared; default: those of all norm layers.

    Raises:
        ValueError: no layers; when evaluated, features that differ in shape from those on source
            data.
        RuntimeError: when evaluated, source data were not seen.

    >>> ActMAD().defaults["optimizer"]
    'momentum'
    """

    layers: Layers = "norm"
    defaults: ClassVar[Mapping[str, Any]] = {"optimizer": "momentum", "lr": 1e-3, "reset": "never"}
    _source: dict[str, Moments] = field(init=False, repr=False, default_factory=dict)
    _targets: dict[str, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Expected at least one layer, or 'norm', got none.")

    @property
    def needs_batch(self) -> bool:
        """A sample alone has no variance."""
        return True

    @property
    def needs_source(self) -> bool:
        """What activations are drawn to was measured on source data."""
        return True

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the distance between the statistics, of the batch as a whole."""
        distance = torch.stack([self._distance(passes, name) for name in passes.layers]).sum()
        measure = distance.expand(len(passes.outputs))
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))

    def _distance(self, passes: Passes, name: str) -> Tensor:
        if name not in self._source:
            raise RuntimeError(
                f"ActMAD has not seen what the layer {name!r} puts out on source data. Show the "
                "adapter some first: adapter.fit_source(inputs); a Trainer: validate."
            )
        var, mean = torch.var_mean(_features(passes, name), dim=0)
        _check_shape(name, mean, self._source[name]["mean"])
        target_mean, target_var = self._target(name, mean)
        return (mean - target_mean).abs().mean() + (var - target_var).abs().mean()

    def _target(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance on source data, of the kind and where they are needed."""
        known = self._targets.get(name)
        if known is None or (known[0].device, known[0].dtype) != (like.device, like.dtype):
            seen = self._source[name]
            variance = seen["squares"] / (seen["count"] - 1)
            known = self._targets[name] = seen["mean"].to(like), variance.to(like)
        return known

    def fit_source(self, passes: Passes) -> None:
        """Pool the moments of a batch with those of all before, exactly."""
        self._targets = {}
        for name in passes.layers:
            features = _features(passes, name).detach()
            var, mean = torch.var_mean(features, dim=0, correction=0)
            var, mean = var.cpu().double(), mean.cpu().double()
            new = {"count": len(features), "mean": mean, "squares": len(features) * var}
            old = self._source.get(name)
            self._source[name] = new if old is None else _pooled(name, old, new)

    def source_dict(self) -> dict[str, Any]:
        """Return the moments of each layer."""
        return dict(self._source)

    def load_source_dict(self, source: Mapping[str, Any]) -> None:
        """Take moments; none: begin anew."""
        self._source, self._targets = dict(source), {}


def _features(passes: Passes, name: str) -> Tensor:
    return samples_of(passes.features(name), name, len(passes.outputs))


def _pooled(name: str, old: Moments, new: Moments) -> Moments:
    """Return the moments of two sets of samples together (Chan et al., 1979)."""
    _check_shape(name, new["mean"], old["mean"])
    count = old["count"] + new["count"]
    apart = new["mean"] - old["mean"]
    mean = old["mean"] + apart * new["count"] / count
    squares = old["squares"] + new["squares"]
    squares = squares + apart.square() * old["count"] * new["count"] / count
    return {"count": count, "mean": mean, "squares": squares}


def _check_shape(name: str, found: Tensor, seen: Tensor) -> None:
    if found.shape != seen.shape:
        raise ValueError(
            f"Expected each sample's features {tuple(seen.shape)} at the layer {name!r}, as on the "
            f"source data that were seen first, got {tuple(found.shape)}. ActMAD compares every "
            "position: use inputs of one size."
        )
