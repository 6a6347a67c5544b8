"""Where the output of a layer has its batch and its channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

_WIDTH = ("out_features", "out_channels", "num_features", "num_channels", "embedding_dim")


_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm of every dimension
    nn.GroupNorm,
)


@dataclass(frozen=True)
class Layout:
    """What is known of a layer's output before it runs.

    Args:
        name: of the layer.
        channels: width ``C`` of its output.
        first_in_tokens: whether ``C`` is sought at dimension 1 before the last, in 3 dimensions.
        first_in_maps: the same in 4 and more.
        sequence_first: whether an attention or recurrent layer in or around it takes ``(T, B, C)``.
    """

    name: str
    channels: int
    first_in_tokens: bool
    first_in_maps: bool
    sequence_first: bool

    @classmethod
    def of(cls, name: str, modules: Mapping[str, nn.Module], channels: int | None) -> Layout:
        """Return the layout of a layer: its own, or that of the last layer inside that tells.

        Args:
            name: of the layer.
            modules: those of the network by name.
            channels: width of its output, where the layer does not tell.

        Raises:
            ValueError: the width is neither told nor given.

        >>> block = nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU())
        >>> Layout.of("1", dict(nn.Sequential(nn.Identity(), block).named_modules()), None).channels
        8
        """
        layers = list(modules[name].modules())
        telling = next((layer for layer in reversed(layers) if width(layer)), None)
        found = channels or (None if telling is None else width(telling))
        if found is None:
            raise ValueError(
                f"Cannot tell the width of layer {name!r} ({type(modules[name]).__name__}). Give "
                f"it: FeatureInjection({name!r}, channels=...)."
            )
        convolutional = any(isinstance(layer, _CHANNELS_FIRST) for layer in layers)
        return cls(
            name=name,
            channels=found,
            first_in_tokens=isinstance(telling, _CHANNELS_FIRST),
            first_in_maps=convolutional or telling is None,
            sequence_first=_sequence_first(name, modules),
        )

    def laid_out(
        self, embedding: Tensor, features: Tensor, *, averaged: bool = True
    ) -> tuple[list[Tensor], int]:
        """Split an embedding ``(B, n * channels, ...)`` into parts that broadcast over features.

        Args:
            embedding: of a prior.
            features: of the layer.
            averaged: whether features without the embedding's positions may see their average.

        Returns:
            The parts, and the features' dimension of the batch.

        Raises:
            ValueError: the embedding does not fit the features.
        """
        if not averaged:
            self.check_positions(embedding, features)
        axes = self.axes(features, embedding.shape[0])
        return [placed(p, features, axes) for p in embedding.split(self.channels, dim=1)], axes[0]  # type: ignore[no-untyped-call]

    def check_positions(self, prior: Tensor, features: Tensor) -> None:
        """Refuse a prior of a series or a map where the features are none.

        Raises:
            ValueError: they have another number of dimensions.
        """
        if prior.ndim > 2 and prior.ndim != features.ndim:
            raise ValueError(
                f"The prior of a {_KINDS[prior.ndim]} with positions {tuple(prior.shape[2:])} does "
                f"not fit layer {self.name!r}, which puts out {tuple(features.shape)}. Name a "
                "layer that keeps such positions; or, where there are few values and always as "
                "many, take them as one vector, ValuePrior(size=...) with layout='BC'."
            )

    def axes(self, features: Tensor, batch: int) -> tuple[int, int]:
        """Return the dimensions of the batch and of the channels.

        Raises:
            ValueError: there are none of these sizes.
        """
        last = features.ndim - 1
        first = self.first_in_tokens if last == 2 else self.first_in_maps
        channels = [
            axis
            for axis in ((1, last) if first else (last, 1))
            if 0 < axis <= last and features.shape[axis] == self.channels
        ]
        batches = [
            axis
            for axis in ((1, 0) if self.sequence_first and last == 2 else (0, 1))
            if axis < max(last, 1) and features.shape[axis] == batch and axis not in channels[:1]
        ]
        if not channels or not batches:
            raise ValueError(
                f"A prior of {batch} samples does not fit the output of layer {self.name!r}, "
                f"{tuple(features.shape)}: expected as many samples and {self.channels} channels. "
                "Give FeatureInjection(..., channels=...) the layer's width."
            )
        return batches[0], channels[0]


def width(layer: nn.Module) -> int | None:
    """Return the width of a single layer's output, ``None`` where it does not tell.

    >>> width(nn.LSTM(4, 8, bidirectional=True))
    16
    """
    for attribute in _WIDTH:
        value = getattr(layer, attribute, None)
        if isinstance(value, int):
            return value
    shape = getattr(layer, "normalized_shape", None)
    if shape:
        return int(shape[-1] if len(shape) < 3 else shape[0])  # (T, C), or (C, H, W)
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    return None


def _sequence_first(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the nearest layer that has a ``batch_first`` sets it to false.

    It is sought inside the layer, then beside it, then beside each of the modules around it.
    """
    near = list(modules[name].modules())
    while True:
        for layer in near:
            batch_first = getattr(layer, "batch_first", None)
            if isinstance(batch_first, bool):
                return not batch_first
        if not name:
            return False
        name = name.rpartition(".")[0]
        near = list(modules[name].children()) if name in modules else []


_KINDS = {3: "series", 4: "map", 5: "volume"}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def placed(embedding: Tensor, features: Tensor, axes: tuple[int, int]) -> Tensor:
    """Shape an embedding so that it broadcasts over features.

    Args:
        embedding: ``(B, C)``, or a map ``(B, C, ...)``: resized where the features have as many
            positions' dimensions, averaged over its positions otherwise.
        features: of any shape.
        axes: the features' dimensions of the batch and of the channels.

    >>> import torch
    >>> placed(torch.zeros(2, 8), torch.zeros(2, 5, 8), (0, 2)).shape
    torch.Size([2, 1, 8])
    """
    others = [axis for axis in range(features.ndim) if axis not in axes]
    if embedding.ndim > 2 and embedding.ndim == features.ndim:
        full = resized(embedding, [features.shape[axis] for axis in others])
    else:
        pooled = embedding.flatten(2).mean(2) if embedding.ndim > 2 else embedding
        full = pooled.reshape(*pooled.shape, *[1] * len(others))
    return full.movedim(tuple(range(features.ndim)), (*axes, *others))


def resized(maps: Tensor, size: list[int]) -> Tensor:
    """Bring maps ``(B, C, ...)`` to other positions: averaged to fewer, interpolated to more.

    Interpolation alone would skip most positions of a much larger map, and thin lines with them.

    >>> import torch
    >>> resized(torch.tensor([[[0.0, 1.0]]]), [4])
    tensor([[[0.0000, 0.2500, 0.7500, 1.0000]]])
    >>> resized(torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]]), [2])
    tensor([[[0.3333, 0.0000]]])
    """
    fewer = [min(pair) for pair in zip(maps.shape[2:], size, strict=True)]
    if list(maps.shape[2:]) != fewer:
        maps = F.interpolate(maps, size=fewer, mode="area")
    if fewer == size:
        return maps
    return F.interpolate(maps, size=size, mode=_INTERPOLATION[len(size)])
