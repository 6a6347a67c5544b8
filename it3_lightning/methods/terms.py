"""Terms that methods share: distances between predictions, filters, balance, sharpening.

Both arguments live in *label space* (probabilities for classes, scaled values for regression), as a
:class:`~it3_lightning.priors.Prior` makes them. Every distance sums over the channels (dimension 1)
and averages over positions, so a mask of 512 x 512 pixels weighs as much as a class vector. Of
padded series and maps, ``valid``, ``(B, ...)`` booleans, says which positions count; the others
have no part in anything here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from it3_lightning.priors.classes import unrounded
from it3_lightning.utils.messages import unknown

DistanceName = Literal["l2", "l1", "js", "kl", "cross_entropy"]


Distance = Callable[[Tensor, Tensor], Tensor]


_TINY = 1e-12  # keeps log(0) finite; far below the rounding of a float32 softmax


def l2(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return the squared L2 distance :math:`\sum_k (p_k - q_k)^2`, shape ``(B,)``.

    >>> import torch
    >>> l2(torch.tensor([[0.8, 0.2]]), torch.tensor([[0.6, 0.4]]))
    tensor([0.0800])
    >>> p, q = torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[0.0, 0.0]]])
    >>> l2(p, q), l2(p, q, torch.tensor([[True, False]]))
    (tensor([13.]), tensor([1.]))
    """
    return _per_sample((p - q).square(), valid)


def l1(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return the absolute distance :math:`\sum_k |p_k - q_k|`, shape ``(B,)``.

    >>> import torch
    >>> l1(torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.5000])
    """
    return _per_sample((p - q).abs(), valid)


def kl(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return :math:`\mathrm{KL}(p \| q) = \sum_k p_k \log (p_k / q_k)` in nats, shape ``(B,)``.

    >>> import torch
    >>> kl(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
    tensor([0.6931])
    """
    return _per_sample(p * (_log(p) - _log(q)), valid)


def js(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return the Jensen-Shannon divergence in nats, between 0 and ln 2, shape ``(B,)``.

    :math:`\tfrac12 \mathrm{KL}(p \| m) + \tfrac12 \mathrm{KL}(q \| m)` with :math:`m = (p + q)/2`.

    >>> import torch
    >>> js(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    tensor([0.6931])
    """
    middle = (p + q) / 2
    return (kl(p, middle, valid) + kl(q, middle, valid)) / 2


def cross_entropy(p: Tensor, q: Tensor, valid: Tensor | None = None) -> Tensor:
    r"""Return :math:`-\sum_k q_k \log p_k` in nats, the target being ``q``, shape ``(B,)``.

    >>> import torch
    >>> cross_entropy(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]]))
    tensor([0.6931])
    """
    return _per_sample(-q * _log(p), valid)


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


def measured(
    distance: DistanceName | Distance, p: Tensor, q: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Return a distance over the positions that are valid, ``(B,)``.

    A callable of one's own is shown predictions that are equal at the others.
    """
    found = get_distance(distance)
    if valid is None:
        return found(p, q)
    if found not in _BY_NAME.values():
        return found(p, torch.where(valid.unsqueeze(1), q, p))
    of_valid: Tensor = found(p, q, valid)  # type: ignore[call-arg]
    return of_valid


def _log(p: Tensor) -> Tensor:
    return p.clamp_min(max(_TINY, torch.finfo(p.dtype).tiny)).log()  # float16 ends before _TINY


