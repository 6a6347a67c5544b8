r"""A step as long as the distance asks for: nothing to move, no step.

The idempotence distance cannot fall below 0, so Polyak's rule tells the length of a step,
:math:`\theta \leftarrow \theta - \eta \frac{L}{\|\nabla L\|^2} \nabla L`, by which the loss falls
by its share :math:`\eta`, to first order (Polyak, Introduction to Optimization, 1987). It depends
neither on the units of the loss nor on those of the weights, and vanishes with the loss, whereas
the first step of Adam is as long on clean samples as on shifted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MOST = 1e-3  # of the weights' norm: where the loss hardly depends on them, the rule overshoots
_EPS = 1e-30


def length(loss: Tensor, square: Tensor, weights: Tensor, share: float) -> Tensor:
    """Return what gradients are to be multiplied by.

    Args:
        loss: to lower, a scalar, or ``(B,)`` as all others; nothing moves where it is below 0.
        square: squared norm of its gradients.
        weights: norm of the weights.
        share: of the loss, that it is to fall by.

    >>> loss, square = torch.tensor(1.0), torch.tensor(4.0)
    >>> length(loss, square, torch.tensor(1000.0), 0.5)
    tensor(0.1250)
    """
    step = share * loss.clamp_min(0) / (square + _EPS)
    return torch.minimum(step, _MOST * weights / (square.sqrt() + _EPS))


class Polyak(Optimizer):
    """Moves parameters by Polyak's rule, no further than a thousandth of their norm.

    Args:
        params: to move.
        lr: share of the loss that a step is to take away, to first order.

    >>> w = torch.nn.Parameter(torch.full((1,), 1000.0))
    >>> w.grad = torch.full((1,), 2.0)  # of a loss of 1
    >>> Polyak([w], lr=0.5).step(lambda: torch.tensor(1.0))
    >>> w.item()
    999.75
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: returns the loss whose gradients the parameters have.
        """
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            if not moving:
                continue
            gradients = [p.grad for p in moving]
            square = torch.nn.utils.get_total_norm(gradients).square()
            weights = torch.nn.utils.get_total_norm(group["params"])
            loss = closure().to(square)
            scale = length(loss, square, weights, group["lr"])
            steps = [gradient * scale.to(gradient.device) for gradient in gradients]
            torch._foreach_sub_(moving, steps)
