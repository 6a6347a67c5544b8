"""Watches layers during a pass: what goes into them, and on the way back, what comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from it3_lightning.engine.layers import Gradient, Rules, rules_for
from it3_lightning.engine.weights import Site

Take = Callable[[str, Gradient], None]
"""Takes the gradient of a weight by its name: ``(B, *shape)``, or the factors of it."""


class NotLayerwiseError(Exception):
    """The network does something with a layer that the rules do not know of."""


@dataclass
class Layer:
    """A layer, and the names of its adapting weights.

    Args:
        module: itself.
        rules: for the gradients of its weights.
        names: of these in the network, by their names in the layer.
        called: whether it has been, in the pass that is watched.
    """

    module: nn.Module
    rules: Rules
    names: dict[str, str] = field(default_factory=dict)
    called: bool = False

    def back(self, features: Tensor, version: int, gradient: Tensor, take: Take) -> None:
        """Hand out the gradients of the weights, once what came back is known."""
        if features._version != version:
            raise NotLayerwiseError("the inputs of a layer were written into")
        for key, name in self.names.items():
            rule: Any = getattr(self.rules, key)
            take(name, rule(self.module, features, gradient))


def layers_of(sites: Sequence[Site]) -> dict[int, Layer]:
    """Return the layers that have the adapting weights, by their ``id``, with the rules of now.

    Raises:
        NotLayerwiseError: one has no rules, or shares a weight with another.
    """
    if len({name for *_, name in sites}) < len(sites):
        raise NotLayerwiseError("a weight that several layers share")
    layers: dict[int, Layer] = {}
    for owner, key, name in sites:
        rules = rules_for(owner)
        if rules is None or not hasattr(rules, key):
            raise NotLayerwiseError(f"no rule for {key} of {type(owner).__name__}")
        layers.setdefault(id(owner), Layer(owner, rules)).names[key] = name
    return layers


@contextmanager
def elsewhere(layers: Mapping[int, Layer]) -> Iterator[None]:
    """Let the layers' parameters need gradients within, except while their layer is called."""

    def need(module: nn.Module, needed: bool) -> None:
        if id(module) in layers:
            for key in layers[id(module)].names:
                module._parameters[key].requires_grad_(needed)  # type: ignore[union-attr]

    with ExitStack() as stack:
        for layer in layers.values():
            need(layer.module, True)
            stack.callback(need, layer.module, False)
        begun = register_module_forward_pre_hook(lambda module, _: need(module, False))
        stack.callback(begun.remove)
        ended = register_module_forward_hook(lambda module, *_: need(module, True))
        stack.callback(ended.remove)
        yield


@contextmanager
def watched(layers: Mapping[int, Layer], size: int, root: Tensor, take: Take) -> Iterator[None]:
    """Let the pass within have a graph that hands out gradients when it is gone back through.

    Args:
        layers: by ``id``.
        size: number of samples.
        root: a zero that needs gradients, where the graph starts.
        take: takes the gradients.
    """

    def called(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        layer = layers.get(id(module))
        if layer is None:
            return None
        features = inputs[0] if len(inputs) == 1 else None
        if layer.called or not isinstance(features, Tensor) or len(features) != size:
            raise NotLayerwiseError(f"{type(module).__name__} is not called once, with a batch")
        layer.called = True
        started: Tensor = output if output.requires_grad else output + root
        kept = features.detach()
        version = kept._version
        started.register_hook(lambda gradient: layer.back(kept, version, gradient, take))  # type: ignore[no-untyped-call]
        return started

    handle = register_module_forward_hook(called)
    try:
        yield
    finally:
        handle.remove()
