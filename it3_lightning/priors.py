"""How a target or an output becomes a prior tensor, what "don't know" is, and how a prior is blurred.

A prior lives in *label space*, ``(B, C, ...)``: class probabilities, scaled values, or maps of them.
Targets and outputs are both brought there, so the same tensors feed the second pass and the
distance. The neutral prior says "don't know".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Neutral = Literal["none", "zeros", "uniform", "constant"]


class Prior(nn.Module, ABC):
    """Base of all priors.

    Args:
        channels: channels ``C`` of label space.
        neutral: the "don't know" signal: ``"zeros"``; ``"uniform"`` (``1/C``); ``"constant"``
            (``neutral_value``, best outside the label range); ``"none"``: no signal at all, for
            conditionings that can leave it out.
        neutral_value: value of the neutral prior under ``neutral="constant"``.
        presence_flag: append a channel that is 1 where a prior is given and 0 where not, so that
            "unknown" differs from the value 0. Seen by the network only, never by the distance.

    Raises:
        ValueError: ``channels`` is not positive or ``neutral`` is unknown.
    """

    def __init__(
        self, channels: int, *, neutral: Neutral, neutral_value: float, presence_flag: bool
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"Expected at least 1 prior channel, got {channels}.")
        if neutral not in ("none", "zeros", "uniform", "constant"):
            raise ValueError(
                f"Expected neutral to be none, zeros, uniform or constant, got {neutral!r}."
            )
        self.channels = channels
        self.neutral = neutral
        self.neutral_value = neutral_value
        self.presence_flag = presence_flag

    @property
    def input_channels(self) -> int:
        """Channels the network sees: those of label space, and the presence flag if any."""
        return self.channels + int(self.presence_flag)

    @property
    def neutral_is_zero(self) -> bool:
        """Whether the neutral input is all zeros (or nothing), so that it adds nothing."""
        return self.neutral in ("none", "zeros")

    @abstractmethod
    def from_target(self, target: Tensor) -> Tensor:
        """Bring a target into label space, ``(B, C, ...)``."""

    @abstractmethod
    def from_output(self, output: Tensor) -> Tensor:
        """Bring a network's output into label space, ``(B, C, ...)``, differentiably."""

    @abstractmethod
    def perturb(self, prior: Tensor) -> Tensor:
        """Return the prior blurred by a random amount per sample, from the global generator.

        Training on perturbed labels makes the second pass a denoiser of predictions; with exact
        labels it only learns to copy.
        """

    def as_input(self, prior: Tensor) -> Tensor:
        """Append the presence flag, where there is one: ``(B, C, ...) -> (B, C + 1, ...)``."""
        if not self.presence_flag:
            return prior
        return torch.cat([prior, torch.ones_like(prior[:, :1])], dim=1)

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral prior as the network sees it, ``(B, C)`` with any presence flag 0."""
        fill = {"uniform": 1 / self.channels, "constant": self.neutral_value}.get(self.neutral, 0.0)
        values = torch.full((batch_size, self.channels), fill, device=like.device, dtype=like.dtype)
        return F.pad(values, (0, 1)) if self.presence_flag else values

    def fit(self, targets: Iterable[Tensor]) -> None:
        """Take from training targets what the prior must know of them; most need nothing."""

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` is still needed before training."""
        return True

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints and YAML."""
        return {"neutral": self.neutral, "neutral_value": self.neutral_value}


class ClassPrior(Prior):
    r"""Class probabilities: one-hot labels, softmax outputs.

    Perturbed: :math:`r \cdot onehot(y) + (1 - r) \cdot onehot(random\ class)`, ``r ~ U(0, 1)``.

    Args:
        num_classes: number of classes ``C``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.

    Shapes:
        targets ``(B,)`` integers or ``(B, C)`` probabilities; outputs ``(B, C)``, or ``(B,)`` and
        ``(B, 1)`` logits of class 1 where ``num_classes=2``.

    >>> ClassPrior(3).from_target(torch.tensor([2]))
    tensor([[0., 0., 1.]])
    """

    def __init__(
        self,
        num_classes: int,
        *,
        outputs: Literal["logits", "probabilities"] = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
    ) -> None:
        super().__init__(
            num_classes, neutral=neutral, neutral_value=neutral_value, presence_flag=False
        )
        if num_classes < 2:
            raise ValueError(f"Expected at least 2 classes, got {num_classes}.")
        self.outputs = outputs

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C)`` one-hot vectors, or the given probabilities."""
        if target.is_floating_point() and target.ndim > 1 and target.shape[1] == self.channels:
            return target
        return _one_hot(target, self.channels)

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C)`` probabilities."""
        return _probabilities(output, self.channels, self.outputs)

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each sample with a random class, by a random share."""
        other = torch.randint(self.channels, prior.shape[:1], device=prior.device)
        share = torch.rand(prior.shape[0], 1, device=prior.device, dtype=prior.dtype)
        return share * prior + (1 - share) * F.one_hot(other, self.channels).to(prior.dtype)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"num_classes": self.channels, "outputs": self.outputs, **super().init_args()}


