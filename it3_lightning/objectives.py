r"""What is minimised at test time, per sample, without labels.

An objective sees the first prediction in label space, ``y0``, and may ask for the second,
``y1 = F(x, y0)``. It does not know how the weights move, so another test-time method is another
objective on the same engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from it3_lightning.distances import Distance, DistanceName, get_distance

SecondPass = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """What one evaluation of an objective gives.

    Args:
        measure: ``(B,)``, the quantity itself for every sample: what is logged as distance.
        reliable: ``(B,)`` booleans, the samples whose measure is minimised.
        batch_term: a scalar added to the mean over the reliable samples, or ``None``.
    """

    measure: Tensor
    reliable: Tensor
    batch_term: Tensor | None = None

    @property
    def empty(self) -> bool:
        """Whether there is nothing to minimise: no reliable sample and no batch term."""
        return self.batch_term is None and not bool(self.reliable.any())

    def loss(self) -> Tensor:
        """Return the scalar loss: the mean of the reliable samples' measure, and the batch term."""
        weights = self.reliable.to(self.measure.dtype)
        kept = torch.where(self.reliable, self.measure, 0.0)
        mean = kept.sum() / weights.sum().clamp_min(1)
        return mean if self.batch_term is None else mean + self.batch_term


class TestTimeObjective(Protocol):
    """What the engine asks of an objective."""

    @property
    def needs_batch(self) -> bool:
        """Whether it looks at several samples at once, so that one alone makes no sense."""

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate at the first prediction ``(B, C, ...)``; ``second(y0)`` runs the anchor."""


@dataclass(frozen=True)
class Idempotence:
    r"""The idempotence distance :math:`d(y_0, F(x, y_0))`, after Durasov et al., ICML 2025.

    With ``reliability=None`` and ``balance=0`` it is the published objective. Measured on
    Fashion-MNIST, that form gains nothing reliable over batch statistics; see the README's table.

    Args:
        distance: a name, or a callable ``(B, C, ...), (B, C, ...) -> (B,)``.
        reliability: confidence above which a class prediction counts as reliable, provided that
            both predictions name the same class; the others do not move the weights. ``None``: all
            samples count. Predictions with one channel (values, binary masks) always count.
        balance: weight of :math:`\sum_k m_k \log m_k`, ``m`` the mean prediction of the batch: it
            spreads the predictions over the classes. **Only where the classes of a test batch are
            about equally frequent**: it gains points there and costs points where they are not.

    Raises:
        ValueError: unknown distance, ``reliability`` outside [0, 1], negative ``balance``.

    >>> y0 = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    >>> Idempotence()(y0, lambda prior: torch.tensor([[0.8, 0.2], [0.1, 0.9]])).reliable
    tensor([ True, False])
    """

    distance: DistanceName | Distance = "l2"
    reliability: float | None = 0.6
    balance: float = 0.0

    def __post_init__(self) -> None:
        get_distance(self.distance)
        _check(self.reliability, self.balance)

    @property
    def needs_batch(self) -> bool:
        """Whether the balance term is on."""
        return self.balance > 0

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate the distance between the first and the second prediction."""
        y1 = second(y0)
        reliable = confident(y0, self.reliability)
        if self.reliability is not None and _has_classes(y0):
            same = y0.argmax(1) == y1.argmax(1)
            reliable = reliable & same.flatten(1).all(1) if same.ndim > 1 else reliable & same
        measure = get_distance(self.distance)(y0, y1)
        return Objective(measure, reliable, balance_term(y0, self.balance))


@dataclass(frozen=True)
class Entropy:
    r"""The entropy of the prediction, :math:`-\sum_k p_k \log p_k` (Tent: Wang et al., ICLR 2021).

    Args:
        reliability: confidence above which a sample counts; ``None``: all, as published.
        balance: see :class:`Idempotence`.

    >>> Entropy()(torch.tensor([[0.5, 0.5]]), lambda prior: prior).measure
    tensor([0.6931])
    """

    reliability: float | None = None
    balance: float = 0.0

    def __post_init__(self) -> None:
        _check(self.reliability, self.balance)

    @property
    def needs_batch(self) -> bool:
        """Whether the balance term is on."""
        return self.balance > 0

    def __call__(self, y0: Tensor, second: SecondPass) -> Objective:
        """Evaluate the entropy of the first prediction; the second is not asked for."""
        if not _has_classes(y0):
            raise ValueError(
                f"Entropy needs class probabilities (B, C, ...) with C >= 2, got {tuple(y0.shape)}."
            )
        measure = get_distance("cross_entropy")(y0, y0)
        return Objective(measure, confident(y0, self.reliability), balance_term(y0, self.balance))


def confident(y0: Tensor, threshold: float | None) -> Tensor:
    """Return ``(B,)``: largest class probability (mean over positions) above the threshold."""
    if threshold is None or not _has_classes(y0):
        return torch.ones(y0.shape[0], dtype=torch.bool, device=y0.device)
    top = y0.detach().amax(1)
    return (top.flatten(1).mean(1) if top.ndim > 1 else top) > threshold


def balance_term(y0: Tensor, weight: float) -> Tensor | None:
    r"""Return :math:`w \sum_k m_k \log m_k`, ``m`` the mean prediction; ``None`` for weight 0."""
    if weight == 0:
        return None
    mean = y0.movedim(1, -1).flatten(0, -2).mean(0)
    return weight * (mean * mean.clamp_min(1e-12).log()).sum()


def _has_classes(y0: Tensor) -> bool:
    return y0.ndim > 1 and y0.shape[1] > 1


def _check(reliability: float | None, balance: float) -> None:
    if reliability is not None and not 0 <= reliability <= 1:
        raise ValueError(f"Expected reliability in [0, 1] or None, got {reliability}.")
    if balance < 0:
        raise ValueError(f"Expected balance >= 0, got {balance}.")
