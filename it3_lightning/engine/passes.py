"""Forward passes of a network: first, second and other ones, counted, on weights of any version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.engine import fast
from it3_lightning.engine.restore import Sites, all_finite
from it3_lightning.engine.trees import copied
from it3_lightning.engine.types import (
    Answer,
    Enters,
    Forward,
    InputsIn,
    Plain,
    Skip,
    ToLabel,
    Weights,
    as_given,
)
from it3_lightning.methods.base import Passes, SecondPass


class Network:
    """Runs the forward passes that an adaptation needs, and counts them.

    Args:
        module: whose weights are in place in the first pass.
        selected: the adapting parameters by name, which the anchor replaces.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space.
        enters: the layers at whose input or output the prior enters.
        layers: names of those whose features are asked for.
        inputs_in: finds the network's inputs in what is given to a pass.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        forward: Forward,
        to_label: ToLabel,
        enters: Enters,
        layers: Sequence[str] = (),
        inputs_in: InputsIn = as_given,
    ) -> None:
        self._module = module
        self._sites = Sites(module, selected)
        self._forward = forward
        self.inputs_in = inputs_in
        self.to_label = to_label
        self.cache = fast.cache_of(module, enters)
        self._layers = {name: module.get_submodule(name) for name in layers}
        self.features: dict[str, Any] = {}
        self.restart()

    def restart(self) -> None:
        """Begin with a new batch."""
        self.forwards = self.cache.hits = 0
        self.cache.clear()

    def run(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass, on inputs that it may write into, and count it.

        Raises:
            TypeError: it returned something else than a tensor.
        """
        self.forwards += 1
        outputs = self._forward(copied(inputs), prior)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Expected the forward pass to return a tensor (B, ...), got "
                f"{type(outputs).__name__}. Override it3_forward to return the predictions alone."
            )
        return outputs

    def first(self, inputs: Any, version: int) -> Tensor:
        """Return ``f(x, 0)``, by the weights in place, which are of this version."""
        with ExitStack() as stack:
            stack.enter_context(self.cache.first_pass(inputs, version))
            for name, layer in self._layers.items():
                keep = self._keep(name)
                stack.callback(layer.register_forward_hook(keep).remove)
            return self.run(inputs, None)

    def second(
        self, inputs: Any, prior: Tensor, weights: Weights | None, version: int | None
    ) -> Tensor:
        """Return ``F(x, prior)`` in label space; ``weights=None``: by those in place."""
        with ExitStack() as stack:
            if weights is not None:
                stack.enter_context(self._sites.swapped(weights))
            stack.enter_context(self.cache.second_pass(inputs, version))
            return self.to_label(self.run(inputs, prior))

    @torch.no_grad()
    def answer(self, inputs: Any, answer: Answer, version: int) -> tuple[Tensor, Any]:
        """Run an answer with the weights in place, which are of this version."""
        self.forwards += 1
        with ExitStack() as stack:
            if isinstance(answer, Plain):
                stack.enter_context(self.cache.first_pass(inputs, version))
            outputs, answers = answer(copied(inputs))
        return outputs.detach(), answers

    def _keep(self, name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            self.features[name] = output

        return hook


class AnchoredWeights:
    """Weights in place, and those of the anchor: what two passes run on.

    Attributes:
        version: of the weights in place.
        anchor: weights of the second pass; ``None``: those in place.
        anchor_version: of these; ``None``: of no version that passes could share.
    """

    version: int
    anchor: Weights | None
    anchor_version: int | None


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
        self.inputs = network.inputs_in(inputs)
        self.outputs = network.first(inputs, weights.version) if outputs is None else outputs
        if not all_finite(self.outputs):
            raise Skip("non-finite output")
        self.y0 = network.to_label(self.outputs)

    def second(self, prior: Tensor) -> Tensor:
        """Run the anchor: the loss moves what feeds it, ``y0``, and none of its weights."""
        weights = self._weights
        return self._network.second(self._given, prior, weights.anchor, weights.anchor_version)

    def other(self, inputs: Any) -> Tensor:
        """Run the neutral pass on other inputs, as augmented views."""
        return self._network.to_label(self._network.run(inputs, None))

    def features(self, layer: str) -> Any:
        """Return what a layer put out in the first pass."""
        return self._network.features[layer]

    def again(self) -> NetworkPasses:
        """Run the first pass once more, with the weights as they are now."""
        return NetworkPasses(self._network, self._given, self._weights)


class FunctionalPasses(Passes):
    """Passes of a method that asks for ``y0`` and the second prediction only.

    Args:
        outputs: of the first pass.
        y0: the same in label space.
        second: runs the anchor.
    """

    def __init__(self, outputs: Tensor, y0: Tensor, second: SecondPass) -> None:
        self.outputs, self.y0, self._second = outputs, y0, second

    def second(self, prior: Tensor) -> Tensor:
        """Run the anchor."""
        return self._second(prior)

    def other(self, inputs: Any) -> Tensor:
        """Refuse: other passes go one sample after the other."""
        raise NotImplementedError("a method whose vmappable is False asks for other passes")

    def features(self, layer: str) -> Any:
        """Refuse: features are those of ordinary passes."""
        raise NotImplementedError("a method whose vmappable is False asks for features")

    def again(self) -> Passes:
        """Refuse: there is one pass for each step."""
        raise NotImplementedError("a method whose vmappable is False asks for further passes")
