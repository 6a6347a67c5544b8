"""Metrics of masks, given a network's logits: how logits become masks, in one place."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric


def masks_for(outputs: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Return masks as losses and metrics take them beside logits ``(B, C, H, W)``.

    Args:
        outputs: ``(B, C, H, W)``.
        target: ``(B, H, W)`` or ``(B, 1, H, W)``.
        num_classes: ``C``; 1 for binary masks.

    Returns:
        ``(B, 1, H, W)`` for binary masks, else ``(B, H, W)``.

    Raises:
        ValueError: outputs or masks have another shape.
    """
    single = target.ndim == 4 and target.shape[1] == 1
    maps = target.squeeze(1) if single else target
    shape = tuple(outputs.shape)
    if len(shape) != 4 or shape[1] != num_classes or maps.shape != (shape[0], *shape[2:]):
        raise ValueError(
            f"Expected outputs (B, {num_classes}, H, W) and masks (B, H, W) or (B, 1, H, W), got "
            f"{shape} and {tuple(target.shape)}. Set num_classes to the network's outputs, and "
            "give masks of the outputs' size."
        )
    return maps if num_classes > 1 else maps.unsqueeze(1)


class OfLogits(WrapperMetric):
    """A metric of predicted and true masks that is given logits and masks.

    Args:
        metric: takes predicted and true masks, of 0 and 1 or of classes.
        num_classes: 1 for binary masks, predicted where the logit is above 0; else ``C``, and the
            largest of ``C`` logits is predicted.

    >>> import torch
    >>> from torchmetrics.classification import BinaryJaccardIndex
    >>> metric = OfLogits(BinaryJaccardIndex(), 1)
    >>> metric.update(torch.tensor([[[[0.4, 3.0, -1.0]]]]), torch.tensor([[[[0.0, 1.0, 1.0]]]]))
    >>> metric.compute()
    tensor(0.3333)
    """

    def __init__(self, metric: Metric, num_classes: int) -> None:
        super().__init__()
        self.metric = metric
        self.num_classes = num_classes

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch."""
        preds = logits.argmax(dim=1) if self.num_classes > 1 else logits > 0
        self.metric.update(preds, masks_for(logits, target, self.num_classes).long())

    def compute(self) -> Any:
        """Return the metric of all that was counted."""
        return self.metric.compute()

    def reset(self) -> None:
        """Count from zero."""
        super().reset()
        self.metric.reset()
