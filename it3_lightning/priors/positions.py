"""Positions of series and maps: where targets and outputs have their channels.

A layout names the dimensions in order: ``B`` samples, ``C`` channels, ``T`` steps of a series,
``H`` and ``W`` of a map. In label space the channels come first, ``(B, C, ...)``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

SeriesLayout = Literal["BC", "BTC", "BCT"]
ValueLayout = Literal["BC", "BTC", "BCT", "BCHW", "BHWC"]


def channels_first(values: Tensor, layout: str) -> Tensor:
    """Bring values of a layout into that of label space, ``(B, C, ...)``.

    Where the dimension of the channels is missing, there is one channel.

    >>> import torch
    >>> channels_first(torch.zeros(2, 5, 3), "BTC").shape
    torch.Size([2, 3, 5])
    >>> channels_first(torch.zeros(2, 5), "BTC").shape
    torch.Size([2, 1, 5])
    """
    if values.ndim == len(layout) - 1:
        return values.unsqueeze(1)
    return values.movedim(layout.index("C"), 1)


def laid_out_as(values: Tensor, layout: str, like: Tensor) -> Tensor:
    """Bring ``(B, C, ...)`` into a layout, and the shape of a tensor that has it.

    >>> import torch
    >>> laid_out_as(torch.zeros(2, 3, 5), "BTC", torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 3])
    """
    return values.movedim(1, layout.index("C")).reshape(like.shape)
