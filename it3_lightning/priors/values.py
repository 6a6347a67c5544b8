"""The prior of regression: values, scaled by the spread of the training targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from it3_lightning.priors.prior import Neutral, Prior


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
        targets and outputs ``(B,)`` or ``(B, C)``, in the same units: a module that normalises its
        targets inside ``training_step`` overrides ``it3_target`` to do so too.

    Raises:
        ValueError: only one of ``mean`` and ``std`` is given, one has another length than ``size``,
            ``std`` is not positive, ``noise`` is negative, or values have another shape.

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
        self.register_buffer("mean", _row("mean", mean, size))
        self.register_buffer("std", _row("std", std, size))
        if bool((self.std <= 0).any()):
            raise ValueError(f"Expected std > 0, got {std}.")

    @property
    def fitted(self) -> bool:  # type: ignore[override]
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

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean of the values."""
        return (first + second) / 2

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


def _row(name: str, values: float | list[float] | None, size: int) -> Tensor:
    row = torch.as_tensor(float("nan") if values is None else values, dtype=torch.float32)
    if row.ndim > 1 or row.numel() not in (1, size):
        raise ValueError(f"Expected {name} to be a number or {size} of them, got {values}.")
    return row.expand(size).clone()
