"""The prior as extra input channels of a layer."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from it3_lightning.conditioning.conditioning import Conditioning, key, seen
from it3_lightning.conditioning.layout import Layout, placed, resized
from it3_lightning.priors import Prior

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class InputConcat(Conditioning):
    """Gives a layer extra input channels (or features) that carry the prior, as ZigZag does.

    A convolution or linear map of the concatenation ``[x, prior]`` is the sum of one of ``x`` and
    one of the prior, so the layer keeps its own weights and the prior gets weights of its own, of
    the same geometry: equal to a widened layer, and a plain checkpoint still fits. A prior map of
    another size is resized to the layer's input.

    Args:
        layer: name of an ``nn.Linear`` or ``nn.Conv1d/2d/3d``, usually the first of the network.

    Raises:
        ValueError: when attached to another kind of layer, or a grouped convolution.

    >>> import torch
    >>> from it3_lightning.priors import ClassPrior
    >>> layer, concat = nn.Linear(2, 1), InputConcat("0")
    >>> concat.attach(nn.Sequential(layer), ClassPrior(3))
    >>> concat.extra["0"].weight.data = torch.tensor([[0.0, 5.0, 0.0]])
    >>> x, prior = torch.ones(1, 2), torch.tensor([[0.0, 1.0, 0.0]])
    >>> with concat.given(prior):
    ...     conditioned = layer(x)
    >>> round((conditioned - layer(x)).item(), 4)
    5.0
    """

    def __init__(self, layer: str) -> None:
        super().__init__([layer])
        self.extra = nn.ModuleDict()

    def _attach(self, name: str, modules: Mapping[str, nn.Module], prior: Prior) -> None:
        self.extra[key(name)] = widened(name, modules[name], prior.input_channels)
        layout = Layout.of(name, modules, None)
        modules[name].register_forward_hook(partial(self._widen, layout), with_kwargs=True)

    def _widen(
        self,
        layout: Layout,
        _: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        self.shown.ran.add(layout.name)
        if self.shown.prior is None and self._source.neutral_is_zero:
            return None
        extra = self.extra[key(layout.name)]
        weight = next(extra.parameters())
        prior = seen(self._source, self.shown.prior, self.shown.present, output.shape[0], weight)
        inputs = args[0] if args else kwargs["input"]
        if not self._source.averaged and prior.shape[2:].numel() > 1:
            layout.check_positions(prior, output)
        if isinstance(extra, nn.Linear):
            term = self._linear(extra, layout, prior, output)
        else:
            term = extra(_spread(prior, list(inputs.shape[2:])))
        return output + term.to(output.dtype)

    def _linear(self, extra: nn.Linear, layout: Layout, prior: Tensor, output: Tensor) -> Tensor:
        embedded: Tensor = extra(prior.movedim(1, -1)).movedim(-1, 1)
        return placed(embedded, output, layout.axes(output, prior.shape[0]))

    @property
    def untrained(self) -> bool:
        """Whether the weights of the prior are zero, as they start."""
        return not any(parameter.any() for parameter in self.extra.parameters())

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"layer": self.layers[0]}


def widened(name: str, layer: nn.Module, channels: int) -> nn.Module:
    """Return weights for extra input channels of a layer: same geometry, no bias, zero at first.

    Raises:
        ValueError: the layer is neither linear nor an ungrouped convolution.

    >>> widened("stem", nn.Conv2d(3, 8, 5, padding=2), 4).weight.shape
    torch.Size([8, 4, 5, 5])
    """
    extra: nn.Module
    kind = next((c for c in _CONVOLUTIONS if isinstance(layer, c)), None)
    if isinstance(layer, nn.Linear):
        extra = nn.Linear(channels, layer.out_features, bias=False)
    elif kind is not None and isinstance(layer, _CONVOLUTIONS) and layer.groups == 1:
        extra = kind(
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
    return extra.to(next(layer.parameters()).device)


def _spread(prior: Tensor, size: list[int]) -> Tensor:
    """Bring a prior to these positions: vectors and single positions repeated, maps resized."""
    maps = prior.reshape(*prior.shape[:2], *[1] * len(size)) if prior.ndim == 2 else prior
    if all(length == 1 for length in maps.shape[2:]):
        return maps.expand(-1, -1, *size)
    return resized(maps, size)
