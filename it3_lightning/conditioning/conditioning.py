"""The prior as a network sees it: with its presence flag, and neutral where there is none."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from it3_lightning.priors import Prior
from it3_lightning.utils.messages import unknown


def seen(
    source: Prior, prior: Tensor | None, present: Tensor | None, batch_size: int, like: Tensor
) -> Tensor:
    """Return the given prior where it is present, the neutral one elsewhere.

    Args:
        source: knows the presence flag and the neutral prior.
        prior: ``(B, C, ...)`` in label space, beside any context, or ``None``.
        present: ``(B,)`` booleans, or ``(B, ...)`` of its positions; ``None`` for all.
        batch_size: of the neutral prior, where none is given.
        like: device and, where it is floating, data type of the result.

    >>> from it3_lightning.priors import ValuePrior
    >>> seen(ValuePrior(), torch.ones(2, 1), torch.tensor([True, False]), 2, torch.zeros(1))
    tensor([[1., 1.],
            [0., 0.]])
    """
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    if prior is None:
        return source.neutral_input(batch_size, like.new_empty(0, dtype=dtype))
    given = source.as_input(prior.to(like.device, dtype))
    if present is None:
        return given
    neutral = source.neutral_input(given.shape[0], given)
    neutral = neutral.reshape(*neutral.shape[:2], *[1] * (given.ndim - 2))
    shape = (present.shape[0], 1, *present.shape[1:], *[1] * (given.ndim - 1 - present.ndim))
    return torch.where(present.reshape(shape), given, neutral)


@dataclass
class Shown:
    """What a pass is shown.

    Args:
        prior: ``(B, C, ...)`` in label space, beside any context; ``None``: the neutral one.
        present: ``(B,)`` booleans, samples that see the prior, or ``(B, ...)``, positions that do;
            the others see the neutral one. ``None``: all.
        ran: names of the layers where it has entered.
    """

    prior: Tensor | None = None
    present: Tensor | None = None
    ran: set[str] = field(default_factory=set)


class Conditioning(nn.Module, ABC):
    """Base of all conditionings: attached once to a network, then given a prior for each pass.

    Args:
        layers: names of the layers where the prior enters.

    Raises:
        ValueError: there is no layer, or one is named twice.
    """

    enters: Literal["input", "output"] = "output"
    """Whether the prior enters its layers before or after they run."""

    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(f"Expected at least one layer name, each once, got {list(layers)}.")
        self.layers = tuple(layers)
        self.shown = Shown()
        self._attached = False
        self._source: Prior

    def attach(self, network: nn.Module, prior: Prior) -> None:
        """Build the weights and put the hooks on the network's layers; once is enough.

        Args:
            network: holds the named layers.
            prior: gives the number of input channels and the neutral prior.

        Raises:
            ValueError: a layer does not exist, its width cannot be told, or this conditioning is
                attached to another network.
        """
        modules = dict(network.named_modules(remove_duplicate=False))
        if self._attached:
            return self._check_same(modules)
        for name in self.layers:
            if name not in modules:
                raise ValueError(unknown("layer", name, modules))
        object.__setattr__(self, "_source", prior)  # the module owns the prior, not this one
        for name in self.layers:
            self._attach(name, modules, prior)
        self._attached = True
        return None

    def detach(self, network: nn.Module) -> None:
        """Take the hooks off the network's layers again, for another conditioning; for good."""
        for layer in network.modules():
            for hooks, others in (
                (layer._forward_hooks, layer._forward_hooks_with_kwargs),
                (layer._forward_pre_hooks, layer._forward_pre_hooks_with_kwargs),
            ):
                for number in [n for n, hook in hooks.items() if self.owns(hook)]:
                    del hooks[number]
                    others.pop(number, None)

    @contextmanager
    def given(
        self, prior: Tensor | None, present: Tensor | None = None, context: Tensor | None = None
    ) -> Iterator[None]:
        """Condition every forward within on this prior; on the neutral one where it is ``None``.

        Args:
            prior: ``(B, C, ...)`` in label space, or ``None``.
            present: see :class:`Shown`.
            context: ``(1, K)``, for a prior that has one; default: that of these priors.

        Raises:
            RuntimeError: the forward within never ran one of the layers, so the prior was lost.
        """
        if prior is not None and self._attached and self._source.joins:
            prior = self._source.joined(prior, context)
        outer, self.shown = self.shown, Shown(prior, present)
        try:
            yield
            if len(self.shown.ran) < len(self.layers):
                raise self.unreached()
        finally:
            self.shown = outer

    def unreached(self) -> RuntimeError:
        """Say which layers a forward pass never ran."""
        missed = [name for name in self.layers if name not in self.shown.ran]
        return RuntimeError(
            f"The forward pass never ran the layer(s) {missed}, so the prior had no effect "
            "(fused layers, such as the projections inside attention, never run by "
            "themselves). Choose a layer that the forward pass runs."
        )

    @property
    def untrained(self) -> bool:
        """Whether it is known to change nothing yet, as its weights are zero: train it first."""
        return False

    @abstractmethod
    def _attach(self, name: str, modules: Mapping[str, nn.Module], prior: Prior) -> None:
        """Build what this layer needs and register the hook."""

    @abstractmethod
    def init_args(self) -> dict[str, Any]:
        """Return the constructor's arguments, for checkpoints and YAML."""

    def _check_same(self, modules: Mapping[str, nn.Module]) -> None:
        layers = [modules[name] for name in self.layers if name in modules]
        if not all(self._is_on(layer) for layer in layers):
            raise ValueError(
                f"This {type(self).__name__} is attached to another network already, or its layer "
                "was replaced since. Make one for each network, after its layers are in place."
            )

    def _is_on(self, layer: nn.Module) -> bool:
        """Whether a hook of this conditioning sits on the layer, compiled since or not."""
        layer = getattr(layer, "_orig_mod", layer)
        hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
        return any(map(self.owns, hooks))

    def owns(self, hook: Any) -> bool:
        """Whether a hook is one of this conditioning."""
        return getattr(getattr(hook, "func", None), "__self__", None) is self


def key(name: str) -> str:
    """Return a layer's name as a key of ``nn.ModuleDict``: no dots, no name of an attribute.

    >>> key("net.layer1"), key(""), key("keys")
    ('net-layer1', 'self', 'keys-')
    """
    plain = name.replace(".", "-") or "self"
    return f"{plain}-" if hasattr(nn.ModuleDict, plain) else plain
