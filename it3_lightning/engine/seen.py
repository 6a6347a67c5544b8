"""What one evaluation of an objective says of every sample by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REASONS = ("non-finite output", "non-finite loss", "non-finite gradient or weights")


@dataclass(frozen=True)
class Seen:
    """Of every sample: outputs ``(B, ...)``, the others ``(B,)``.

    Args:
        outputs: of the first pass.
        measure: of the objective.
        reliable: whether it counts.
        moves: whether its weights move.
        loss: of the sample alone.

    >>> one = torch.ones(2)
    >>> Seen(torch.tensor([[1.0], [torch.nan]]), one, one, one, one).trouble()
    tensor([0, 1])
    """

    outputs: Tensor
    measure: Tensor
    reliable: Tensor
    moves: Tensor
    loss: Tensor

    def trouble(self) -> Tensor:
        """Return ``(B,)`` on the CPU: 0, or the number of the reason not to go on."""
        output = ~self.outputs.isfinite().flatten(1).all(1)
        return torch.where(output, 1, 2 * ~self.loss.isfinite()).cpu()
