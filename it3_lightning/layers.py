"""What a conditioning must know of layers: their width, their geometry, where their channels are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_WIDTH = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Embedder(nn.Module):
    """A small MLP over the prior's channels, ``(B, C, ...) -> (B, out, ...)``, zero at first.

    Args:
        channels: of the prior.
        hidden: width of the hidden layer.
        out: channels of the result.
        neutral: a neutral prior ``(1, C)`` whose embedding is subtracted, so that "don't know" adds
            nothing; ``None`` where that is zero input and no subtraction is wanted.
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
        return self.last(F.relu(self.first(rows)))  # type: ignore[no-any-return]


def feature_channels(name: str, layer: nn.Module) -> int:
    """Return the width of a layer's output: its own, or that of the last layer inside that has one.

    Raises:
        ValueError: no layer inside tells its width.

    >>> feature_channels("net", nn.Sequential(nn.Linear(4, 8), nn.ReLU()))
    8
    """
    for module in reversed(list(layer.modules())):
        for attribute in _WIDTH:
            width = getattr(module, attribute, None)
            if isinstance(width, int):
                return width
        shape = getattr(module, "normalized_shape", None)
        if shape:
            return int(shape[-1])
        if isinstance(module, nn.RNNBase):
            return module.hidden_size * (2 if module.bidirectional else 1)
    raise ValueError(
        f"Cannot tell the width of layer {name!r} ({type(layer).__name__}). Give it: "
        f"FeatureInjection({name!r}, channels=...)."
    )


def widened(name: str, layer: nn.Module, channels: int) -> nn.Module:
    """Return weights for extra input channels of a layer: same geometry, no bias, zero at first.

    Raises:
        ValueError: the layer is neither linear nor an ungrouped convolution.
    """
    extra: nn.Module
    if isinstance(layer, nn.Linear):
        extra = nn.Linear(channels, layer.out_features, bias=False)
    elif isinstance(layer, _CONVOLUTIONS) and layer.groups == 1:
        extra = type(layer)(
            channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            padding_mode=layer.padding_mode,
            bias=False,
        )
    else:
        raise ValueError(
            f"InputConcat expected an nn.Linear or an ungrouped nn.Conv1d/2d/3d at {name!r}, got "
            f"{type(layer).__name__}. Name the network's first layer, or use FeatureInjection."
        )
    nn.init.zeros_(next(extra.parameters()))
    return extra


def with_channels_at(
    embedding: Tensor, features: Tensor, channels: int, channels_first: bool, name: str
) -> Tensor:
    """Shape embeddings ``(B, parts * C, ...)`` to ``(parts, ...)`` that broadcast over features.

    Raises:
        ValueError: the features have no dimension of that width, or another batch size.
    """
    parts = embedding.unflatten(1, (-1, channels)).movedim(1, 0)  # (parts, B, C, ...)
    axis = _channel_axis(features, channels, channels_first)
    batch_axis = 0 if features.shape[0] == parts.shape[1] else 1
    fits = axis is not None and features.shape[batch_axis] == parts.shape[1]
    if not fits or axis == batch_axis:
        raise ValueError(
            f"The prior's embedding of shape {tuple(parts.shape[1:])} does not fit the output of "
            f"layer {name!r}, {tuple(features.shape)}: expected the same batch size and "
            f"{channels} channels. Give FeatureInjection(..., channels=...) the layer's width."
        )
    if parts.ndim > 3:  # a map of priors
        return _resized(parts, features, axis == 1)
    shape = [1] * features.ndim
    shape[batch_axis], shape[axis] = parts.shape[1], channels
    return parts.reshape(parts.shape[0], *shape)


def _channel_axis(features: Tensor, channels: int, channels_first: bool) -> int | None:
    last = features.ndim - 1
    order = (1, last) if features.ndim > 3 or channels_first else (last, 1)
    return next((axis for axis in order if features.shape[axis] == channels), None)


def _resized(parts: Tensor, features: Tensor, channels_first: bool) -> Tensor:
    """Bring maps ``(parts, B, C, H, W)`` to the features' resolution, as vectors where it has none."""
    if features.ndim == 4 and channels_first:
        size = features.shape[2:]
        return torch.stack([F.interpolate(p, size=size, mode="bilinear") for p in parts])
    pooled = parts.flatten(3).mean(3)
    shape = (*pooled.shape[:2], *[1] * (features.ndim - 2), pooled.shape[2])
    return pooled.reshape(shape)
