"""The gradients of every sample's loss: by ``torch.func``, or layer by layer where that agrees."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad

from it3_lightning.engine.compiled import Compiled
from it3_lightning.engine.layers import Gradient
from it3_lightning.engine.layerwise import Layerwise
from it3_lightning.engine.mapped import Counted, mapped
from it3_lightning.engine.outcome import ToLabel
from it3_lightning.engine.products import Product
from it3_lightning.engine.record import Record
from it3_lightning.engine.samples import batch_size, taken
from it3_lightning.engine.seen import Seen
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.stacked import Stacked, Weights
from it3_lightning.engine.weights import Sites

_FEW = 4  # samples whose gradients are found both ways


class Gradients:
    """Finds the gradients of every sample's loss by its own weights.

    Args:
        module: whose weights; none of its parameters may need gradients.
        selected: the adapting parameters by name.
        run: the forward pass.
        to_label: brings outputs into label space.
        settings: how to adapt.
        record: of what need not be computed twice; has seen an ordinary pass.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        run: Counted,
        to_label: ToLabel,
        settings: Settings,
        record: Record,
    ) -> None:
        self._selected = selected
        self._sites = Sites(module, selected)
        self._run = run
        self._to_label = to_label
        self._objective = settings.objective
        self._record = record
        self._layerwise = Layerwise(module, selected, run, to_label, settings.objective, record)
        on_cpu = next(iter(selected.values())).device.type == "cpu"  # faster there, as measured
        self._may_share = on_cpu and not settings.compile and settings.anchor != "live"
        self._agreed = 0  # samples on which that is known to agree with torch.func
        self._compiled: dict[bool, Compiled] = {}
        if settings.compile:
            self._compiled = {r: Compiled(partial(self._step, r)) for r in (False, True)}
        self._unused: frozenset[str] | None = None if callable(settings.optimizer) else frozenset()
        self._passes: dict[bool, int] = {}

    def first(self, stacked: Stacked, inputs: Any) -> tuple[Weights, Seen]:
        """Return the gradients at the source, layer by layer where that is known to agree."""
        if self._agreed > 1 or batch_size(inputs) <= self._agreed:  # one tells nothing of several
            try:
                return self._layer_by_layer(stacked, inputs)
            except Exception:  # torch.func is asked, and raises what is no fault of the rules
                self._agreed, self._may_share = 0, False
                stacked.forget()
        gradients, seen = self._by_func(stacked, inputs, at_source=True)
        if self._may_share:
            self._ask(inputs, gradients, seen)
        return gradients, seen

    def further(self, stacked: Stacked, inputs: Any) -> tuple[Weights, Seen]:
        """Return the gradients ``(B, *shape)`` at weights of each sample's own."""
        return self._by_func(stacked, inputs, at_source=False)

    def _layer_by_layer(self, stacked: Stacked, inputs: Any) -> tuple[Weights, Seen]:
        gradients: Weights = {}

        def take(name: str, gradient: Gradient) -> None:
            if isinstance(gradient, Product):
                if stacked.use_up(name, gradient):
                    return
                gradient = gradient.whole(self._selected[name].shape)
            gradients[name] = gradient

        seen = self._layerwise(inputs, take)
        return self._used(gradients), seen

    def _ask(self, inputs: Any, gradients: Weights, seen: Seen) -> None:
        """Find out whether the gradients can be found layer by layer, from some that are known."""
        few = range(min(_FEW, len(seen.loss)))
        if bool(seen.trouble().any()) or not bool(seen.moves[: len(few)].any()):
            return  # another batch will tell
        counts = self._run.count, self._record.answered
        self._record.clear()
        known = {name: gradient[: len(few)] for name, gradient in gradients.items()}
        agrees = self._layerwise.agrees(taken(inputs, few), known)
        self._agreed = len(few) if agrees else 0
        self._may_share = self._agreed == 1  # and several, when they come
        self._run.count, self._record.answered = counts

    def _used(self, gradients: Weights) -> Weights:
        return {n: g for n, g in gradients.items() if n not in (self._unused or ())}

    def _by_func(self, stacked: Stacked, inputs: Any, *, at_source: bool) -> tuple[Weights, Seen]:
        """Return gradients ``(B, *shape)`` of every sample's loss by its weights."""
        recorded = at_source and stacked.anchor is not None
        step = self._compiled.get(recorded) or partial(self._step, recorded)
        given = (stacked.weights, stacked.dim), (stacked.anchor, stacked.anchor_dim)
        before = self._run.count
        gradients, seen = step(*given, inputs)
        if self._run.count == before:  # compiled: the passes were counted when it was traced
            self._run.count += self._passes.get(recorded, 0)
        else:
            self._passes[recorded] = self._run.count - before
        return self._used(gradients), Seen(*seen)

    def _step(
        self,
        recorded: bool,
        weights: tuple[Weights, int | None],
        anchor: tuple[Weights | None, int | None],
        inputs: Any,
    ) -> tuple[Weights, tuple[Tensor, ...]]:
        """Return gradients, and what :class:`Seen` holds; each given with its dimension."""
        record = self._record if recorded else None

        def one(weights: Weights, anchor: Weights | None, sample: Any) -> Any:
            def loss(own: Weights) -> Any:
                return self._loss(own, anchor, sample, record)

            return grad(loss, has_aux=True)(weights)

        dims = (weights[1], anchor[1])
        gradients, seen = mapped(one, dims, weights[0], anchor[0], inputs)
        return gradients, seen

    def _loss(
        self, own: Weights, anchor: Weights | None, sample: Any, record: Record | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return one sample's loss, and what :class:`Seen` holds of it."""
        kept = record.vectorised() if record else None
        with self._sites.swapped(own):
            with nullcontext() if kept is None else kept.first_pass(sample):
                outputs = self._run(sample, None)

            def second(y0: Tensor) -> Tensor:
                with (
                    self._sites.swapped(own if anchor is None else anchor),
                    nullcontext() if kept is None else kept.second_pass(same=True),
                ):
                    return self._to_label(self._run(sample, y0))

            objective = self._objective(self._to_label(outputs), second)
        loss = objective.loss()
        if self._unused is None:
            self._unused = _without_influence(loss, own)
        seen = objective.measure[0], objective.reliable[0], objective.moves[0]
        return loss, tuple(value.detach() for value in (outputs[0], *seen, loss))


def _without_influence(loss: Tensor, weights: Weights) -> frozenset[str]:
    """Return the weights that a loss does not depend on: optimizers leave those alone."""
    found = torch.autograd.grad(loss, [*weights.values()], retain_graph=True, allow_unused=True)
    return frozenset(name for name, g in zip(weights, found, strict=True) if g is None)
