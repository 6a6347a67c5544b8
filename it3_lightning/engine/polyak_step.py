"""Polyak's step where one is all there is: from the source weights to new ones, with no copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from it3_lightning.engine.polyak import length
from it3_lightning.engine.updates import full_precision


class PolyakStep:
    """The only step there is, straight from the source: no optimizer, no copy of the weights.

    Args:
        share: of the loss, that it is to fall by.

    >>> w = torch.nn.Parameter(torch.full((1,), 1000.0))
    >>> PolyakStep(0.5).backward(2 * w.sum() - 1999, {"w": w})[0]
    {'w': tensor([999.7500])}
    """

    def __init__(self, share: float) -> None:
        self._share = share

    def backward(
        self, loss: Tensor, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Go back from the loss; return the moved weights of the parameters that it depends on.

        Returns:
            The weights by name, and how far they moved, which is finite if they are.
        """
        loss.backward(inputs=list(parameters.values()))  # type: ignore[no-untyped-call]
        moving = {name: p for name, p in parameters.items() if p.grad is not None}
        if not moving:
            return {}, loss
        gradients = _apart([full_precision(p.grad) for p in moving.values() if p.grad is not None])
        for parameter in moving.values():
            parameter.grad = None
        norm = torch.nn.utils.get_total_norm(gradients)
        source = {name: parameter.detach() for name, parameter in parameters.items()}
        weights = torch.nn.utils.get_total_norm([full_precision(w) for w in source.values()])
        scale = length(loss.detach().to(norm), norm.square(), weights.to(norm), self._share)
        for name, gradient in zip(moving, gradients, strict=True):
            gradient.mul_(-scale.to(gradient.device)).add_(source[name])
        moved = {n: g.to(source[n].dtype) for n, g in zip(moving, gradients, strict=True)}
        return moved, scale * norm


def _apart(gradients: list[Tensor]) -> list[Tensor]:
    """Return gradients fit to be written into: of views of one tensor, they share its memory."""
    users = Counter(gradient.untyped_storage().data_ptr() for gradient in gradients)
    return [g.clone() if users[g.untyped_storage().data_ptr()] > 1 else g for g in gradients]
