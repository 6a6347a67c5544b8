"""A small network that turns a prior into what is added to features."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Embedder(nn.Module):
    """A small MLP over the prior's channels, ``(B, C, ...) -> (B, out, ...)``, zero at first.

    Args:
        channels: of the prior.
        hidden: width of the hidden layer.
        out: channels of the result.
        neutral: a neutral prior ``(1, C)`` whose embedding is subtracted, so that "don't know" adds
            nothing; ``None`` where that is zero input and no subtraction is wanted.

    >>> import torch
    >>> Embedder(3, 4, 2, None)(torch.eye(3)).shape
    torch.Size([3, 2])
    """

    neutral: Tensor | None

    def __init__(self, channels: int, hidden: int, out: int, neutral: Tensor | None) -> None:
        super().__init__()
        self.first = nn.Linear(channels, hidden)
        self.last = nn.Linear(hidden, out)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)
        values = None if neutral is None else neutral[:, :channels].flatten(1)
        self.register_buffer("neutral", values, persistent=False)

    def forward(self, prior: Tensor) -> Tensor:
        """Embed each position's prior."""
        rows = prior.movedim(1, -1).to(self.first.weight.dtype)
        embedded = self._mlp(rows)
        if self.neutral is not None:
            embedded = embedded - self._mlp(self.neutral.to(rows.dtype))
        return embedded.movedim(-1, 1)

    def _mlp(self, rows: Tensor) -> Tensor:
        embedded: Tensor = self.last(F.relu(self.first(rows)))
        return embedded
