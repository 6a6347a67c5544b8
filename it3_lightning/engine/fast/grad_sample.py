r"""Per-sample gradients: one rule for each type of layer, from activations and backprops.

The gradients of dense layers and convolutions are products of two thin matrices,
:math:`\nabla_{W_i} = D_i A_i`, with :math:`D_i` what came back and :math:`A_i` what went in, so
that they need not exist as a whole (Goodfellow 2015, arXiv 1510.01799, for dense layers).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from it3_lightning.engine.optimizers import HALF
from it3_lightning.engine.passes import FunctionalPasses, Network, Site, sites_of
from it3_lightning.engine.trees import batch_size
from it3_lightning.engine.types import SOURCE, SampleEvaluations
from it3_lightning.methods.base import TestTimeMethod

_PIECE = 1 << 16  # elements that are multiplied out at once, so that they stay in the cache


_COLUMNS = 1 << 16  # elements of a right factor that all samples may have at once


@dataclass(frozen=True)
class Product:
    """The products of two factors, ``(B, O, L)`` and ``(B, L, K)``, one for each sample.

    Args:
        left: ``(B, O, L)``.
        inputs: ``(B, ...)``, whose elements the other factor is made of.
        right: returns the other factor, of some of the inputs.

    >>> product = Product(torch.tensor([[[1.0], [2.0]]]), torch.ones(1, 3), lambda x: x[:, None])
    >>> product.whole((2, 3)), product.bound()
    (tensor([[[1., 1., 1.],
             [2., 2., 2.]]]), tensor([2.]))
    """

    left: Tensor
    inputs: Tensor
    right: Callable[[Tensor], Tensor]

    def bound(self) -> Tensor:
        """Return ``(B,)``, what no element of a sample's product is larger than in size."""
        both = (each.flatten(1).abs().amax(1) for each in (self.left, self.inputs))
        return self.left.shape[-1] * next(both) * next(both)

    @property
    def single(self) -> bool:
        """Whether it is of one position, so that no element is a sum."""
        return self.left.shape[-1] == 1

    def squares(self) -> Tensor:
        """Return ``(B,)``, the squared norms of the products of one position."""
        left, right = self.left.flatten(1), self.right(self.inputs).flatten(1)
        return squared_norms(left) * squared_norms(right)

    def add_to(self, source: Tensor, scale: Tensor, out: Tensor) -> None:
        """Write ``source + scale * product`` into ``out``, of one position, ``scale (B,)``."""
        left = self.left * scale.to(self.left)[:, None, None]
        torch.addcmul(source.flatten(1), left, self.right(self.inputs), out=out.flatten(2))

    def whole(self, shape: tuple[int, ...]) -> Tensor:
        """Return all products ``(B, *shape)``."""
        first = self.right(self.inputs[:1])
        if first.numel() <= _COLUMNS:
            return torch.bmm(self.left, self.right(self.inputs)).view(-1, *shape)
        out = self.left.new_empty(len(self.left), self.left.shape[1], first.shape[-1])
        for row, left in enumerate(self.left):
            torch.mm(left, self.right(self.inputs[row : row + 1])[0], out=out[row])
        return out.view(-1, *shape)

    def pieces(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield sample, rows of its product and these rows, ``(O', K)``, sample by sample."""
        for row, left in enumerate(self.left):
            right = self.right(self.inputs[row : row + 1])[0]
            pieces = -(-len(left) * right.shape[-1] // _PIECE)
            rows = -(-len(left) // pieces)
            for start in range(0, len(left), rows):
                part = slice(start, start + rows)
                yield row, part, torch.mm(left[part], right)


def squared_norms(values: Tensor) -> Tensor:
    """Return ``(B,)``, of values ``(B, ...)``, in full precision.

    >>> squared_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([25.,  4.])
    """
    dtype = torch.float32 if values.dtype in HALF else None
    norms: Tensor = torch.linalg.vector_norm(values.flatten(1), dim=1, dtype=dtype)
    return norms.square()


Gradient = Tensor | Product


Rule = Callable[[Any, Tensor, Tensor], Gradient]
"""``(layer, inputs (B, ...), came back (B, ...))`` to the gradient, ``(B, *shape)``."""


@dataclass(frozen=True)
class Rules:
    """How to find the gradients of a layer's two parameters."""

    weight: Rule
    bias: Rule


def rules_for(layer: nn.Module) -> Rules | None:
    """Return the rules of a layer; ``None`` where none are known.

    Subclasses may do otherwise than their parents, so only the types themselves have rules.

    >>> rules_for(nn.LSTM(1, 1)) is None
    True
    """
    if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
        return None  # mixes samples
    if isinstance(layer, nn.Conv2d) and not _plain(layer):
        return None
    return _RULES.get(type(layer))


def _plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"


def _dense(layer: nn.Linear, inputs: Tensor, back: Tensor) -> Product:
    del layer
    return Product(_positions(back).mT, inputs, _positions)


def _dense_bias(layer: nn.Linear, inputs: Tensor, back: Tensor) -> Tensor:
    del layer, inputs
    return _positions(back).sum(1)


def _positions(features: Tensor) -> Tensor:
    """Return ``(B, L, C)`` of features ``(B, ..., C)``."""
    return features[:, None] if features.ndim == 2 else features.flatten(1, -2)


def _convolution(layer: nn.Conv2d, inputs: Tensor, back: Tensor) -> Product:
    def unfolded(part: Tensor) -> Tensor:
        padding = 0 if isinstance(layer.padding, str) else layer.padding
        return F.unfold(part, layer.kernel_size, layer.dilation, padding, layer.stride).mT

    return Product(back.flatten(2), inputs, unfolded)


def _channels(layer: nn.Module, inputs: Tensor, back: Tensor) -> Tensor:
    """Return what came back, summed over positions: ``(B, C, ...) -> (B, C)``."""
    del layer, inputs
    return back.flatten(2).sum(2) if back.ndim > 2 else back


def _batch_norm(layer: _BatchNorm, inputs: Tensor, back: Tensor) -> Tensor:
    plain = F.batch_norm(inputs, layer.running_mean, layer.running_var, eps=layer.eps)
    return _channels(layer, inputs, plain.mul_(back))


def _group_norm(layer: nn.GroupNorm, inputs: Tensor, back: Tensor) -> Tensor:
    plain = F.group_norm(inputs, layer.num_groups, eps=layer.eps)
    return _channels(layer, inputs, plain.mul_(back))


def _layer_norm(layer: nn.LayerNorm, inputs: Tensor, back: Tensor) -> Tensor:
    shape = list(layer.normalized_shape)
    return _layer_norm_bias(layer, inputs, F.layer_norm(inputs, shape, eps=layer.eps).mul_(back))


def _layer_norm_bias(layer: nn.LayerNorm, inputs: Tensor, back: Tensor) -> Tensor:
    del inputs
    others = range(1, back.ndim - len(layer.normalized_shape))
    return back.sum(tuple(others)) if others else back


_RULES: dict[type[nn.Module], Rules] = {
    nn.Linear: Rules(_dense, _dense_bias),
    nn.Conv2d: Rules(_convolution, _channels),
    nn.BatchNorm1d: Rules(_batch_norm, _channels),
    nn.BatchNorm2d: Rules(_batch_norm, _channels),
    nn.BatchNorm3d: Rules(_batch_norm, _channels),
    nn.GroupNorm: Rules(_group_norm, _channels),
    nn.LayerNorm: Rules(_layer_norm, _layer_norm_bias),
}


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
            own = layer.module
            need(own, True)
            stack.callback(need, own, False)
            stack.callback(own.register_forward_pre_hook(lambda m, _: need(m, False)).remove)
            stack.callback(own.register_forward_hook(lambda m, *_: need(m, True)).remove)
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
        layer = layers[id(module)]
        features = inputs[0] if len(inputs) == 1 else None
        if layer.called or not isinstance(features, Tensor) or len(features) != size:
            raise NotLayerwiseError(f"{type(module).__name__} is not called once, with a batch")
        layer.called = True
        started: Tensor = output if output.requires_grad else output + root
        kept = features.detach()
        version = kept._version
        started.register_hook(lambda gradient: layer.back(kept, version, gradient, take))  # type: ignore[no-untyped-call]
        return started

    with ExitStack() as stack:
        for layer in layers.values():
            hook = layer.module.register_forward_hook(called, prepend=True)  # before the prior
            stack.callback(hook.remove)
        yield


_CLOSE = 1e-3  # of the largest element of a gradient: rounding is far less, an error far more


_NOTHING = 1e-6  # of the largest element of all gradients


class Layerwise:
    """Finds the gradients of each sample's loss by the weights, all of them the source's.

    Args:
        module: whose weights; none of them may need gradients.
        selected: the adapting parameters by name.
        network: runs the passes.
        method: is evaluated on every sample alone.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        network: Network,
        method: TestTimeMethod,
    ) -> None:
        self._sites = sites_of(module, selected)
        self._selected = selected
        self._network = network
        self._method = method
        self._asks = True  # whether the objective asks for the second pass

    def __call__(self, inputs: Any, take: Take) -> SampleEvaluations:
        """Hand every gradient to ``take``, and say what the passes have shown.

        Raises:
            NotLayerwiseError: a layer has no rules, or is not used as they expect.
        """
        size, given = batch_size(inputs), set[str]()
        inputs = tree_map(_detached, inputs)  # what starts the graph is the root alone

        def noted(name: str, gradient: Gradient) -> None:
            given.add(name)
            take(name, gradient)

        with torch.enable_grad():
            root = torch.zeros((), requires_grad=True)
            losses, seen = self._losses(inputs, size, root, noted)
            if losses.requires_grad:
                torch.autograd.grad(losses.sum(), root)
        for name, parameter in self._selected.items():
            if name not in given:  # no influence on these samples
                take(name, parameter.new_zeros(size, *parameter.shape))
        return seen

    def agrees(self, inputs: Any, expected: Mapping[str, Tensor]) -> bool:
        """Whether it finds these gradients ``(B, *shape)`` of these inputs."""
        found: dict[str, Tensor] = {}

        def take(name: str, gradient: Gradient) -> None:
            if isinstance(gradient, Product):
                gradient = gradient.whole(expected[name].shape[1:])
            found[name] = gradient

        try:
            if self._used_elsewhere(inputs):
                return False
            self(inputs, take)
        except Exception:  # whatever it is, torch.func is asked next
            return False
        sizes = {name: _largest(gradient) for name, gradient in expected.items()}
        nothing = _NOTHING * max(sizes.values())
        return nothing > 0 and all(
            _largest(found[name] - expected[name]) <= max(_CLOSE * size, nothing)
            for name, size in sizes.items()
        )

    def _used_elsewhere(self, inputs: Any) -> bool:
        """Whether weights are used by other ways than the calls of their layers.

        The gradients of some samples need not show that, as where others are masked.
        """
        with torch.enable_grad(), elsewhere(layers_of(self._sites)):
            return self._network.run(inputs, None).requires_grad

    def _losses(
        self, inputs: Any, size: int, root: Tensor, take: Take
    ) -> tuple[Tensor, SampleEvaluations]:
        """Return the samples' losses ``(B,)`` with the graph of activations."""
        layers = layers_of(self._sites)
        with watched(layers, size, root, take):
            outputs = self._network.first(inputs, SOURCE)
        y0 = self._network.to_label(outputs)
        y1, valid = None, None
        if self._asks:
            y1 = self._network.second(inputs, y0, None, SOURCE)
        if self._network.valid_in is not None:
            valid = self._network.valid(inputs, y0)
        dims = [None if each is None else 0 for each in (y0, y1, valid)]
        losses, others = vmap(self._alone, in_dims=(*dims,))(y0, y1, valid)
        return losses, SampleEvaluations(*(value.detach() for value in (outputs, *others, losses)))

    def _alone(
        self, y0: Tensor, y1: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return one sample's loss, and its measure, reliability, and whether it moves."""
        alone, asked = y0[None], []

        def second(prior: Tensor) -> Tensor:
            if prior is not alone or y1 is None:
                raise NotLayerwiseError("the objective asks for another second pass")
            asked.append(prior)
            return y1[None]

        mask = None if valid is None else valid[None]
        objective = self._method.loss(FunctionalPasses(alone, alone, second, mask))
        self._asks = bool(asked)
        seen = objective.measure[0], objective.reliable[0], objective.moves[0]
        return objective.loss(), seen


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _largest(values: Tensor) -> float:
    return float(values.detach().abs().amax()) if values.numel() else 0.0
