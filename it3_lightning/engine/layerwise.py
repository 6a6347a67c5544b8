"""The first gradients of many samples, by passes that they share: all start from the same weights.

Only activations are differentiated together. The gradients of the weights are found layer by
layer, for each sample, on the way back; a large one is used up as soon as it is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_map

from it3_lightning.engine.layers import Gradient
from it3_lightning.engine.outcome import Forward, ToLabel
from it3_lightning.engine.products import Product
from it3_lightning.engine.record import Record
from it3_lightning.engine.samples import batch_size
from it3_lightning.engine.seen import Seen
from it3_lightning.engine.watched import NotLayerwiseError, Take, elsewhere, layers_of, watched
from it3_lightning.engine.weights import sites_of
from it3_lightning.objectives import TestTimeObjective

_CLOSE = 1e-3  # of the largest element of a gradient: rounding is far less, an error far more
_NOTHING = 1e-6  # of the largest element of all gradients


class Layerwise:
    """Finds the gradients of each sample's loss by the weights, all of them the source's.

    Args:
        module: whose weights; none of them may need gradients.
        selected: the adapting parameters by name.
        run: ``(inputs, prior) -> outputs (B, ...)``.
        to_label: brings outputs into label space.
        objective: is evaluated on every sample alone.
        record: of what need not be computed twice.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        run: Forward,
        to_label: ToLabel,
        objective: TestTimeObjective,
        record: Record,
    ) -> None:
        self._sites = sites_of(module, selected)
        self._selected = selected
        self._run = run
        self._to_label = to_label
        self._objective = objective
        self._record = record
        self._asks = True  # whether the objective asks for the second pass

    def __call__(self, inputs: Any, take: Take) -> Seen:
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
        parameters = list(self._selected.values())
        with torch.enable_grad(), elsewhere(layers_of(self._sites)):
            outputs = self._run(inputs, None)
            if not outputs.requires_grad:
                return False
            found = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)
        return any(gradient is not None for gradient in found)

    def _losses(self, inputs: Any, size: int, root: Tensor, take: Take) -> tuple[Tensor, Seen]:
        """Return the samples' losses ``(B,)`` with the graph of activations."""
        layers = layers_of(self._sites)
        with self._record.first_pass(inputs), watched(layers, size, root, take):
            outputs = self._run(inputs, None)
        y0 = self._to_label(outputs)
        y1 = None
        if self._asks:
            with self._record.second_pass(same=True):
                y1 = self._to_label(self._run(inputs, y0))
        losses, others = vmap(self._alone, in_dims=(0, None if y1 is None else 0))(y0, y1)
        return losses, Seen(*(value.detach() for value in (outputs, *others, losses)))

    def _alone(self, y0: Tensor, y1: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return one sample's loss, and its measure, reliability, and whether it moves."""
        alone, asked = y0[None], []

        def second(prior: Tensor) -> Tensor:
            if prior is not alone or y1 is None:
                raise NotLayerwiseError("the objective asks for another second pass")
            asked.append(prior)
            return y1[None]

        objective = self._objective(alone, second)
        self._asks = bool(asked)
        seen = objective.measure[0], objective.reliable[0], objective.moves[0]
        return objective.loss(), seen


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _largest(values: Tensor) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0
