"""Forward passes of a network: first, second and other ones, counted, on weights of any version."""

from __future__ import annotations

import cmath
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from it3_lightning.engine import fast
from it3_lightning.engine.restore import generators_drawn_by
from it3_lightning.engine.selection import layers_of
from it3_lightning.engine.trees import Along, Shared, opened
from it3_lightning.engine.types import (
    Answer,
    Enters,
    Forward,
    InputsIn,
    Plain,
    Skip,
    ToLabel,
    ValidIn,
    Weights,
)
from it3_lightning.methods.base import Layers, Passes, SecondPass

_Result = TypeVar("_Result")

Features = dict[str, tuple[Any, Any]]
"""What entered layers, and what they put out, by name."""


class Network:
    """Runs the forward passes that an adaptation needs, and counts them.

    Args:
        module: whose weights are in place in the first pass.
        selected: the adapting parameters by name, which the anchor replaces.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space.
        enters: the layers at whose input or output the prior enters.
        layers: those whose features are asked for.
        inputs_in: finds the network's inputs in what is given to a pass.
        valid_in: says which positions of a prediction count, from what is given to a pass.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        forward: Forward,
        to_label: ToLabel,
        enters: Enters,
        layers: Layers = (),
        inputs_in: InputsIn | None = None,
        valid_in: ValidIn | None = None,
    ) -> None:
        self.module = module
        self.selected = selected
        self._sites = Sites(module, selected)
        self._forward = forward
        self.inputs_in, self.valid_in = inputs_in, valid_in
        self.to_label = to_label
        self.cache = fast.cache_of(module, enters)
        self.layers = layers_of(module, layers) if layers else {}
        self.features: Features = {}
        self.forwards = 0
        self._draws: dict[tuple[bool, ...], frozenset[str] | None] = {}  # by the layers' modes

    def restart(self) -> None:
        """Begin with a new batch."""
        self.forwards = self.cache.hits = 0
        self.cache.clear()

    def run(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass, on inputs that it may write into, and count it.

        Raises:
            TypeError: it returned something else than a tensor.
        """
        outputs = self._begun(inputs, prior)()
        if not isinstance(outputs, Tensor):
            raise _no_tensor(outputs)
        return outputs

    def _begun(self, inputs: Any, prior: Tensor | None) -> Callable[[], Any]:
        """Count a forward pass, and return what runs it."""
        self.forwards += 1
        return partial(self._forward, copied(inputs), prior)

    def first(self, inputs: Any, version: int) -> Tensor:
        """Return ``f(x, 0)``, by the weights in place, which are of this version."""
        self.features = {}
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                keep = self._keep(name)
                stack.callback(layer.register_forward_hook(keep).remove)
            outputs = self.cache.first(inputs, version, self._begun(inputs, None))
        if not isinstance(outputs, Tensor):
            raise _no_tensor(outputs)
        return outputs

    def second(
        self, inputs: Any, prior: Tensor, weights: Weights | None, version: int | None
    ) -> Tensor:
        """Return ``F(x, prior)`` in label space; ``weights=None``: by those in place."""
        run = partial(self.cache.second, inputs, version, self._begun(inputs, prior))
        outputs = run() if weights is None else self._sites.run_with(weights, run)
        if not isinstance(outputs, Tensor):
            raise _no_tensor(outputs)
        return self.to_label(outputs)

    def other(self, inputs: Any, weights: Weights | None = None) -> Tensor:
        """Return a neutral pass over other inputs in label space, by those in place or these."""
        run = partial(self.run, inputs, None)
        return self.to_label(run() if weights is None else self._sites.run_with(weights, run))

    def valid(self, inputs: Any, y0: Tensor) -> Tensor | None:
        """Return which positions of a prediction ``(B, C, ...)`` count; ``None``: all."""
        return None if self.valid_in is None else self.valid_in(copied(inputs), y0)

    def features_of(self, layer: str, inputs: Any) -> Any:
        """Return what a layer puts out in a neutral pass over other inputs."""
        return features_of(self.module, layer, lambda: self.run(inputs, None))

    @torch.no_grad()
    def answer(self, inputs: Any, answer: Answer, version: int) -> tuple[Tensor, Any]:
        """Run an answer with the weights in place, which are of this version."""
        self.forwards += 1
        run = partial(answer, copied(inputs))
        plain = isinstance(answer, Plain)
        outputs, answers = self.cache.first(inputs, version, run) if plain else run()
        return outputs.detach(), answers

    def draws(self, run: Callable[[], object]) -> frozenset[str] | None:
        """Return the random generators that passes draw from; ``None``: it cannot be told.

        Args:
            run: runs the passes, and makes what they need, as views of inputs.
        """
        layers = list(self.module.modules())
        modes = tuple(layer.training for layer in layers)
        if modes not in self._draws:
            compiled = any(hasattr(layer, "_orig_mod") for layer in layers)
            self.restart()
            try:
                self._draws[modes] = None if compiled else generators_drawn_by(run)
            except Exception:  # the pass itself raises what is wrong
                return None
            finally:
                self.restart()
        return self._draws[modes]

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            entered = args[0] if args else None
            self.features[name] = copied(entered), copied(output)  # what comes after may write

        return hook


