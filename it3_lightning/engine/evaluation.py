"""The objective and its gradients: the first pass, and the anchor's pass on other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from it3_lightning.engine.weights import Sites
from it3_lightning.graphs import graph_count
from it3_lightning.objectives import Objective, TestTimeObjective

Forward = Callable[[Any, Tensor | None], Tensor]
ToLabel = Callable[[Tensor], Tensor]


class Skip(Exception):  # noqa: N818  # no error: the batch keeps its source prediction
    """The batch cannot be adapted to; the message says why."""


@dataclass(frozen=True)
class Evaluation:
    """Outputs ``(B, ...)`` of the first pass, and what the objective makes of them."""

    outputs: Tensor
    objective: Objective

    def detached(self) -> Evaluation:
        """Return the same without the graph."""
        measure = self.objective.measure.detach()
        objective = replace(self.objective, measure=measure, batch_term=None, sample_term=None)
        return Evaluation(self.outputs.detach(), objective)


class Evaluator:
    """Evaluates an objective and its gradients on a module, and counts the passes.

    Args:
        module: whose weights are in place in the first pass.
        selected: the adapting parameters by name, which the anchor replaces.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space.
        objective: what is evaluated.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        forward: Forward,
        to_label: ToLabel,
        objective: TestTimeObjective,
    ) -> None:
        self._sites = Sites(module, selected)
        self._selected = selected
        self._forward = forward
        self._to_label = to_label
        self._objective = objective
        self.forwards = self.backwards = 0

    def __call__(self, inputs: Any, anchor: Mapping[str, Tensor] | None) -> Evaluation:
        """Evaluate, ready for a backward pass; the anchor ``None`` is the weights in place.

        Raises:
            Skip: an output is not finite.
        """
        outputs = self.run(inputs, None)
        if not bool(outputs.isfinite().all()):
            raise Skip("non-finite output")
        second = partial(self._second, inputs, anchor)
        return Evaluation(outputs, self._objective(self._to_label(outputs), second))

    @torch.no_grad()
    def measured(self, inputs: Any, anchor: Mapping[str, Tensor] | None) -> Evaluation:
        """Evaluate without a graph."""
        return self(inputs, anchor)

    def gradients(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Return the loss's gradients by the selected parameters, ``None`` where it has none.

        Raises:
            Skip: the loss is not finite.
            ValueError: there are no gradients at all.
        """
        if not bool(loss.isfinite()):
            raise Skip("non-finite loss")
        gradients: tuple[Tensor | None, ...] = ()
        if loss.requires_grad:
            parameters = list(self._selected.values())
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            self.backwards += 1
        if all(gradient is None for gradient in gradients):
            raise ValueError(
                "None of the selected parameters influences the neutral prediction: "
                f"{', '.join(list(self._selected)[:5])}. Select parameters of the network itself, "
                "and let the forward pass keep its graph (no detach, no torch.no_grad)."
            )
        return gradients

    def run(self, inputs: Any, prior: Tensor | None) -> Tensor:
        """Run one forward pass and count it.

        Raises:
            TypeError: it returned something else than a tensor.
        """
        self.forwards += 1
        outputs = self._forward(inputs, prior)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"Expected the forward pass to return a tensor (B, ...), got "
                f"{type(outputs).__name__}. Override it3_forward to return the predictions alone."
            )
        return outputs

    def _second(self, inputs: Any, anchor: Mapping[str, Tensor] | None, y0: Tensor) -> Tensor:
        """Run the anchor: the loss moves what feeds it, ``y0``, and none of its weights."""
        if anchor is None:
            return self._to_label(self.run(inputs, y0))
        with self._sites.swapped(anchor):
            return self._to_label(self.run(inputs, y0))


def batch_size(inputs: Any) -> int:
    """Return the size of dimension 0 of the first tensor in the inputs, or the number of graphs.

    Raises:
        ValueError: there is no tensor with a dimension in them, and no batch of graphs.

    >>> batch_size({"image": torch.zeros(4, 3)})
    4
    """
    for leaf in tree_leaves(inputs):
        size = leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else graph_count(leaf)
        if isinstance(size, int):
            return size
    raise ValueError(
        f"Expected inputs with a tensor (B, ...) in them, got {type(inputs).__name__}."
    )
