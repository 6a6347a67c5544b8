"""Per-sample distances between two predictions, by name or as a callable.

Both arguments live in *label space* (probabilities for classes, scaled values for regression), as a
:class:`~it3_lightning.priors.Prior` makes them. Every distance sums over the channels (dimension 1)
and averages over positions, so a mask of 512 x 512 pixels weighs as much as a class vector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from it3_lightning.messages import unknown

DistanceName = Literal["l2", "l1", "js", "kl", "cross_entropy"]
Distance = Callable[[Tensor, Tensor], Tensor]

_TINY = 1e-12  # keeps log(0) finite; far below the rounding of a float32 softmax


def l2(p: Tensor, q: Tensor) -> Tensor:
    r"""Return the squared L2 distance :math:`\sum_k (p_k - q_k)^2`, shape ``(B,)``.

    >>> import torch
    >>> l2(torch.tensor([[0.8, 0.2]]), torch.tensor([[0.6, 0.4]]))
    tensor([0.0800])
    """
    return _per_sample((p - q).square())


def l1(p: Tensor, q: Tensor) -> Tensor:
    r"""Return the absolute distance :math:`\sum_k |p_k - q_k|`, shape ``(B,)``.

    >>> import torch
    >>> l1(torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.5000])
    """
    return _per_sample((p - q).abs())


def kl(p: Tensor, q: Tensor) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p \| q) = \sum_k p_k \log (p_k / q_k)` in nats, shape ``(B,)``.

    >>> import torch
    >>> kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.6931])
    """
    return _per_sample(p * (_log(p) - _log(q)))


def js(p: Tensor, q: Tensor) -> Tensor:
    r"""Return the Jensen-Shannon divergence in nats, between 0 and ln 2, shape ``(B,)``.

    :math:`\tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m)` with :math:`m = (p + q)/2`.

    >>> import torch
    >>> js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.6931])
    """
    middle = (p + q) / 2
    return (kl(p, middle) + kl(q, middle)) / 2


def cross_entropy(p: Tensor, q: Tensor) -> Tensor:
    r"""Return :math:`-\sum_k q_k \log p_k` in nats, the target being ``q``, shape ``(B,)``.

    >>> import torch
    >>> cross_entropy(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    return _per_sample(-q * _log(p))


def get_distance(distance: DistanceName | Distance) -> Distance:
    """Return the distance of this name, or the callable itself.

    Args:
        distance: one of ``"l2"``, ``"l1"``, ``"js"``, ``"kl"``, ``"cross_entropy"``, or a callable
            ``(B, C, ...), (B, C, ...) -> (B,)``.

    Raises:
        ValueError: the name is unknown.
    """
    if callable(distance):
        return distance
    if distance not in _BY_NAME:
        raise ValueError(unknown("distance", distance, get_args(DistanceName)))
    return _BY_NAME[distance]


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(max(_TINY, torch.finfo(p.dtype).tiny)).log()  # float16 ends before _TINY


def _per_sample(values: Tensor) -> Tensor:
    """Sum over channels, average over positions: ``(B, C, ...) -> (B,)``."""
    if values.ndim < 2:
        return values
    summed = values.sum(dim=1)
    return summed.flatten(1).mean(dim=1) if summed.ndim > 1 else summed


_BY_NAME: dict[str, Distance] = {
    "l2": l2,
    "l1": l1,
    "js": js,
    "kl": kl,
    "cross_entropy": cross_entropy,
}
