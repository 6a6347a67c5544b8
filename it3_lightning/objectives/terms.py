"""What objectives share: which samples are reliable, and the balance over classes."""

from __future__ import annotations

import torch
from torch import Tensor

from it3_lightning.distances import cross_entropy

_ROUNDING = 1e-2  # of a sum of probabilities, bfloat16 included


def confident(y0: Tensor, threshold: float | None) -> Tensor:
    """Return ``(B,)``: largest class probability (mean over positions) above the threshold.

    >>> confident(torch.tensor([[0.9, 0.1], [0.5, 0.5]]), 0.6)
    tensor([ True, False])
    """
    if threshold is None or not _may_be_classes(y0):
        return torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
    return (_per_sample(y0.detach().amax(1)) > threshold) | ~_are_classes(y0)


def agreeing(y0: Tensor, y1: Tensor, threshold: float | None) -> Tensor:
    """Return ``(B,)``: both name the same class; in maps, at a larger share than the threshold.

    >>> agreeing(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]]), 0.6)
    tensor([False])
    """
    if threshold is None or not _may_be_classes(y0):
        return torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
    same = (y0.argmax(1) == y1.argmax(1)).float()
    return (_per_sample(same) > threshold) | ~_are_classes(y0)


def balance_term(y0: Tensor, weight: float) -> Tensor | None:
    r"""Return :math:`w \sum_k m_k \log m_k`, ``m`` the mean prediction; ``None`` for weight 0.

    >>> balance_term(torch.eye(2), 1.0)
    tensor(-0.6931)
    """
    if weight == 0:
        return None
    check_classes("The balance term", y0)
    mean = y0.movedim(1, -1).flatten(0, -2).mean(0, keepdim=True)
    return -weight * cross_entropy(mean, mean)[0]


def sharpen_term(y0: Tensor, weight: float) -> Tensor | None:
    r"""Return :math:`-w \sum_k p_k \log p_k`, ``(B,)``; ``None`` without weight or classes.

    >>> sharpen_term(torch.tensor([[0.5, 0.5]]), 2.0)
    tensor([1.3863])
    """
    if weight == 0 or not _may_be_classes(y0):
        return None
    return torch.where(_are_classes(y0), weight * cross_entropy(y0, y0), 0.0)


def _may_be_classes(y0: Tensor) -> bool:
    return y0.ndim > 1 and y0.shape[1] > 1 and y0.numel() > 0


def _are_classes(y0: Tensor) -> Tensor:
    """Whether all predictions are distributions over classes: a boolean tensor, no wait for it."""
    values = y0.detach()
    return (values.amin() >= 0) & ((values.sum(1) - 1).abs().amax() < _ROUNDING)


def _per_sample(values: Tensor) -> Tensor:
    """Average over positions: ``(B, ...) -> (B,)``."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def check_classes(what: str, y0: Tensor) -> None:
    """Check that predictions have several channels.

    Raises:
        ValueError: they do not.
    """
    if y0.ndim < 2 or y0.shape[1] < 2:
        raise ValueError(
            f"{what} needs class probabilities (B, C, ...) with C >= 2, got {tuple(y0.shape)}. "
            "Leave it out for values and binary masks."
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
