"""The prior of classification: class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.priors.prior import Neutral, Prior
from it3_lightning.priors.probabilities import (
    OutputKind,
    both,
    check_outputs,
    floating,
    is_single,
    mean_outputs,
    one_hot,
    probabilities,
)


class ClassPrior(Prior):
    r"""Class probabilities: one-hot labels, softmax outputs.

    Perturbed: :math:`r \cdot onehot(y) + (1 - r) \cdot onehot(random\ class)`, ``r ~ U(0, 1)``.

    Args:
        num_classes: number of classes ``C``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.

    Shapes:
        targets ``(B,)`` or ``(B, 1)`` indices, or ``(B, C)`` probabilities; outputs ``(B, C)``.
        Where ``num_classes=2``, floating targets ``(B,)`` and ``(B, 1)`` are probabilities of class
        1, and outputs of those shapes its logits.

    Raises:
        ValueError: fewer than 2 classes, or a target or output that does not fit them.

    >>> ClassPrior(3).from_target(torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        outputs: OutputKind = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
    ) -> None:
        super().__init__(
            num_classes, neutral=neutral, neutral_value=neutral_value, presence_flag=False
        )
        if num_classes < 2:
            raise ValueError(f"Expected at least 2 classes, got {num_classes}.")
        check_outputs(outputs)
        self.outputs: OutputKind = outputs

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C)`` one-hot vectors, or the given probabilities."""
        if target.ndim == 2 and target.shape[1] == self.channels:
            return floating(target)
        if not is_single(target):
            raise ValueError(
                f"ClassPrior({self.channels}) expected a target of shape (B,) or "
                f"(B, {self.channels}), got {tuple(target.shape)}. MaskPrior takes maps of classes."
            )
        if self.channels == 2 and target.is_floating_point():
            return both(target.reshape(-1, 1))
        return one_hot(target.flatten(), self.channels)

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C)`` probabilities."""
        return probabilities(output, self.channels, self.outputs)

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return outputs, logits or probabilities, of the mean of both probabilities.

        >>> both = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]).log()
        >>> ClassPrior(2).mean_output(*both).softmax(1)
        tensor([[0.6250, 0.3750]])
        """
        return mean_outputs(first, second, self.outputs, single=is_single(first))

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each sample with a random class, by a random share."""
        other = torch.randint(self.channels, prior.shape[:1], device=prior.device)
        share = torch.rand(prior.shape[0], 1, device=prior.device, dtype=prior.dtype)
        return share * prior + (1 - share) * F.one_hot(other, self.channels).to(prior.dtype)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"num_classes": self.channels, "outputs": self.outputs, **super().init_args()}
