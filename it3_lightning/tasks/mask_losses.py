"""Losses of masks: cross-entropy of every pixel, soft Dice of the whole batch, or their sum."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from it3_lightning.utils.messages import unknown

MaskLoss = Literal["ce", "dice", "ce+dice"]


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
    check_loss(kind)
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


def check_loss(kind: str) -> None:
    """Refuse an unknown loss.

    Raises:
        ValueError: It is none of ``MaskLoss``.
    """
    if kind not in get_args(MaskLoss):
        raise ValueError(unknown("loss", kind, get_args(MaskLoss)))
