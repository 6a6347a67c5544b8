"""Segmentation: cross-entropy and Dice to train, intersection over union to judge."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex

from it3_lightning.tasks.mask_losses import MaskLoss, check_loss, mask_loss
from it3_lightning.tasks.mask_metrics import OfLogits, masks_for
from it3_lightning.tasks.road_scores import Completeness, Correctness, Quality
from it3_lightning.tasks.supervised import Supervised
from it3_lightning.training.mixin import IT3Mixin


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
        check_loss(loss)
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
        return {"loss": mask_loss(outputs, masks_for(outputs, target, self.num_classes), self.loss)}

    def metrics(self) -> dict[str, Metric]:
        """Return IoU, and the scores of roads where there is a tolerance."""
        if self.num_classes > 1:
            return {"iou": OfLogits(MulticlassJaccardIndex(self.num_classes), self.num_classes)}
        metrics: dict[str, Metric] = {"iou": BinaryJaccardIndex()}
        if self.tolerance is not None:
            metrics["correctness"] = Correctness(self.tolerance)
            metrics["completeness"] = Completeness(self.tolerance)
            metrics["quality"] = Quality(self.tolerance)
        return {name: OfLogits(metric, 1) for name, metric in metrics.items()}


class IT3Segmenter(IT3Mixin, Segmenter):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin` and ``MaskPrior``."""
