"""Perturbations of the inputs in the label pass, which make the second prediction a better one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from it3_lightning.graphs import graph_count, is_graph, map_nodes


class RandomNoise(nn.Module):
    """Adds Gaussian noise whose size is drawn per sample from ``U(0, size)``.

    Args:
        size: largest standard deviation of the noise, in units of the inputs.
        low: values are clamped to at least this, where given.
        high: values are clamped to at most this, where given.

    Shapes:
        floating tensors ``(B, ...)``, possibly nested; others pass unchanged. In batches of graphs:
        the floating node features, with one size per graph; edges stay as they are.

    Raises:
        ValueError: ``size`` is negative, or ``low`` above ``high``.

    >>> noisy = RandomNoise(10.0, low=0.0, high=1.0)(torch.full((2, 100), 0.5))
    >>> noisy.min().item(), noisy.max().item()
    (0.0, 1.0)
    """

    def __init__(self, size: float = 0.2, *, low: float | None = None, high: float | None = None):
        super().__init__()
        if size < 0:
            raise ValueError(f"Expected size >= 0, got {size}.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"Expected low <= high, got {low} and {high}.")
        self.size, self.low, self.high = size, low, high

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints."""
        return {"size": self.size, "low": self.low, "high": self.high}

    def forward(self, inputs: Any) -> Any:
        """Return noisy copies."""
        return tree_map(self._noisy, inputs)

    def _noisy(self, values: Any) -> Any:
        if is_graph(values):
            sizes = self.size * torch.rand(graph_count(values) or 1)
            return map_nodes(values, lambda x, graphs: self._added(x, sizes.to(x)[graphs]))
        if not isinstance(values, Tensor) or not values.is_floating_point() or values.ndim == 0:
            return values
        sizes = torch.rand(values.shape[0], device=values.device, dtype=values.dtype)
        return self._added(values, self.size * sizes)

    def _added(self, values: Tensor, sizes: Tensor) -> Tensor:
        """Add noise of the size ``(rows,)`` to each row."""
        noisy = values + sizes.reshape(-1, *[1] * (values.ndim - 1)) * torch.randn_like(values)
        clamped = self.low is not None or self.high is not None
        return noisy.clamp(self.low, self.high) if clamped else noisy
