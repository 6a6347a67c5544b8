"""How a prior enters a network, by hooks on its named layers: the network itself is not changed.

`FeatureInjection` adds an embedded prior to the output of a layer, `InputConcat` widens the input of
a layer, `ForwardArgument` hands the prior to a forward that takes one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from it3_lightning.layers import Embedder, feature_channels, widened, with_channels_at
from it3_lightning.messages import unknown
from it3_lightning.priors import Prior


class Conditioning(nn.Module, ABC):
    """Base of all conditionings: attached once to a network, then given a prior for each pass."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        if not layers:
            raise ValueError("Expected at least one layer name, got none.")
        self.layers = tuple(layers)
        self._prior: Tensor | None = None
        self._present: Tensor | None = None
        self._fired: set[str] = set()
        self._attached = False

    def attach(self, network: nn.Module, prior: Prior) -> None:
        """Build the weights and put the hooks on the network's layers; later calls do nothing.

        Args:
            network: holds the named layers.
            prior: gives the number of input channels and the neutral prior.

        Raises:
            ValueError: a layer does not exist, or its width cannot be told.
        """
        if self._attached:
            return
        modules = dict(network.named_modules())
        for name in self.layers:
            if name not in modules:
                raise ValueError(unknown("layer", name, modules))
        for name in self.layers:
            self._attach(name, modules[name], prior)
        self._attached = True

    @contextmanager
    def given(self, prior: Tensor | None, present: Tensor | None = None) -> Iterator[None]:
        """Condition every forward within on this prior; on the neutral one where it is ``None``.

        Args:
            prior: ``(B, C, ...)`` in label space, or ``None``.
            present: ``(B,)`` booleans: samples that see the prior; the others see the neutral one.

        Raises:
            RuntimeError: the forward within never ran one of the layers, so the prior was lost.
        """
        outer = self._prior, self._present, self._fired
        self._prior, self._present, self._fired = prior, present, set()
        try:
            yield
            missed = [name for name in self.layers if name not in self._fired]
            if missed:
                raise RuntimeError(
                    f"The forward pass never ran the layer(s) {missed}, so the prior had no effect "
                    "(fused layers, such as the projections inside attention, never run by "
                    "themselves). Choose a layer that the forward pass runs."
                )
        finally:
            self._prior, self._present, self._fired = outer

    @abstractmethod
    def _attach(self, name: str, layer: nn.Module, prior: Prior) -> None:
        """Build what this layer needs and register the hook."""

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints and YAML."""


class FeatureInjection(Conditioning):
    """Adds an embedding of the prior to the output of one or several layers.

    The neutral pass leaves the layers alone, so it is the plain network bit for bit. The last layer
    of the embedder starts at zero: an untrained conditioning changes nothing.

    Args:
        layer: name of the layer, or names; ``model.named_modules()`` lists them.
        mode: ``"add"``: ``h + e``; ``"film"``: ``(1 + scale) * h + shift``; or one per layer.
        channels: width of the layer's output, where it cannot be told from the layer.
        hidden: width of the embedder.

    Shapes:
        features ``(B, C)``, ``(B, T, C)`` tokens, ``(B, C, L)`` or ``(B, C, H, W)``.
    """

    def __init__(
        self,
        layer: str | Sequence[str],
        *,
        mode: Literal["add", "film"] | Sequence[Literal["add", "film"]] = "add",
        channels: int | None = None,
        hidden: int = 64,
    ) -> None:
        layers = [layer] if isinstance(layer, str) else list(layer)
        super().__init__(layers)
        modes = [mode] * len(layers) if isinstance(mode, str) else list(mode)
        if len(modes) != len(layers) or not set(modes) <= {"add", "film"}:
            raise ValueError(
                f"Expected mode 'add' or 'film', one for all or one per layer, got {mode!r} for "
                f"{len(layers)} layer(s)."
            )
        self.modes = dict(zip(layers, modes, strict=True))
        self.channels = channels
        self.hidden = hidden
        self.embedders = nn.ModuleDict()

    def _attach(self, name: str, layer: nn.Module, prior: Prior) -> None:
        channels = self.channels or feature_channels(name, layer)
        parts = 2 if self.modes[name] == "film" else 1
        neutral = None if prior.neutral_is_zero else prior.neutral_input(1, torch.zeros(1))
        self.embedders[_key(name)] = Embedder(
            prior.channels, self.hidden, parts * channels, neutral
        )
        layer.register_forward_hook(
            partial(self._inject, name, channels, isinstance(layer, nn.Conv1d))
        )

    def _inject(
        self, name: str, channels: int, channels_first: bool, _: nn.Module, __: Any, output: Any
    ) -> Any:
        self._fired.add(name)
        if self._prior is None:
            return None
        features = output[0] if isinstance(output, tuple) else output
        embedding = self.embedders[_key(name)](self._prior)
        embedding = with_channels_at(embedding, features, channels, channels_first, name)
        injected = self._combined(name, features, embedding.to(features.dtype))
        return (injected, *output[1:]) if isinstance(output, tuple) else injected

    def _combined(self, name: str, features: Tensor, embedding: Tensor) -> Tensor:
        if self.modes[name] == "film":
            scale, shift = embedding.unbind(0)
            injected = features * (1 + scale) + shift
        else:
            injected = features + embedding[0]
        if self._present is None:
            return injected
        present = self._present.reshape(-1, *[1] * (features.ndim - 1))
        return torch.where(present, injected, features)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            "layer": list(self.layers),
            "mode": list(self.modes.values()),
            "channels": self.channels,
            "hidden": self.hidden,
        }


class InputConcat(Conditioning):
    """Gives a layer extra input channels (or features) that carry the prior, as ZigZag does.

    A convolution or linear map of the concatenation ``[x, prior]`` is the sum of one of ``x`` and one
    of the prior, so the layer keeps its own weights and the prior gets weights of its own, of the
    same geometry: equal to a widened layer, and a plain checkpoint still fits.

    Args:
        layer: name of an ``nn.Linear`` or ``nn.Conv1d/2d/3d``, usually the first of the network.
    """

    def __init__(self, layer: str) -> None:
        super().__init__([layer])
        self.extra = nn.ModuleDict()
        self._source: Prior

    def _attach(self, name: str, layer: nn.Module, prior: Prior) -> None:
        self.extra[_key(name)] = widened(name, layer, prior.input_channels)
        object.__setattr__(self, "_source", prior)  # the module owns the prior, not this one
        layer.register_forward_hook(partial(self._widen, name))

    def _widen(
        self, name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        self._fired.add(name)
        prior = _filled(self._source, self._prior, self._present, args[0])
        if prior is None:
            return None
        extra = self.extra[_key(name)]
        weight = next(extra.parameters())
        if isinstance(extra, nn.Linear):
            shaped = prior.reshape(prior.shape[0], *[1] * (args[0].ndim - 2), -1)
        else:
            spatial = args[0].shape[2:]
            shaped = prior.reshape(*prior.shape[:2], *prior.shape[2:] or [1] * len(spatial))
            shaped = shaped.expand(-1, -1, *spatial)
        return output + extra(shaped.to(weight.dtype)).to(output.dtype)

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"layer": self.layers[0]}


class ForwardArgument(Conditioning):
    """Hands the prior to a forward that takes it, as a keyword argument.

    Args:
        argument: the keyword.
        layer: name of the module whose forward takes it; ``""`` is the LightningModule itself,
            called as ``self(x)``.

    The forward gets ``(B, C, ...)`` with any presence flag, or the neutral prior; ``None`` where the
    prior's ``neutral`` is ``"none"``.
    """

    def __init__(self, argument: str = "prior", *, layer: str = "") -> None:
        super().__init__([layer])
        self.argument = argument
        self._source: Prior

    def _attach(self, name: str, layer: nn.Module, prior: Prior) -> None:
        object.__setattr__(self, "_source", prior)
        layer.register_forward_pre_hook(partial(self._hand_over, name), with_kwargs=True)

    def _hand_over(
        self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._fired.add(name)
        like = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        keep_zeros = self._source.neutral != "none"
        prior = _filled(self._source, self._prior, self._present, like, keep_zeros=keep_zeros)
        return args, {**kwargs, self.argument: prior}

    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {"argument": self.argument, "layer": self.layers[0]}


def _filled(
    source: Prior,
    prior: Tensor | None,
    present: Tensor | None,
    like: Tensor,
    *,
    keep_zeros: bool = False,
) -> Tensor | None:
    """Return the prior as the network sees it, neutral where absent; ``None`` where it adds nothing."""
    if prior is None:
        adds = keep_zeros or not source.neutral_is_zero
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
        return source.neutral_input(like.shape[0], like.to(dtype)) if adds else None
    given = source.as_input(prior)
    if present is None:
        return given
    neutral = source.neutral_input(given.shape[0], given)
    neutral = neutral.reshape(*neutral.shape[:2], *[1] * (given.ndim - 2))
    return torch.where(present.reshape(-1, *[1] * (given.ndim - 1)), given, neutral)


def _key(name: str) -> str:
    """A module name that may serve as a key of ``nn.ModuleDict``."""
    return name.replace(".", "-") or "self"
