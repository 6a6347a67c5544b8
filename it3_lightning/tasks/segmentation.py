"""Segmentation: cross-entropy and Dice to train, intersection over union to judge."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryJaccardIndex, MulticlassJaccardIndex
from torchmetrics.wrappers.abstract import WrapperMetric

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
        ignore_index: label of pixels that count in no loss and no score, such as 255; give it to
            ``MaskPrior`` too.
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
        ignore_index: int | None = None,
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
        if tolerance is not None and ignore_index is not None:
            raise ValueError(
                f"Expected tolerance=None with ignore_index={ignore_index}, got {tolerance}: "
                "correctness and completeness count all pixels."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.loss: MaskLoss = loss
        self.tolerance = tolerance

    def scores(self, outputs: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the loss of logits ``(B, C, H, W)`` and masks."""
        masks = _masks_for(outputs, target, self.num_classes)
        return {"loss": mask_loss(outputs, masks, self.loss, ignore_index=self.ignore_index)}

    def metrics(self) -> dict[str, Metric]:
        """Return IoU, and the scores of roads where there is a tolerance."""
        ignored = self.ignore_index
        if self.num_classes > 1:
            index = MulticlassJaccardIndex(self.num_classes, ignore_index=ignored)
            return {"iou": _OfLogits(index, self.num_classes)}
        metrics: dict[str, Metric] = {"iou": BinaryJaccardIndex(ignore_index=ignored)}
        if self.tolerance is not None:
            metrics["correctness"] = Correctness(self.tolerance)
            metrics["completeness"] = Completeness(self.tolerance)
            metrics["quality"] = Quality(self.tolerance)
        return {name: _OfLogits(metric, 1) for name, metric in metrics.items()}


class IT3Segmenter(IT3Mixin, Segmenter):
    """The same with priors: see :class:`~it3_lightning.IT3Mixin` and ``MaskPrior``."""


def mask_loss(
    logits: Tensor,
    target: Tensor,
    kind: MaskLoss = "ce+dice",
    *,
    ignore_index: int | None = None,
) -> Tensor:
    """Return the loss of a batch, a scalar, in float32.

    Args:
        logits: ``(B, 1, H, W)`` of binary masks, or ``(B, C, H, W)`` of classes.
        target: ``(B, 1, H, W)`` of 0 and 1, or classes ``(B, H, W)``, int64.
        kind: ``"ce"``: (binary) cross-entropy, mean over pixels; ``"dice"``: see
            :func:`dice_loss`; ``"ce+dice"``: their sum, which minds a thin class as well.
        ignore_index: label of pixels that do not count; where none counts, cross-entropy is 0.

    Raises:
        ValueError: The kind is unknown.

    >>> import torch
    >>> mask_loss(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), "ce")
    tensor(0.6931)
    """
    _check_loss(kind)
    logits, kept = logits.float(), None
    if ignore_index is not None:
        kept = target != ignore_index
        target = target.masked_fill(~kept, 0)
    loss, over = logits.new_zeros(()), "mean" if kept is None else "none"
    if kind != "dice" and logits.shape[1] == 1:
        found = F.binary_cross_entropy_with_logits(logits, target.float(), reduction=over)
        loss = loss + _mean_of(found, kept)
    elif kind != "dice":
        loss = loss + _mean_of(F.cross_entropy(logits, target, reduction=over), kept)
    return loss if kind == "ce" else loss + dice_loss(logits, target, kept=kept)


def _mean_of(values: Tensor, kept: Tensor | None) -> Tensor:
    """Return the mean of those that are kept, 0 where none is; ``None``: it is one already."""
    return values if kept is None else (values * kept).sum() / kept.sum().clamp_min(1)


def dice_loss(
    logits: Tensor, target: Tensor, *, smooth: float = 1.0, kept: Tensor | None = None
) -> Tensor:
    r"""Return the soft Dice loss, the mean over channels of one minus the overlap.

    :math:`1 - (2 \sum p\,y + s) / (\sum p + \sum y + s)`, the sums over all pixels of the batch, so
    that images without the class do no harm (Milletari et al., V-Net, 3DV 2016).

    Args:
        logits: see :func:`mask_loss`.
        target: see :func:`mask_loss`.
        smooth: ``s``, pixels.
        kept: pixels that count, in the shape of the target; ``None``: all.

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
    if kept is not None:
        kept = kept if classes == 1 else kept.unsqueeze(1)
        probabilities, truth = probabilities * kept, truth * kept
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
