"""What each shift does to the features of a table, as a pure function.

Every function takes features ``(N, F)``, float32, as
:class:`~it3_lightning.data.tabular.Preprocessing` makes them: a number is in standard deviations
from its training mean, a category is a block of zeros and ones. ``level`` is in the unit that the
docstring names, ``layout`` says which features make up one variable, and all randomness comes from
the generator. :class:`~it3_lightning.data.tabular.TabularShift` holds the five levels of each.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from it3_lightning.data.tabular.preprocessing import Layout


def zeroed(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Zero each cell with probability ``level``: a number becomes the mean, a category none.

    As the published code does on Boston housing: ``x * (rand > p)`` on standardised features.
    """
    return torch.where(_cells(features, level, layout, generator), 0.0, features)


def missing(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Take a share ``level`` of the variables away from all rows, at least one, and impute them."""
    count = max(1, round(level * layout.variables))
    gone = torch.randperm(layout.variables, generator=generator)[:count]
    return torch.where(torch.isin(layout.variable, gone), layout.missing, features)


def gaussian_noise(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Add normal noise of ``level`` standard deviations to the numbers."""
    noise = torch.randn(features.shape, generator=generator)
    return features + level * noise * layout.numeric


def uniform_noise(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Add uniform noise of at most ``level`` standard deviations to the numbers."""
    noise = 2 * torch.rand(features.shape, generator=generator) - 1
    return features + level * noise * layout.numeric


def scaled(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Multiply each numeric column by one factor, log-uniform between ``1 / level`` and ``level``.

    The distances from the training mean grow or shrink, as if a sensor had another gain.
    """
    factors = level ** (2 * torch.rand(features.shape[1], generator=generator) - 1)
    return features * torch.where(layout.numeric, factors, 1.0)


def rounded(features: Tensor, level: float, layout: Layout, _: Generator) -> Tensor:
    """Round the numbers to multiples of ``level`` standard deviations from the mean."""
    return torch.where(layout.numeric, (features / level).round() * level, features)


def swapped(features: Tensor, level: float, layout: Layout, generator: Generator) -> Tensor:
    """Choose each cell with probability ``level``; the chosen ones of a column change places."""
    order = torch.arange(len(features))[:, None].repeat(1, layout.variables)
    chosen = torch.rand(order.shape, generator=generator) < level
    for rows, picked in zip(order.unbind(1), chosen.unbind(1), strict=True):
        some = picked.nonzero()[:, 0]
        rows[some] = some[torch.randperm(len(some), generator=generator)]
    return features.gather(0, order[:, layout.variable])


def _cells(features: Tensor, rate: float, layout: Layout, generator: Generator) -> Tensor:
    """Choose cells at a rate, ``(N, F)``: all features of a category together."""
    chosen = torch.rand(len(features), layout.variables, generator=generator) < rate
    return chosen[:, layout.variable]