def _per_sample(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum over channels, average over positions: ``(B, C, ...) -> (B,)``."""
    return values if values.ndim < 2 else _mean_of_positions(values.sum(dim=1), valid)


_BY_NAME: dict[str, Distance] = {
    "l2": l2,
    "l1": l1,
    "js": js,
    "kl": kl,
    "cross_entropy": cross_entropy,
}


_ROUNDING = 1e-2  # of a sum of probabilities, bfloat16 included


def confident(y0: Tensor, threshold: float | None, valid: Tensor | None = None) -> Tensor:
    """Return ``(B,)``: largest class probability (mean over positions) above the threshold.

    >>> confident(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), 0.6)
    tensor([ True, False])
    """
    if threshold is None or not _may_be_classes(y0):
        return torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
    return (_mean_of_positions(y0.detach().amax(1), valid) > threshold) | ~_are_classes(y0)


def agreeing(
    y0: Tensor, y1: Tensor, threshold: float | None, valid: Tensor | None = None
) -> Tensor:
    """Return ``(B,)``: both name the same class; in maps, at a larger share than the threshold.

    >>> agreeing(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]]), 0.6)
    tensor([False])
    """
    if threshold is None or not _may_be_classes(y0):
        return torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
    same = (y0.argmax(1) == y1.argmax(1)).float()
    return (_mean_of_positions(same, valid) > threshold) | ~_are_classes(y0)


def balance_term(y0: Tensor, weight: float, valid: Tensor | None = None) -> Tensor | None:
    r"""Return :math:`w \sum_k m_k \log m_k`, ``m`` the mean prediction; ``None`` for weight 0.

    >>> balance_term(torch.eye(2), 1.0)
    tensor(-0.6931)
    """
    if weight == 0:
        return None
    check_classes("The balance term", y0)
    rows = y0.movedim(1, -1).flatten(0, -2)
    if valid is None:
        mean = rows.mean(0, keepdim=True)
    else:
        mean = _mean_of_positions(rows.T, valid.reshape(1, -1))[None]
    return -weight * cross_entropy(mean, mean)[0]


def sharpen_term(y0: Tensor, weight: float, valid: Tensor | None = None) -> Tensor | None:
    r"""Return :math:`-w \sum_k p_k \log p_k`, ``(B,)``; ``None`` without weight or classes.

    >>> sharpen_term(torch.tensor([[0.5, 0.5]]), 2.0)
    tensor([1.3863])
    """
    if weight == 0 or not _may_be_classes(y0):
        return None
    return torch.where(_are_classes(y0), weight * cross_entropy(y0, y0, valid), 0.0)


def _may_be_classes(y0: Tensor) -> bool:
    return y0.ndim > 1 and y0.shape[1] > 1 and y0.numel() > 0


def _are_classes(y0: Tensor) -> Tensor:
    """Whether all predictions are distributions over classes: a boolean tensor, no wait for it."""
    values = y0.detach()
    return (values.amin() >= 0) & ((values.sum(1) - 1).abs().amax() < _ROUNDING)


def _mean_of_positions(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Average over positions, those that are valid: ``(B, ...) -> (B,)``; 0 where none is."""
    if values.ndim < 2:
        return values
    if valid is None:
        return values.flatten(1).mean(1)
    counted = torch.where(valid, values, 0.0).flatten(1).sum(1)
    return counted / valid.flatten(1).sum(1).clamp_min(1)


def check_classes(what: str, y0: Tensor, *, maps: bool = True) -> None:
    """Check that predictions have several channels.

    Args:
        what: needs them.
        y0: ``(B, C, ...)``.
        maps: whether predictions may have positions, too.

    Raises:
        ValueError: they do not.
    """
    if y0.ndim < 2 or y0.shape[1] < 2:
        raise ValueError(
            f"{what} needs class probabilities (B, C, ...) with C >= 2, got {tuple(y0.shape)}. "
            "Leave it out for values and binary masks."
        )
    if y0.ndim > 2 and not maps:
        raise ValueError(
            f"{what} needs one class vector (B, C) of each sample, got maps {tuple(y0.shape)}. "
            "For maps use SAR, Tent or Entropy, which average over positions."
        )


def samples_of(features: Any, layer: str, count: int) -> Tensor:
    """Return what entered a layer or left it, one tensor of all samples, in full precision.

    Raises:
        ValueError: it is not ``(B, ...)``.

    >>> samples_of(torch.ones(2, 3), "layer", 2).shape
    torch.Size([2, 3])
    """
    if isinstance(features, Tensor) and features.ndim > 1 and len(features) == count:
        return unrounded(features)
    got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
    raise ValueError(
        f"Expected features (B, ...) of {count} samples at the layer {layer!r}, got {got}. Name a "
        "layer that takes and puts out one tensor with the samples first."
    )


def check_settings(reliability: float | None, balance: float, sharpen: float = 0.0) -> None:
    """Check the settings that all objectives have.

    Raises:
        ValueError: one is out of range.
    """
    if reliability is not None and not 0 <= reliability <= 1:
        raise ValueError(f"Expected reliability in [0, 1] or None, got {reliability}.")
    if balance < 0:
        raise ValueError(f"Expected balance >= 0, got {balance}.")
    if sharpen < 0:
        raise ValueError(f"Expected sharpen >= 0, got {sharpen}.")
