"""IT3: the distance between two predictions, the second of which was shown the first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from it3_lightning.methods.base import Objective, Passes, SecondPass, TestTimeMethod
from it3_lightning.methods.terms import (
    Distance,
    DistanceName,
    agreeing,
    balance_term,
    check_settings,
    confident,
    get_distance,
    measured,
    sharpen_term,
)


@dataclass(frozen=True)
class Idempotence(TestTimeMethod):
    r"""The idempotence distance :math:`d(y_0, F(x, y_0))`, after Durasov et al., ICML 2025.

    With ``reliability=None`` and ``balance=0`` it is the published objective. By default only
    reliable samples count, those whose second prediction confirms the first. It gains somewhat less
    than the published form, and costs less where that one loses; docs/results.md has each part as
    a row of its own.

    Args:
        distance: a name, or a callable ``(B, C, ...), (B, C, ...) -> (B,)``; where there is
            padding it is shown equal predictions.
        reliability: confidence above which a class prediction counts as reliable, provided that
            both predictions name the same class; the others do not move the weights. Of maps, the
            mean confidence and the share of positions with the same class must lie above it.
            ``None``: all samples count. So do predictions that are no distributions over classes:
            values, binary masks.
        balance: weight of :math:`\sum_k m_k \log m_k`, ``m`` the mean prediction of the batch: it
            spreads the predictions over the classes. **Only where the classes of a test batch are
            about equally frequent**: it gains points there and costs points where they are not.
        sharpen: weight of the entropy of the first prediction, :math:`-\sum_k p_k \log p_k`, on the
            reliable samples: idempotence then says which predictions may be trusted. With small
            steps of Adam it gains under noise; it costs points where shifts mislead. No effect
            where no filter says so (``reliability=None``), and on predictions that are no
            distributions over classes.

    Raises:
        ValueError: unknown distance, ``reliability`` outside [0, 1], negative ``balance`` or
            ``sharpen``; when evaluated, a distance that is not ``(B,)``, or ``balance`` without
            classes.

    >>> import torch
    >>> y0 = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    >>> Idempotence()(y0, lambda prior: torch.tensor([[0.8, 0.2], [0.1, 0.9]])).reliable
    tensor([ True, False])
    """

    distance: DistanceName | Distance = "l2"
    reliability: float | None = 0.6
    balance: float = 0.0
    sharpen: float = 0.0
    needs_prior: ClassVar[bool] = True
    vmappable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        get_distance(self.distance)
        check_settings(self.reliability, self.balance, self.sharpen)

    @property
    def needs_batch(self) -> bool:
        """Whether the balance term is on."""
        return self.balance > 0

    def loss(self, passes: Passes) -> Objective:
        """Evaluate the distance between the first and the second prediction."""
        if passes.valid is None:  # a subclass may know of none
            return self(passes.y0, passes.second)
        return self(passes.y0, passes.second, passes.valid)

    def __call__(self, y0: Tensor, second: SecondPass, valid: Tensor | None = None) -> Objective:
        """Evaluate the distance between the first and the second prediction."""
        y1 = second(y0)
        measure = measured(self.distance, y0, y1, valid)
        if measure.shape != y0.shape[:1]:
            raise ValueError(
                f"Expected a distance of shape ({y0.shape[0]},), one per sample, got "
                f"{tuple(measure.shape)}. Do not average over the batch."
            )
        limit = self.reliability
        reliable = confident(y0, limit, valid) & agreeing(y0, y1, limit, valid)
        sharpen = 0.0 if self.reliability is None else self.sharpen
        terms = balance_term(y0, self.balance, valid), sharpen_term(y0, sharpen, valid)
        return Objective(measure, reliable, *terms)
