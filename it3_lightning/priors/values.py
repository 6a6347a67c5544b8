"""The prior of regression: values, scaled by the spread of the training targets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from it3_lightning.priors.classes import unrounded
from it3_lightning.priors.positions import ValueLayout, channels_first, laid_out_as
from it3_lightning.priors.prior import Gather, Neutral, Prior

_SETTLED = -1  # in the place of a count: there is nothing more to measure


class ValuePrior(Prior):
    """Real values, scaled to mean 0 and standard deviation 1 by the training targets.

    Perturbed: the scaled value plus Gaussian noise whose size is drawn per sample from
    ``U(0, noise)``, in standard deviations of the target. Of series and maps, half of its variance
    is that of an offset common to all positions, since errors of predictions go together.

    Args:
        size: number of channels ``C``, each of which has a mean and a standard deviation.
        layout: ``"BC"``: all values of a sample are one vector of ``size`` channels. ``"BTC"`` and
            ``"BCT"``: series, ``"BCHW"`` and ``"BHWC"``: maps, whose positions share the statistics
            of their channel. Their prior enters where a layer has such positions, too.
        mean: mean of the training targets, a number or one per value; ``None``: measured on the
            batches of the first epoch as ``training_step`` sees them, over all processes. The
            passes of a batch use what is known with it; at the end of the epoch it is settled. A
            first batch of one or two samples says little: give mean and std there.
        std: their standard deviation, likewise.
        noise: largest perturbation, in standard deviations.
        neutral: see :class:`Prior`.
        neutral_value: see :class:`Prior`.

    Shapes:
        targets and outputs as laid out, in the same units: a module that normalises its targets
        inside ``training_step`` overrides ``it3_target`` to do so too. With ``layout="BC"`` also
        ``(B,)`` for one value, and any ``(B, ...)`` of ``size`` values; with the others also
        without the dimension of the channels, where there is one: ``(B, T)``, ``(B, H, W)``.
        Targets that are not finite are not known: they are in no statistics, and where a channel is
        not finite the network sees the neutral prior.

    Raises:
        ValueError: only one of ``mean`` and ``std`` is given, one has another length than ``size``,
            ``std`` is not positive, ``noise`` is negative, ``layout`` is unknown, or values have
            another shape.

    >>> ValuePrior(mean=10.0, std=2.0).from_target(torch.tensor([14.0]))
    tensor([[2.]])
    >>> ValuePrior(layout="BTC", mean=0.0, std=2.0).from_target(torch.tensor([[4.0, 6.0]]))
    tensor([[[2., 3.]]])
    """

    mean: Tensor
    std: Tensor
    count: Tensor  # targets measured so far; _SETTLED: mean and std are known
    moments: Tensor  # of these targets, so that a resumed epoch goes on: see `_as_bits`

    def __init__(
        self,
        size: int = 1,
        *,
        layout: ValueLayout = "BC",
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
        if layout not in get_args(ValueLayout):
            raise ValueError(f"Expected layout {', '.join(get_args(ValueLayout))}, got {layout!r}.")
        self.layout: ValueLayout = layout
        self.averaged, self.positions = layout == "BC", layout != "BC"
        self.noise = noise
        self.register_buffer("mean", _row("mean", mean, size))
        self.register_buffer("std", _row("std", std, size))
        self._measuring = mean is None
        self.register_buffer("count", torch.tensor(0 if self._measuring else _SETTLED))
        self.register_buffer("moments", _as_bits(torch.zeros(3, size, dtype=torch.float64)))
        if bool((self.std <= 0).any()):
            raise ValueError(f"Expected std > 0, got {std}.")

    @property
    def fitted(self) -> bool:  # type: ignore[override]
        """Whether mean and standard deviation are known."""
        return bool(self.mean.isfinite().all() and self.std.isfinite().all())

    @property
    def measuring(self) -> bool:
        """Whether mean and standard deviation are still being measured."""
        return self._measuring

    def measure(self, target: Tensor, gather: Gather | None = None) -> None:
        """Add the targets of a batch to mean and standard deviation; non-finite ones do not count.

        Chan, Golub and LeVeque, 1979: counts, means and sums of squares of parts are those of the
        whole, in any order. Where all targets are the same, the standard deviation is 1.

        >>> prior = ValuePrior()
        >>> prior.measure(torch.tensor([1.0, 3.0]))
        >>> prior.measure(torch.tensor([5.0]))
        >>> prior.mean, prior.std ** 2
        (tensor([3.]), tensor([2.6667]))
        """
        found = _moments_of(self._first(target).detach().movedim(1, -1).flatten(0, -2))
        parts = found[None] if gather is None else gather(found).to(found)
        known = self.moments.cpu().view(torch.float64)
        moments = joined_moments(torch.cat([known[None], parts]))
        self.moments.copy_(_as_bits(moments))
        count, mean, squares = moments
        if count[0] == 0:
            return
        spread = (squares / count).sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(spread > 1e-12 * mean.abs(), spread, 1.0))
        self.count.copy_(count[0])

    def settle(self) -> None:
        """Measure no more."""
        if self._measuring and self.fitted:
            self._measuring = False
            self.count.fill_(_SETTLED)

    def fit(self, targets: Iterable[Tensor]) -> None:
        """Measure mean and standard deviation of all these targets, and no others."""
        self._measuring = True
        self.count.zero_()
        self.moments.zero_()
        for target in targets:
            self.measure(target)
        self.settle()

    def from_target(self, target: Tensor) -> Tensor:
        """Return ``(B, C, ...)`` scaled values, 0 where they are not known."""
        values, known = self._scaled(target), self.known(target)
        return values if known is None else torch.where(known.unsqueeze(1), values, 0.0)

    def known(self, target: Tensor) -> Tensor | None:
        """Return where all channels are finite, ``(B,)`` or ``(B, ...)``; ``None``: everywhere."""
        found = self._first(target).isfinite().all(1)
        return None if bool(found.all()) else found

    def from_output(self, output: Tensor) -> Tensor:
        """Return ``(B, C, ...)`` scaled values."""
        return self._scaled(unrounded(output))

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean of the values."""
        return (first + second) / 2

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        """Return the values in their own units, shaped like an output of the network."""
        mean, std = self._statistics(prediction)
        return laid_out_as(prediction * std + mean, self.layout, like).to(like.dtype)

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral prior ``(B, C + 1)``, or one that broadcasts over positions."""
        values = super().neutral_input(batch_size, like)
        return values.reshape(*values.shape, *[1] * (len(self.layout) - 2))

    def perturb(self, prior: Tensor) -> Tensor:
        """Add Gaussian noise of a random size per sample."""
        shape = (prior.shape[0], *[1] * (prior.ndim - 1))
        size = self.noise * torch.rand(shape, device=prior.device, dtype=prior.dtype)
        noise = torch.randn_like(prior)
        if prior.ndim > 2:
            offset = torch.randn_like(prior.flatten(2)[..., 0])
            noise = (noise + offset.reshape(*offset.shape, *shape[2:])) / 2**0.5
        return prior + size * noise

    def weights(self, prior: Tensor) -> Tensor:
        r"""Return weights that tilt values to a random side, :math:`e^{t^T z}`, ``t ~ N(0, 1)``.

        Of normal values they make others of the same spread, with mean ``t``. Values count up to 3
        standard deviations, those that are not finite as the mean; positions by their average.
        """
        values = prior.nan_to_num(0.0, 0.0, 0.0).clamp(-3, 3)
        values = values.flatten(2).mean(2) if values.ndim > 2 else values
        return (values @ torch.randn_like(values[0])).softmax(0)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments; what is measured travels as buffers."""
        own = {"size": self.channels, "layout": self.layout, "noise": self.noise}
        return {**own, **super().init_args()}

    def _scaled(self, values: Tensor) -> Tensor:
        rows = self._first(values)
        mean, std = self._statistics(rows)
        return (rows - mean) / std

    def _statistics(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, which broadcast over ``(B, C, ...)``."""
        shape = (-1, *[1] * (values.ndim - 2))
        mean, std = self.mean.to(values), self.std.to(values)
        if self._measuring:  # which writes into them, maybe before the backward pass
            mean, std = mean.clone(), std.clone()
        return mean.reshape(shape), std.reshape(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        mean = state_dict.get(f"{prefix}mean")
        if mean is not None:  # version 0.1.0 kept no count, and measured before training
            known = bool(mean.isfinite().all())
            state_dict.setdefault(f"{prefix}count", torch.tensor(_SETTLED if known else 0))
            state_dict.setdefault(f"{prefix}moments", torch.zeros_like(self.moments))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._measuring = bool(self.count >= 0)

    def _first(self, values: Tensor) -> Tensor:
        """Return values with their channels first, ``(B, C, ...)``."""
        if self.layout == "BC":
            rows = values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)
        elif values.ndim in (len(self.layout) - 1, len(self.layout)):
            rows = channels_first(values, self.layout)
        else:
            rows = values
        if rows.ndim != len(self.layout) or rows.shape[1] != self.channels:
            raise ValueError(self._misfit(values))
        return rows if rows.is_floating_point() else rows.to(self.mean.dtype)

    def _misfit(self, values: Tensor) -> str:
        """Say what was expected, and which prior would take values of this shape."""
        got, size = tuple(values.shape), self.channels
        if self.layout == "BC":
            return (
                f"ValuePrior(size={size}) expected values of shape (B,) or (B, {size}), got {got}. "
                "Set size to the model's outputs; series and maps, whose positions share mean and "
                "spread, need a layout such as 'BTC' or 'BCHW'."
            )
        expected = ", ".join(self.layout).replace("C", str(size))
        return (
            f"ValuePrior(size={size}, layout={self.layout!r}) expected values of shape "
            f"({expected}), got {got}. Set size to the channels of the model's outputs, and layout "
            "to the order of their dimensions."
        )


def _row(name: str, values: float | list[float] | None, size: int) -> Tensor:
    row = torch.as_tensor(float("nan") if values is None else values, dtype=torch.float32)
    if row.ndim > 1 or row.numel() not in (1, size):
        raise ValueError(f"Expected {name} to be a number or {size} of them, got {values}.")
    return row.expand(size).clone()


def _as_bits(moments: Tensor) -> Tensor:
    """Return float64 as integers with the same bits, which no change of a module's type rounds."""
    return moments.contiguous().view(torch.int64)


def _moments_of(rows: Tensor) -> Tensor:
    """Return count, mean and sum of squared deviations of the finite rows, ``(3, C)``."""
    values = rows.cpu().double()
    values = values[values.isfinite().all(1)]
    if not len(values):
        return values.new_zeros(3, values.shape[1])
    mean = values.mean(0)
    return torch.stack([torch.full_like(mean, len(values)), mean, (values - mean).square().sum(0)])


def joined_moments(parts: Tensor) -> Tensor:
    """Return the moments of the whole from those of its parts, ``(N, 3, C) -> (3, C)``."""
    counts, means, squares = parts.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp_min(1)
    between = (counts * (means - mean).square()).sum(0)
    return torch.stack([count, mean, squares.sum(0) + between])
