"""The prior of segmentation: maps of class probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from it3_lightning.priors.classes import (
    NOT_LOGITS,
    OutputKind,
    both,
    check_outputs,
    counted,
    distributions,
    mean_outputs,
    one_hot,
    outputs_of,
    probabilities,
    random_weights,
    shares,
    unrounded,
)
from it3_lightning.priors.prior import Neutral, Prior


class MaskPrior(Prior):
    """Maps of class probabilities: binary masks (sigmoid) or ``C`` classes (softmax).

    Perturbed: each image's map mixed, by a random share, with that of a random image of the batch;
    where this is the image itself, with its own mirrored map.

    Args:
        num_classes: 1 for a binary mask as one map, as published: for the squared L2 and the L1
            distance; 2 for a binary mask as a distribution over background and foreground, which
            all other distances, filters and entropies need; else the number of classes ``C``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.
        ignore_index: the label of pixels that the loss ignores, such as 255: there the network
            sees the neutral prior.

    Shapes:
        targets ``(B, H, W)`` or ``(B, 1, H, W)`` indices, or ``(B, C, H, W)`` probabilities;
        outputs ``(B, C, H, W)``, and of up to 2 classes ``(B, 1, H, W)`` or ``(B, H, W)``: logits
        or probabilities of the foreground.

    Raises:
        ValueError: a target or output does not fit the number of classes.

    >>> MaskPrior().from_output(torch.zeros(1, 1, 1, 2))
    tensor([[[[0.5000, 0.5000]]]])
    """

    positions = True

    def __init__(
        self,
        num_classes: int = 1,
        *,
        outputs: OutputKind = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__(
            num_classes, neutral=neutral, neutral_value=neutral_value, presence_flag=True
        )
        check_outputs(outputs)
        self.outputs: OutputKind = outputs
        self.ignore_index = ignore_index

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` maps."""
        if self._shares(target):
            return distributions(target)
        maps = _single_map(target)
        if maps.ndim != 3:
            raise ValueError(
                f"MaskPrior({self.channels}) expected a target of shape (B, H, W) or "
                f"(B, {self.channels}, H, W), got {tuple(target.shape)}."
            )
        if self.channels > 1:
            return one_hot(maps, self.channels, self.ignore_index)
        return shares(maps.unsqueeze(1), self.ignore_index)

    def known(self, target: Tensor) -> Tensor | None:
        """Return which pixels are not ignored, ``(B, H, W)``; ``None``: all."""
        return None if self._shares(target) else counted(_single_map(target), self.ignore_index)

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` probabilities."""
        maps = output.unsqueeze(1) if output.ndim == 3 else output
        if maps.ndim == 4 and maps.shape[1] == 1 and self.channels <= 2:
            maps = unrounded(maps)
            one = maps.sigmoid() if self.outputs == "logits" else maps
            return one if self.channels == 1 else both(one)
        if maps.ndim != 4 or self.channels == 1:
            raise ValueError(
                f"MaskPrior({self.channels}) expected an output of shape (B, {self.channels}, H, "
                f"W), got {tuple(output.shape)}. Give the prior as many classes as the network has "
                "outputs."
            )
        return probabilities(maps, self.channels, self.outputs)

    def check_output(self, prior: Tensor) -> None:
        """Refuse outputs that were said to be probabilities and are none."""
        if self.outputs == "probabilities" and self.channels > 1:
            distributions(prior, NOT_LOGITS)
        elif self.outputs == "probabilities":
            shares(prior, advice=NOT_LOGITS)

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral maps ``(B, C + 1, 1, 1)``, which broadcast over positions."""
        return super().neutral_input(batch_size, like)[:, :, None, None]

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return outputs, logits or probabilities, of the mean of both maps of probabilities."""
        single = first.ndim == 3 or first.shape[1] == 1
        return mean_outputs(first, second, self.outputs, single=single)

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        """Return maps of logits or probabilities, shaped like an output of the network."""
        single = like.ndim == 3 or like.shape[1] == 1
        return outputs_of(prediction, self.outputs, like, single=single)

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each map with that of a random image, or with its own mirrored one."""
        drawn = torch.randperm(prior.shape[0], device=prior.device)
        itself = drawn == torch.arange(prior.shape[0], device=prior.device)
        other = torch.where(itself[:, None, None, None], prior.flip(3), prior[drawn])
        share = torch.rand(prior.shape[0], 1, 1, 1, device=prior.device, dtype=prior.dtype)
        return share * prior + (1 - share) * other

    def weights(self, prior: Tensor) -> Tensor:
        """Return the weights of images by random weights of the classes on them."""
        return random_weights(prior)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"num_classes": self.channels, "outputs": self.outputs}
        return {**own, **super().init_args(), "ignore_index": self.ignore_index}

    def _shares(self, target: Tensor) -> bool:
        """Whether a target has probabilities of the classes, not their indices."""
        return self.channels > 1 and target.ndim == 4 and target.shape[1] == self.channels


def _single_map(target: Tensor) -> Tensor:
    """Return one map of each sample: ``(B, 1, H, W) -> (B, H, W)``; others as they are."""
    return target.squeeze(1) if target.ndim == 4 and target.shape[1] == 1 else target
