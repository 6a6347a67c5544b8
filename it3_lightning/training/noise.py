"""Input noise: a perturbation of inputs, in their own units or in units of their spread."""

from __future__ import annotations

from itertools import count
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from it3_lightning.priors.values import joined_moments
from it3_lightning.utils.graphs import graph_count, is_graph, map_nodes
from it3_lightning.utils.messages import unknown

Scale = Literal["inputs", "spread"]

_SMALLEST, _LARGEST = 0.05, 5.0  # of the inputs' spread: beyond, nothing or all of it is noise

_MISFIT = """Inputs are perturbed by RandomNoise, whose size={size:g} is in units of the inputs, \
and these have a standard deviation of {spread:.3g}: the largest noise is {ratio:.2g} of it. In \
units of their spread, write
    RandomNoise({size:g}, scale="spread"{dim})
or, where the size is meant, RandomNoise({size:g}, scale="inputs")."""


class RandomNoise(nn.Module):
    r"""Adds Gaussian noise whose size is drawn per sample from ``U(0, size)``.

    Args:
        size: largest standard deviation of the noise, in units of ``scale``.
        low: values are clamped to at least this, where given.
        high: values are clamped to at most this, where given.
        scale: ``"inputs"``: the units of the inputs, whatever these are; ``"spread"``: standard
            deviations of the inputs, each channel's own, over the batches that training has seen so
            far in this process. They are measured anew where training goes on from a checkpoint.
            Default: as ``"inputs"``, and fitting warns where the size is no 20th of their spread,
            or more than 5 times as large.
        dim: dimension of the channels that ``"spread"`` goes by: 1 for rows ``(B, F)`` and images
            ``(B, C, H, W)``, -1 for series ``(B, T, C)``.

    Shapes:
        floating tensors ``(B, ...)``, possibly nested; others pass unchanged. In batches of graphs:
        the floating node features, with one size per graph; edges stay as they are.

    Raises:
        ValueError: ``size`` is negative, ``low`` above ``high``, or ``scale`` unknown.

    >>> noisy = RandomNoise(10.0, low=0.0, high=1.0)(torch.full((2, 100), 0.5))
    >>> noisy.min().item(), noisy.max().item()
    (0.0, 1.0)
    """

    def __init__(
        self,
        size: float = 0.2,
        *,
        low: float | None = None,
        high: float | None = None,
        scale: Scale | None = None,
        dim: int = 1,
    ):
        super().__init__()
        if size < 0:
            raise ValueError(f"Expected size >= 0, got {size}.")
        if low is not None and high is not None and low > high:
            raise ValueError(f"Expected low <= high, got {low} and {high}.")
        if scale not in (None, *get_args(Scale)):
            raise ValueError(unknown("scale", scale, get_args(Scale)))
        self.size, self.low, self.high, self.scale, self.dim = size, low, high, scale, dim
        self._measured: dict[tuple[int, int, int], Tensor] = {}  # by a tensor's place and channels

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints."""
        own = {"size": self.size, "low": self.low, "high": self.high}
        return {**own, "scale": self.scale, "dim": self.dim}

    def forward(self, inputs: Any) -> Any:
        """Return noisy copies."""
        leaves, structure = tree_flatten(inputs)
        noisy = [self._noisy(place, leaf) for place, leaf in enumerate(leaves)]
        return tree_unflatten(noisy, structure)

    def misfit(self, inputs: Any) -> str | None:
        """Say so where the size is out of proportion to the spread of a batch of inputs.

        >>> images = torch.tensor([0.0, 1.0]).repeat(4, 3, 8, 4)
        >>> RandomNoise().misfit(images) is None  # 0.2 of a spread of 0.5
        True
        >>> "largest noise is 0.0016" in RandomNoise().misfit(255 * images)
        True
        """
        if self.scale is not None or self.size == 0:
            return None
        spreads = [_spread_of(_moments_of(x, self.dim)) for x in _tensors_in(inputs)]
        found = torch.cat([spread.cpu() for spread in spreads]) if spreads else torch.zeros(0)
        if not (found > 0).any():
            return None
        spread = found[found > 0].median().item()
        ratio = self.size / spread
        if _SMALLEST <= ratio <= _LARGEST:
            return None
        dim = "" if self.dim == 1 else f", dim={self.dim}"
        return _MISFIT.format(size=self.size, spread=spread, ratio=ratio, dim=dim)

    def _noisy(self, place: int, values: Any) -> Any:
        if is_graph(values):
            sizes, parts = self.size * torch.rand(graph_count(values) or 1), count()
            return map_nodes(
                values,
                lambda x, graphs: self._added((place, next(parts)), x, sizes.to(x)[graphs]),
            )
        if not _noisable(values):
            return values
        sizes = torch.rand(values.shape[0], device=values.device, dtype=values.dtype)
        return self._added((place, 0), values, self.size * sizes)

    def _added(self, place: tuple[int, int], values: Tensor, sizes: Tensor) -> Tensor:
        """Add noise of the size ``(rows,)`` to each row."""
        sizes = sizes.reshape(-1, *[1] * (values.ndim - 1))
        if self.scale == "spread":
            sizes = sizes * self._spread(place, values)
        noisy = values + sizes * torch.randn_like(values)
        clamped = self.low is not None or self.high is not None
        return noisy.clamp(self.low, self.high) if clamped else noisy

    def _spread(self, place: tuple[int, int], values: Tensor) -> Tensor:
        """Return the spread of the channels so far, which broadcasts over values.

        Batches count where gradients are on: those of a validation change nothing.
        """
        found = _moments_of(values, self.dim)
        key = *place, found.shape[1]
        known = self._measured.get(key)
        if torch.is_grad_enabled() or known is None:
            parts = [found] if known is None else [known.to(found), found]
            total = joined_moments(torch.stack(parts))
        else:
            total = known
        if torch.is_grad_enabled():
            self._measured[key] = total
        spread = _spread_of(total).to(values)
        if values.ndim == 1:
            return spread
        shape = [1] * values.ndim
        shape[self.dim] = -1
        return spread.reshape(shape)


def _noisable(values: Any) -> bool:
    """Whether noise may be added: to floating tensors of samples."""
    return isinstance(values, Tensor) and values.is_floating_point() and values.ndim > 0


def _tensors_in(inputs: Any) -> list[Tensor]:
    """Return what noise would be added to, node features of graphs too."""
    found: list[Tensor] = []

    def seen(values: Tensor, _: Tensor) -> Tensor:
        found.append(values)
        return values

    for leaf in tree_leaves(inputs):
        if is_graph(leaf):
            map_nodes(leaf, seen)
        elif _noisable(leaf):
            found.append(leaf)
    return found


def _moments_of(values: Tensor, dim: int) -> Tensor:
    """Return count, mean and sum of squared deviations of the finite values of each channel."""
    rows = values.detach().unsqueeze(1) if values.ndim == 1 else values.detach().movedim(dim, -1)
    rows = rows.flatten(0, -2).float()
    finite = rows.isfinite()
    number = finite.sum(0)
    mean = torch.where(finite, rows, 0.0).sum(0) / number.clamp_min(1)
    squares = torch.where(finite, rows - mean, 0.0).square().sum(0)
    return torch.stack([number.to(mean), mean, squares])


def _spread_of(moments: Tensor) -> Tensor:
    """Return the standard deviations of the channels."""
    number, _, squares = moments
    spread: Tensor = (squares / number.clamp_min(1)).sqrt()
    return spread
