"""Segmentation: cross-entropy and Dice to train, intersection over union to judge."""

from __future__ import annotations

from typing import Any, Literal, get_args

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex
from torchmetrics.wrappers.abstract import WrapperMetric

from it3_lightning.tasks.road_scores import Completeness, Correctness, Quality
from it3_lightning.tasks.supervised import Supervised
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.messages import unknown

MaskLoss = Literal["ce", "dice", "ce+dice"]


class Segmenter(Supervised):
    """Ordinary segmentation of batches ``(inputs, masks)``; logs the loss and ``iou`` (0 to 1).

    IoU is that of all pixels of a dataloader, not a mean over batches; of several classes, the mean
    over classes. It is logged in validation and test.

    Args:
        network: ``(B, ...) -> (B, 1, H, W)`` logits of a binary mask, or ``(B, C, H, W)``.
        num_classes: 1 for binary masks, else the number of classes ``C``.
        loss: ``"ce"`` (binary cross-entropy for binary masks), ``"dice"`` or ``"ce+dice"``.
        tolerance: pixels by which a road may be off; where given, ``correctness``,
            ``completeness`` and ``quality`` are logged, too: see
            :class:`~it3_lightning.tasks.RelaxedScore`.
        optimizer: makes the optimizer; default Adam, 1e-3.

    Shapes:
        masks ``(B, 1, H, W)`` or ``(B, H, W)``: 0 and 1 of any dtype, or int64 classes.

    Raises:
        ValueError: a setting is out of range; or masks and outputs do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int = 1,
        loss: MaskLoss = "ce+dice",
        tolerance: float | None = None,
        optimizer: OptimizerCallable | None = None,
    ) -> None:
        super().__init__(network, optimizer=optimizer)
        _check_loss(loss)
        if num_classes < 1:
            raise ValueError(f"Expected num_classes >= 1, got {num_classes}.")
        if tolerance is not None and num_classes > 1:
            raise ValueError(
                f"Expected tolerance=None with {num_classes} classes, got {tolerance}: correctness "
                "and completeness are of binary masks."
            )
        self.num_classes = num_classes
        self.loss: MaskLoss = loss
        self.tolerance = tolerance

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss of logits ``(B, C, H, W)`` and masks."""
        masks = _masks_for(outputs, target, self.num_classes)
        return {"loss": mask_loss(outputs, masks, self.loss)}

    def metrics(self) -> dict[str, Metric]:
        """Return IoU, and the scores of roads where there is a tolerance."""
        if self.num_classes > 1:
            return {"iou": _OfLogits(MulticlassJaccardIndex(self.num_classes), self.num_classes)}
        metrics: dict[str, Metric] = {"iou": BinaryJaccardIndex()}
        if self.tolerance is not None:
            metrics["correctness"] = Correctness(self.tolerance)
            metrics["completeness"] = Completeness(self.tolerance)
            metrics["quality"] = Quality(self.tolerance)
        return {name: _OfLogits(metric, 1) for name, metric in metrics.items()}


class IT3Segmenter(IT3Mixin, Segmenter):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin` and ``MaskPrior``."""


def mask_loss(logits: Tensor, target: Tensor, kind: MaskLoss = "ce+dice") -> Tensor:
    """Return the loss of a batch, a scalar, in float32.

    Args:
        logits: ``(B, 1, H, W)`` of binary masks, or ``(B, C, H, W)`` of classes.
        target: ``(B, 1, H, W)`` of 0 and 1, or classes ``(B, H, W)``, int64.
        kind: ``"ce"``: (binary) cross-entropy, mean over pixels; ``"dice"``: see
            :func:`dice_loss`; ``"ce+dice"``: their sum, which minds a thin class as well.

    Raises:
        ValueError: The kind is unknown.

    >>> import torch
    >>> mask_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "ce")
    tensor(0.6931)
    """
    _check_loss(kind)
    logits = logits.float()
    loss = logits.new_zeros(())
    if kind != "dice" and logits.shape[1] == 1:
        loss = loss + F.binary_cross_entropy_with_logits(logits, target.float())
    elif kind != "dice":
        loss = loss + F.cross_entropy(logits, target)
    return loss if kind == "ce" else loss + dice_loss(logits, target)


def dice_loss(logits: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    r"""Return the soft Dice loss, the mean over channels of one minus the overlap.

    :math:`1 - (2 \sum p\,y + s) / (\sum p + \sum y + s)`, the sums over all pixels of the batch, so
    that images without the class do no harm (Milletari et al., V-Net, 3DV 2016).

    Args:
        logits: see :func:`mask_loss`.
        target: see :func:`mask_loss`.
        smooth: ``s``, pixels.

    >>> import torch
    >>> dice_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2))  # p = 0.5: 1 - 5 / 7
    tensor(0.2857)
    """
    classes = logits.shape[1]
    if classes == 1:
        probabilities, truth = logits.sigmoid(), target.to(logits.dtype)
    else:
        probabilities = logits.softmax(dim=1)
        truth = F.one_hot(target, classes).movedim(-1, 1).to(logits.dtype)
    over = (0, 2, 3)
    overlap = 2 * (probabilities * truth).sum(over) + smooth
    total = probabilities.sum(over) + truth.sum(over) + smooth
    return (1 - overlap / total).mean()


class _OfLogits(WrapperMetric):
    """A metric of predicted and true masks that is given logits and masks.

    Args:
        metric: takes predicted and true masks, of 0 and 1 or of classes.
        num_classes: 1 for binary masks, predicted where the logit is above 0; else ``C``, and the
            largest of ``C`` logits is predicted.

    >>> import torch
    >>> from torchmetrics.classification import BinaryJaccardIndex
    >>> metric = _OfLogits(BinaryJaccardIndex(), 1)
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
        self.metric.update(preds, _masks_for(logits, target, self.num_classes).long())

    def compute(self) -> Any:
        """Return the metric of all that was counted."""
        return self.metric.compute()

    def reset(self) -> None:
        """Count from zero."""
        super().reset()
        self.metric.reset()


def _masks_for(outputs: Tensor, target: Tensor, num_classes: int) -> Tensor:
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


def _check_loss(kind: str) -> None:
    """Refuse an unknown loss.

    Raises:
        ValueError: It is none of ``MaskLoss``.
    """
    if kind not in get_args(MaskLoss):
        raise ValueError(unknown("loss", kind, get_args(MaskLoss)))