class ValuePrior(Prior):
    """Real values, scaled to mean 0 and standard deviation 1 by the training targets.

    Perturbed: the scaled value plus Gaussian noise whose size is drawn per sample from
    ``U(0, noise)``, in standard deviations of the target.

    Args:
        size: number of values ``C`` per sample.
        mean: mean of the training targets, a number or one per value; ``None``: measured when
            training starts.
        std: their standard deviation, likewise.
        noise: largest perturbation, in standard deviations.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.

    Shapes:
        targets and outputs ``(B,)`` or ``(B, C)``.

    >>> ValuePrior(mean=10.0, std=2.0).from_target(torch.tensor([14.0]))
    tensor([[2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int = 1,
        *,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
        noise: float = 1.0,
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
    ) -> None:
        super().__init__(size, neutral=neutral, neutral_value=neutral_value, presence_flag=True)
        if (mean is None) != (std is None):
            raise ValueError(f"Expected both mean and std or neither, got mean={mean}, std={std}.")
        if noise < 0:
            raise ValueError(f"Expected noise >= 0 standard deviations, got {noise}.")
        self.noise = noise
        nan = float("nan")
        self.register_buffer("mean", _row(nan if mean is None else mean, size))
        self.register_buffer("std", _row(nan if std is None else std, size))

    @property
    def fitted(self) -> bool:
        """Whether mean and standard deviation are known."""
        return bool(self.mean.isfinite().all() and self.std.isfinite().all())

    def fit(self, targets: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of the training targets."""
        values = torch.cat([self._rows(t).to(torch.float64).cpu() for t in targets])
        self.mean.copy_(values.mean(0))
        self.std.copy_(values.std(0, correction=0).clamp_min(1e-6))

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C)`` scaled values."""
        return self._scaled(target)

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C)`` scaled values."""
        return self._scaled(output)

    def perturb(self, prior: Tensor) -> Tensor:
        """Add Gaussian noise of a random size per sample."""
        size = self.noise * torch.rand(prior.shape[0], 1, device=prior.device, dtype=prior.dtype)
        return prior + size * torch.randn_like(prior)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments; mean and std travel as buffers."""
        return {"size": self.channels, "noise": self.noise, **super().init_args()}

    def _scaled(self, values: Tensor) -> Tensor:
        rows = self._rows(values)
        return (rows - self.mean.to(rows)) / self.std.to(rows)

    def _rows(self, values: Tensor) -> Tensor:
        rows = values.unsqueeze(1) if values.ndim == 1 else values
        if rows.ndim != 2 or rows.shape[1] != self.channels:
            raise ValueError(
                f"ValuePrior(size={self.channels}) expected values of shape (B,) or "
                f"(B, {self.channels}), got {tuple(values.shape)}. Set size to the model's outputs."
            )
        return rows if rows.is_floating_point() else rows.to(self.mean.dtype)


class MaskPrior(Prior):
    """Maps of class probabilities: binary masks (sigmoid) or ``C`` classes (softmax).

    Perturbed: each image's map mixed, by a random share, with that of a random other image.

    Args:
        num_classes: 1 for a binary mask, else the number of classes ``C``.
        outputs: what the network puts out: ``"logits"`` or ``"probabilities"``.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.

    Shapes:
        targets ``(B, H, W)`` integers or ``(B, C, H, W)`` probabilities; outputs ``(B, C, H, W)``.

    >>> MaskPrior().from_output(torch.zeros(1, 1, 1, 2))
    tensor([[[[0.5000, 0.5000]]]])
    """

    def __init__(
        self,
        num_classes: int = 1,
        *,
        outputs: Literal["logits", "probabilities"] = "logits",
        neutral: Neutral = "zeros",
        neutral_value: float = -1.0,
    ) -> None:
        super().__init__(
            num_classes, neutral=neutral, neutral_value=neutral_value, presence_flag=True
        )
        self.outputs = outputs

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` maps."""
        if target.ndim == 4 and target.shape[1] == self.channels:
            return target.float() if not target.is_floating_point() else target
        if self.channels == 1:
            return target.float().unsqueeze(1)
        return _one_hot(target, self.channels)

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C, H, W)`` probabilities."""
        if self.channels > 1:
            return _probabilities(output, self.channels, self.outputs)
        maps = output.unsqueeze(1) if output.ndim == 3 else output
        return maps.sigmoid() if self.outputs == "logits" else maps

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral maps ``(B, C + 1, 1, 1)``, which broadcast over positions."""
        return super().neutral_input(batch_size, like)[:, :, None, None]

    def perturb(self, prior: Tensor) -> Tensor:
        """Mix each map with that of a random other image."""
        other = prior[torch.randperm(prior.shape[0], device=prior.device)]
        share = torch.rand(prior.shape[0], 1, 1, 1, device=prior.device, dtype=prior.dtype)
        return share * prior + (1 - share) * other

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"num_classes": self.channels, "outputs": self.outputs, **super().init_args()}


def _row(values: float | list[float], size: int) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).expand(size).clone()


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """One-hot along dimension 1: ``(B, ...) -> (B, C, ...)``."""
    if target.is_floating_point():
        target = target.long()
    if target.numel() and (int(target.min()) < 0 or int(target.max()) >= classes):
        raise ValueError(
            f"Expected class indices in 0..{classes - 1}, got {int(target.min())} to "
            f"{int(target.max())}. Set num_classes to the labels' number of classes."
        )
    return F.one_hot(target.long(), classes).movedim(-1, 1).to(torch.get_default_dtype())


def _probabilities(output: Tensor, classes: int, kind: str) -> Tensor:
    """Bring logits or probabilities to ``(B, C, ...)`` probabilities."""
    single = output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1)
    if classes == 2 and single:
        one = output.reshape(-1, 1).sigmoid() if kind == "logits" else output.reshape(-1, 1)
        return torch.cat([1 - one, one], dim=1)
    if output.ndim < 2 or output.shape[1] != classes:
        raise ValueError(
            f"Expected an output of shape (B, {classes}, ...), got {tuple(output.shape)}. Give the "
            "prior as many classes as the network has outputs."
        )
    return output.softmax(dim=1) if kind == "logits" else output
