"""Correctness, completeness and quality of roads: counts of pixels, matched within a tolerance."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


def near(masks: Tensor, tolerance: float) -> Tensor:
    """Return which pixels lie within a distance of a pixel of the mask.

    Args:
        masks: ``(B, 1, H, W)``, bool.
        tolerance: largest Euclidean distance between centres of pixels, in pixels.

    >>> line = torch.tensor([[[[True, False, False, False]]]])
    >>> near(line, 2.0).int().tolist()
    [[[[1, 1, 1, 0]]]]
    """
    reach = math.floor(tolerance)
    offsets = torch.arange(-reach, reach + 1, device=masks.device)
    disk = offsets[:, None] ** 2 + offsets**2 <= tolerance**2
    found = F.conv2d(masks.float(), disk[None, None].float(), padding=reach)
    return found > 0.5


def relaxed_counts(preds: Tensor, target: Tensor, tolerance: float) -> Tensor:
    """Count road pixels: predicted, those of them near a true one, true, near a predicted one.

    Args:
        preds: ``(B, 1, H, W)`` or ``(B, H, W)``, 0 and 1, or probabilities, of which those above
            0.5 are road.
        target: of the same shape, 0 and 1.
        tolerance: see :func:`near`.

    Returns:
        ``(4,)``, int64.

    Raises:
        ValueError: The shapes differ, or there are several channels.

    >>> preds, target = torch.tensor([[[1, 1, 0, 0, 0]]]), torch.tensor([[[0, 0, 1, 1, 1]]])
    >>> relaxed_counts(preds, target, 1.0).tolist()
    [2, 1, 3, 1]
    """
    if preds.shape != target.shape or not (
        preds.ndim == 3 or (preds.ndim == 4 and preds.shape[1] == 1)
    ):
        raise ValueError(
            "Expected predictions and target of one shape, (B, 1, H, W) or (B, H, W), got "
            f"{tuple(preds.shape)} and {tuple(target.shape)}. Give binary masks."
        )
    found, true = ((masks > 0.5).reshape(-1, 1, *masks.shape[-2:]) for masks in (preds, target))
    matched = found & near(true, tolerance), true & near(found, tolerance)
    return torch.stack([mask.sum() for mask in (found, matched[0], true, matched[1])])


class RelaxedScore(Metric, ABC):
    r"""A score of road pixels that counts a pixel as right within a tolerance.

    With :math:`P` the predicted and :math:`T` the true road pixels of all samples, and
    :math:`P_\rho \subseteq P` those within :math:`\rho` pixels of a true one,
    :math:`T_\rho \subseteq T` those within :math:`\rho` of a predicted one (Euclidean distance
    between centres, within one image). An empty denominator gives 0. The scores are those of
    Wiedemann, Heipke, Mayer and Jamet, "Empirical Evaluation of Automatically Extracted Road Axes"
    (1998), with pixels in the place of lengths of road axes, as the relaxed precision and recall
    of Mnih and Hinton, "Learning to Detect Roads in High-Resolution Aerial Images" (ECCV 2010,
    where :math:`\rho = 3`). Roads are not thinned to axes: wide ones count more.

    Args:
        tolerance: :math:`\rho`, in pixels.
        kwargs: of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: ``tolerance`` is negative.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(self, tolerance: float = 3.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if tolerance < 0:
            raise ValueError(f"Expected tolerance >= 0 pixels, got {tolerance}.")
        self.tolerance = tolerance
        self.add_state("counts", torch.zeros(4, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count a batch; see :func:`relaxed_counts`."""
        self.counts += relaxed_counts(preds, target, self.tolerance)

    @abstractmethod
    def compute(self) -> Tensor:
        """Return the score of all that was counted, a scalar between 0 and 1."""


class Correctness(RelaxedScore):
    r"""Share of predicted road pixels that are right, :math:`|P_\rho| / |P|`: relaxed precision.

    >>> score = Correctness(tolerance=1.0)
    >>> score(torch.tensor([[[1, 1, 0, 0, 0]]]), torch.tensor([[[0, 0, 1, 1, 1]]])).item()
    0.5
    """

    def compute(self) -> Tensor:
        """Return matched predicted over predicted pixels."""
        predicted, right, _, _ = self.counts.unbind()
        return right / predicted.clamp_min(1)


class Completeness(RelaxedScore):
    r"""Share of true road pixels that were found, :math:`|T_\rho| / |T|`: relaxed recall.

    >>> score = Completeness(tolerance=1.0)
    >>> score(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[0, 0, 1, 1]]])).item()
    0.5
    """

    def compute(self) -> Tensor:
        """Return matched true over true pixels."""
        _, _, true, found = self.counts.unbind()
        return found / true.clamp_min(1)


class Quality(RelaxedScore):
    r"""Both in one number, :math:`TP / (TP + FP + FN)`.

    As Wiedemann et al. have it, ``TP`` and ``FP`` are the matched and unmatched predicted pixels,
    and ``FN`` the unmatched true ones: :math:`|P_\rho| / (|P| + |T| - |T_\rho|)`. At a tolerance of
    0 it is the intersection over union.

    >>> score = Quality(tolerance=1.0)
    >>> score(torch.tensor([[[1, 1, 0, 0]]]), torch.tensor([[[0, 0, 1, 1]]])).item()
    0.3333333432674408
    """

    def compute(self) -> Tensor:
        """Return matched predicted over predicted and unmatched true pixels."""
        predicted, right, true, found = self.counts.unbind()
        return right / (predicted + true - found).clamp_min(1)
