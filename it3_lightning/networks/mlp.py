"""A multilayer perceptron whose layers have names to inject at."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers ``layer0``, ``layer1``, ... with ReLU between, and a linear ``head``.

    Args:
        in_features: features of the input.
        out_features: outputs.
        hidden: widths of the hidden layers.

    Shapes:
        ``(B, in_features) -> (B, out_features)``.

    >>> import torch
    >>> MLP(4, 1)(torch.zeros(2, 4)).shape
    torch.Size([2, 1])
    """

    def __init__(
        self, in_features: int, out_features: int, hidden: Sequence[int] = (64, 64)
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("Expected at least one hidden layer, got none.")
        widths = [in_features, *hidden]
        self.depth = len(hidden)
        for index in range(self.depth):
            self.add_module(f"layer{index}", nn.Linear(widths[index], widths[index + 1]))
        self.head = nn.Linear(widths[-1], out_features)

    def forward(self, features: Tensor) -> Tensor:
        """Return the outputs."""
        for index in range(self.depth):
            features = self.get_submodule(f"layer{index}")(features).relu()
        outputs: Tensor = self.head(features)
        return outputs
