"""What every prior can do: label space in, label space out, and the neutral prior."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Neutral = Literal["none", "zeros", "uniform", "constant"]
Context = Literal["batch", "stream"]
Gather = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Carried:
    """The mean of the first predictions along a stream.

    Args:
        alone: whether each sample is adapted to by itself.
        count: number of samples so far.
        mean: of them, ``(1, K)``; ``None``: there is none yet.
    """

    alone: bool
    count: int = 0
    mean: Tensor | None = None

    def before(self, window: int | None, size: int) -> int:
        """Return how many samples it counts as beside ``size`` new ones."""
        return self.count if window is None else min(self.count, max(window - size, 0))

    def followed(self, rows: Tensor, window: int | None) -> Carried:
        """Return the same after further samples, ``(B, K)``.

        >>> carried = Carried(alone=True)
        >>> for row in ([[1.0]], [[2.0]], [[6.0]]):
        ...     carried = carried.followed(torch.tensor(row), 2)
        >>> carried.mean  # ((1 + 2) / 2 + 6) / 2
        tensor([[3.7500]])
        """
        if not len(rows):
            return self
        before = self.before(window, len(rows))
        total = rows.sum(0, keepdim=True) + (0.0 if self.mean is None else before * self.mean)
        return replace(self, count=self.count + len(rows), mean=total / (before + len(rows)))


class Prior(nn.Module, ABC):
    """Base of all priors.

    Args:
        channels: channels ``C`` of the prior that the network sees, any context apart.
        neutral: the "don't know" signal: ``"zeros"``; ``"uniform"`` (``1/C``); ``"constant"``
            (``neutral_value``, best outside the label range); ``"none"``: no signal at all, for
            conditionings that can leave it out.
        neutral_value: value of the neutral prior under ``neutral="constant"``.
        presence_flag: append a channel that is 1 where a prior is given and 0 where not, so that
            "unknown" differs from the value 0. Seen by the network only, never by the distance.
        context: what stands beside the prior of each sample and says of which kind its company is:
            ``"batch"``: the mean of the priors of its batch, :meth:`context_of`; ``"stream"``: that
            of the samples before it and its own. Seen by the network only, as :meth:`as_context`
            gives it; the neutral pass sees none. ``None``: nothing.
        window: number of samples that count in ``"stream"``.

    Raises:
        ValueError: ``channels`` or ``window`` is not positive, ``neutral`` or ``context`` unknown.
    """

    context: Context | None = None
    context_channels: int = 0
    window: int | None = None
    averaged: bool = True
    """Whether a layer without the positions of a prior may see their average."""
    carried: Carried | None = None
    """What a stream has come to, while an adaptation runs."""
    positions: bool = False
    """Whether label space is that of series or maps, of which inputs may say what is padding."""
    fitted: bool = True
    """Whether the prior knows what it must know of the targets, so that no fit is needed."""

    def __init__(
        self,
        channels: int,
        *,
        neutral: Neutral,
        neutral_value: float,
        presence_flag: bool,
        context: Context | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"Expected at least 1 prior channel, got {channels}.")
        if neutral not in get_args(Neutral):
            raise ValueError(
                f"Expected neutral to be none, zeros, uniform or constant, got {neutral!r}."
            )
        if context not in (None, *get_args(Context)):
            raise ValueError(f"Expected context 'batch', 'stream' or None, got {context!r}.")
        if window is not None and window < 1:
            raise ValueError(f"Expected a window of at least 1 sample, got {window}.")
        self.channels = channels
        self.context = context
        self.window = window if context == "stream" else None
        self.context_channels = 0 if context is None else channels
        self.joins = context is not None or type(self).joined is not Prior.joined
        self.neutral = neutral
        self.neutral_value = neutral_value
        self.presence_flag = presence_flag

    @property
    def input_channels(self) -> int:
        """Channels the network sees: label space, any context, any presence flag."""
        return self.channels + self.context_channels + int(self.presence_flag)

    @property
    def neutral_is_zero(self) -> bool:
        """Whether the neutral input is all zeros (or nothing), so that it adds nothing."""
        return self.neutral in ("none", "zeros")

    @abstractmethod
    def from_target(self, target: Tensor) -> Tensor:
        """Bring a target into label space, ``(B, C, ...)``."""

    def known(self, target: Tensor) -> Tensor | None:
        """Return where a target says something, booleans ``(B,)`` or ``(B, ...)`` of its positions.

        What it says nothing of is shown as the neutral prior. ``None``: it says something all over.
        """
        return None

    @abstractmethod
    def from_output(self, output: Tensor) -> Tensor:
        """Bring a network's output into label space, ``(B, C, ...)``, differentiably."""

    def check_output(self, prior: Tensor) -> None:
        """Refuse what :meth:`from_output` made of the first outputs, where it cannot be a prior.

        Raises:
            ValueError: it cannot.
        """

    def mean_output(self, first: Tensor, second: Tensor) -> Tensor:
        """Return an output whose :meth:`from_output` is the mean of those of two outputs."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define mean_output(self, first, second) -> Tensor, "
            "which prediction='mean' asks for. Return (first + second) / 2 where outputs are "
            "values or probabilities."
        )

    def to_output(self, prediction: Tensor, like: Tensor) -> Tensor:
        """Return the output whose :meth:`from_output` is a prediction; shaped like an output."""
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define to_output(self, prediction, like) -> "
            "Tensor, which methods that predict by themselves ask for. Return the prediction where "
            "outputs are what they become in label space."
        )

    @abstractmethod
    def perturb(self, prior: Tensor) -> Tensor:
        """Return the prior blurred by a random amount per sample, from the global generator.

        Training on perturbed labels makes the second pass a denoiser of predictions; with exact
        labels it only learns to copy.
        """

    def weights(self, prior: Tensor) -> Tensor:
        """Return random weights of samples, ``(B,)``, by which an unequal batch is drawn of them.

        Args:
            prior: of their labels, ``(B, C, ...)``.
        """
        raise NotImplementedError(
            f"Expected {type(self).__name__} to define weights(self, prior) -> Tensor (B,), which "
            "unequal_share > 0 asks for. Return positive numbers that depend on the label alone."
        )

    def context_of(self, prior: Tensor) -> Tensor:
        r"""Return the context of a batch, ``(1, K)``: the mean of the priors that are finite.

        In a stream, of these and the ``n`` samples before, with mean ``m``, in a window ``N``:
        :math:`\bar m = (n' m + \sum_b p_b) / (n' + B)`, :math:`n' = \min(n, \max(N - B, 0))`.
        Where each sample has weights of its own, ``(B, K)``: of each as if it had come alone.
        Differentiable; gradients flow from each sample to all. Of no such prior: zeros.
        """
        return self.mean_of(*finite(prior))

    def mean_of(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return the mean of rows ``(B, K)`` and of what a stream has carried, as in a context.

        Args:
            rows: 0 where they do not count.
            counts: ``(B, 1)``, 1 where they do.
        """
        total, count, carried = rows, counts, self.carried
        if carried is None or not carried.alone:
            total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
        if carried is not None and carried.mean is not None:
            before = carried.before(self.window, 1 if carried.alone else rows.shape[0])
            total, count = total + before * carried.mean.to(rows), count + before
        return total / count.clamp_min(1)

    def context_rows(self, prior: Tensor) -> Tensor:
        """Return what the context is the mean of, ``(B, K)``, sample by sample."""
        return prior

    def as_context(self, context: Tensor) -> Tensor:
        """Return a context, ``(B, K)``, as the network sees it; 0 where it says nothing."""
        return context

    def joined(self, prior: Tensor, context: Tensor | None = None) -> Tensor:
        """Return priors as the conditioning takes them, ``(B, C, ...)``, beside any context.

        With a context ``(B, C) -> (B, C + K)``; without one they are taken as they are. It is not
        asked where there is none and no subclass overrides it.

        Args:
            prior: in label space.
            context: ``(1, K)`` or ``(B, K)``; default: that of these priors.
        """
        if self.context is None:
            return prior
        found = self.as_context(self.context_of(prior) if context is None else context.to(prior))
        return torch.cat([prior, found.expand(prior.shape[0], -1)], dim=1)

    def as_input(self, prior: Tensor) -> Tensor:
        """Append the presence flag, where there is one: ``(B, C, ...) -> (B, C + 1, ...)``."""
        if not self.presence_flag:
            return prior
        return torch.cat([prior, torch.ones_like(prior[:, :1])], dim=1)

    def neutral_input(self, batch_size: int, like: Tensor) -> Tensor:
        """Return the neutral prior as the network sees it, ``(B, C + K)``, any flag being 0."""
        fill = {"uniform": 1 / self.channels, "constant": self.neutral_value}.get(self.neutral, 0.0)
        values = torch.full((batch_size, self.channels), fill, device=like.device, dtype=like.dtype)
        values = F.pad(values, (0, self.context_channels)) if self.context_channels else values
        return F.pad(values, (0, 1)) if self.presence_flag else values

    def fit(self, targets: Iterable[Tensor]) -> None:
        """Take from training targets what the prior must know of them; most need nothing."""

    @property
    def measuring(self) -> bool:
        """Whether :meth:`measure` is to see the targets of the next training batch."""
        return not self.fitted

    def measure(self, target: Tensor, gather: Gather | None = None) -> None:
        """Take from one training batch, before its passes, what the prior must know of targets.

        Called with the first batch, and with others while :attr:`measuring` holds.

        Args:
            target: of the batch, as ``it3_target`` returns it.
            gather: brings a tensor of all processes together, along a new first dimension.
        """
        self.fit([target])

    def settle(self) -> None:
        """Measure no more: all training targets have been seen once."""

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints and YAML."""
        return {"neutral": self.neutral, "neutral_value": self.neutral_value}


def finite(prior: Tensor) -> tuple[Tensor, Tensor]:
    """Return priors ``(B, K)`` with zeros for those that are not finite, and which are, as 1."""
    found = prior.isfinite().all(1, keepdim=True)
    return torch.where(found, prior, 0.0), found.to(prior.dtype)