class AnchoredWeights:
    """Weights in place, and those of the anchor: what two passes run on.

    Attributes:
        version: of the weights in place.
        anchor: weights of the second pass; ``None``: those in place.
        anchor_version: of these; ``None``: of no version that passes could share.
        source: weights that training left; ``None``: those in place.
    """

    version: int
    anchor: Weights | None
    anchor_version: int | None
    source: Weights | None = None


class NetworkPasses(Passes):
    """The passes of a network over one batch.

    Args:
        network: runs them.
        inputs: of the network.
        weights: that they run on.
        outputs: of the first pass, where they are known.

    Raises:
        Skip: an output is not finite.
    """

    def __init__(
        self, network: Network, inputs: Any, weights: AnchoredWeights, outputs: Tensor | None = None
    ) -> None:
        self._network = network
        self._weights = weights
        self._given = inputs
        self._features: Features | None = None
        self.outputs = self._first() if outputs is None else outputs
        if not len(self.outputs):
            raise Skip  # no sample: nothing to adapt to, and nothing amiss
        if not all_finite(self.outputs):
            raise Skip("non-finite output")
        self.y0 = network.to_label(self.outputs)
        if network.valid_in is not None:
            self.valid = network.valid(inputs, self.y0)

    def _first(self) -> Tensor:
        outputs = self._network.first(self._given, self._weights.version)
        self._features = self._network.features
        return outputs

    @property
    def inputs(self) -> Any:
        """A copy of the network's inputs."""
        find = self._network.inputs_in
        return copied(self._given if find is None else find(self._given))

    def second(self, prior: Tensor) -> Tensor:
        """Run the anchor: the loss moves what feeds it, ``y0``, and none of its weights."""
        weights = self._weights
        return self._network.second(self._given, prior, weights.anchor, weights.anchor_version)

    def other(self, inputs: Any) -> Tensor:
        """Run the neutral pass on other inputs, as augmented views."""
        return self._network.other(inputs)

    @torch.no_grad()
    def anchor(self, inputs: Any) -> Tensor:
        """Run the neutral pass of the anchor on any inputs."""
        return self._network.other(inputs, self._weights.anchor)

    @torch.no_grad()
    def unadapted(self, inputs: Any) -> Tensor:
        """Run the neutral pass of the source on any inputs."""
        return self._network.other(inputs, self._weights.source)

    @property
    def weights(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """The adapting parameters."""
        return self._network.selected

    @property
    def source(self) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Their values as training left them."""
        known = self._weights.source
        return {n: p.detach() for n, p in self.weights.items()} if known is None else known

    @property
    def layers(self) -> Mapping[str, nn.Module]:  # type: ignore[override]
        """The layers that the method asks for."""
        return self._network.layers

    def features(self, layer: str, *, entering: bool = False) -> Any:
        """Return what a layer put out in the first pass, or what entered it.

        Raises:
            RuntimeError: it did not run by itself.
        """
        if self._features is None:  # the outputs were known without a pass
            self._first()
        assert self._features is not None
        if layer not in self._features:
            raise _never_ran(layer)
        return self._features[layer][0 if entering else 1]

    def features_of(self, layer: str, inputs: Any) -> Any:
        """Return what a layer puts out in a neutral pass over other inputs.

        Raises:
            RuntimeError: it did not run by itself.
        """
        return self._network.features_of(layer, inputs)

    def submodule(self, name: str) -> nn.Module:
        """Return a part of the module."""
        return self._network.module.get_submodule(name)

    def again(self) -> NetworkPasses:
        """Run the first pass once more, with the weights as they are now."""
        return NetworkPasses(self._network, self._given, self._weights)


class FunctionalPasses(Passes):
    """Passes of a method that asks for ``y0`` and the second prediction only.

    Args:
        outputs: of the first pass.
        y0: the same in label space.
        second: runs the anchor.
        valid: positions of ``y0`` that count; ``None``: all.
    """

    def __init__(
        self, outputs: Tensor, y0: Tensor, second: SecondPass, valid: Tensor | None = None
    ) -> None:
        self.outputs, self.y0, self._second, self.valid = outputs, y0, second, valid

    def second(self, prior: Tensor) -> Tensor:
        """Run the anchor."""
        return self._second(prior)

    def __getattr__(self, name: str) -> Any:
        raise NotImplementedError(
            f"a method whose vmappable is True asks for y0 and second(prior) alone, not for {name}"
        )

    def other(self, inputs: Any) -> Tensor:
        """Refuse: other passes go one sample after the other."""
        return self.__getattr__("other")  # type: ignore[no-any-return]

    def anchor(self, inputs: Any) -> Tensor:
        """Refuse, as above."""
        return self.__getattr__("anchor")  # type: ignore[no-any-return]

    def unadapted(self, inputs: Any) -> Tensor:
        """Refuse, as above."""
        return self.__getattr__("unadapted")  # type: ignore[no-any-return]

    def features_of(self, layer: str, inputs: Any) -> Any:
        """Refuse: features are those of ordinary passes."""
        return self.__getattr__("features_of")

    def features(self, layer: str, *, entering: bool = False) -> Any:
        """Refuse: features are those of ordinary passes."""
        return self.__getattr__("features")

    def submodule(self, name: str) -> nn.Module:
        """Refuse: its weights would not be those of the pass."""
        return self.__getattr__("submodule")  # type: ignore[no-any-return]

    def again(self) -> Passes:
        """Refuse: there is one pass for each step."""
        return self.__getattr__("again")  # type: ignore[no-any-return]


def features_of(module: nn.Module, layer: str, run: Callable[[], object]) -> Any:
    """Return what a layer of a module puts out while something runs, the last time.

    Raises:
        RuntimeError: it did not run by itself.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 1))
    >>> features_of(net, "0", lambda: net(torch.ones(1, 2, 2)))
    tensor([[1., 1., 1., 1.]])
    """
    found: dict[str, Any] = {}

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        found[layer] = output

    handle = module.get_submodule(layer).register_forward_hook(keep)
    try:
        run()
    finally:
        handle.remove()
    if not found:
        raise _never_ran(layer)
    return found[layer]


def _no_tensor(outputs: Any) -> TypeError:
    return TypeError(
        f"Expected the forward pass to return a tensor (B, ...), got {type(outputs).__name__}. "
        "Override it3_forward to return the predictions alone."
    )


def _never_ran(layer: str) -> RuntimeError:
    return RuntimeError(
        f"Expected the layer {layer!r} to run in the forward pass, and it did not, or in a part "
        "that torch.compile has made, which runs no hooks that come after it. Name a layer that "
        "runs by itself, or compile the network after that has been adapted."
    )


Site = tuple[nn.Module, str, str]
"""A module, what it calls a parameter, and the parameter's name in the network."""


def sites_of(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[Site]:
    """Return every place where given parameters are registered, tied ones included.

    >>> layer = nn.Linear(1, 1)
    >>> sites_of(nn.Sequential(layer), {"0.bias": layer.bias})
    [(Linear(in_features=1, out_features=1, bias=True), 'bias', '0.bias')]
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [
        (owner, key, names[id(parameter)])
        for owner in module.modules()
        for key, parameter in owner._parameters.items()
        if id(parameter) in names
    ]


class Sites:
    """Puts other tensors in every place where given parameters are registered.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> sites = Sites(layer, {"weight": layer.weight})
    >>> other = {"weight": layer.weight.detach() + 1}
    >>> sites.run_with(other, lambda: layer.weight.requires_grad), layer.weight.requires_grad
    (False, True)
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._sites = sites_of(module, parameters)

    def run_with(self, tensors: Mapping[str, Tensor], run: Callable[[], _Result]) -> _Result:
        """Run with these tensors in the parameters' places, which come back.

        Gradients stop at tensors that need none.
        """
        before = [owner._parameters[key] for owner, key, _ in self._sites]
        try:
            for owner, key, name in self._sites:
                owner._parameters[key] = tensors[name]  # type: ignore[assignment]
            return run()
        finally:
            for (owner, key, _), parameter in zip(self._sites, before, strict=True):
                owner._parameters[key] = parameter


def copied(inputs: Any) -> Any:
    """Return a copy as the network takes it, which it may write into without spoiling other passes.

    >>> x = torch.zeros(1)
    >>> copied([x])[0].add_(1), x
    (tensor([1.]), tensor([0.]))
    """
    if isinstance(inputs, Tensor):
        return inputs.clone()
    return tree_map(_copy, inputs, is_leaf=lambda value: isinstance(value, Along))


def _copy(leaf: Any) -> Any:
    if isinstance(leaf, Along):
        return leaf.given().clone()
    if isinstance(leaf, Shared):
        return leaf.tensor.clone()
    clone = getattr(leaf, "clone", None)
    if callable(clone) and not isinstance(leaf, type):
        return clone()
    opens = isinstance(leaf, MutableMapping) or is_dataclass(leaf)
    return opened(leaf, copied) if opens else leaf


def all_finite(values: Tensor) -> bool:
    """Whether all elements are finite: then so is their sum, unless it overflows.

    >>> import torch
    >>> all_finite(torch.full((2,), 3e38)), all_finite(torch.tensor([0.0, torch.nan]))
    (True, False)
    """
    total = values.detach().sum() if values.numel() != 1 else values
    return cmath.isfinite(total.item()) or bool(values.isfinite().all())
