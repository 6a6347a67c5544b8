"""Scope ``sample``, vectorised: every sample its own weights, all in one call of ``torch.func``.

In the first step all samples share the source weights, so the passes are those of a batch and only
the gradients are per sample; from then on the weights, too, have a dimension of samples in front.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.compiled import Compiled
from it3_lightning.engine.evaluation import Forward, ToLabel
from it3_lightning.engine.record import Record
from it3_lightning.engine.samples import Answer, batch_size, batched
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.stacked import Stacked, Weights
from it3_lightning.engine.vmappable import recurrent_layers, vmappable, without_graph
from it3_lightning.engine.weights import Sites
from it3_lightning.graphs import graph_count

_REASONS = ("non-finite output", "non-finite loss", "non-finite gradient or weights")


@dataclass(frozen=True)
class _Seen:
    """What an evaluation says of every sample: outputs ``(B, ...)``, the others ``(B,)``."""

    outputs: Tensor
    measure: Tensor
    reliable: Tensor
    moves: Tensor
    loss: Tensor

    def trouble(self) -> Tensor:
        """Return ``(B,)`` on the CPU: 0, or the number of the reason not to go on."""
        output = ~self.outputs.isfinite().flatten(1).all(1)
        return torch.where(output, 1, 2 * ~self.loss.isfinite()).cpu()


class Vectorised:
    """Adapts to every sample of a batch at once.

    Args:
        module: whose parameters adapt; none of them may need gradients.
        selected: the adapting parameters by name.
        forward: ``(inputs, prior) -> outputs (B, ...)``.
        to_label: brings outputs into label space.
        settings: how to adapt, in at least one step.
        record: of what need not be computed twice; has seen an ordinary pass.
    """

    def __init__(
        self,
        module: nn.Module,
        selected: Mapping[str, nn.Parameter],
        forward: Forward,
        to_label: ToLabel,
        settings: Settings,
        record: Record,
    ) -> None:
        self._module = module
        self._recurrent = bool(recurrent_layers(module))
        self._selected = selected
        self._sites = Sites(module, selected)
        self._forward = forward
        self._to_label = to_label
        self._settings = settings
        self._record = record
        self._device = next(iter(selected.values())).device.type
        self._compiled: dict[bool, Compiled] = {}
        if settings.compile:
            self._compiled = {r: Compiled(partial(self._step, r)) for r in (False, True)}
        self._unused: frozenset[str] | None = None if callable(settings.optimizer) else frozenset()
        self._forwards = 0
        self._passes: dict[bool, int] = {}

    def __call__(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to every sample of the inputs, and answer with its weights.

        Raises:
            Exception: whatever ``torch.func`` says of a network that cannot be vectorised.
        """
        if any(graph_count(leaf) for leaf in tree_leaves(inputs)):
            raise NotImplementedError("torch.func takes tensors, not batches of graphs.")
        self._forwards = 0
        try:
            with (
                torch.autocast(self._device, enabled=False),
                vmappable(self._module),
            ):
                return self._adapt(inputs, answer)
        finally:
            self._record.clear()

    def _adapt(self, inputs: Any, answer: Answer) -> Adaptation:
        size = batch_size(inputs)
        started = time.perf_counter()
        stacked = Stacked(self._selected, self._settings, size)
        failed = torch.zeros(size, dtype=torch.long)
        active = torch.ones(size, dtype=torch.bool)
        first: _Seen | None = None
        for _ in range(self._settings.steps):
            gradients, seen = self._gradients(stacked, inputs, at_source=first is None)
            first = first or seen
            failed = torch.where(active, seen.trouble(), failed)
            active &= (failed == 0) & seen.moves.cpu()
            if active.any():
                finite = stacked.step(gradients, active, seen.loss)
                failed[active & ~finite] = len(_REASONS)
                active &= finite
            del gradients
        assert first is not None
        bad = failed > 0
        stacked.back_to_source(bad)
        seconds = time.perf_counter() - started
        outputs, answers = self._answers(stacked, inputs, answer)
        adapted = self._measured(stacked, inputs, outputs) if self._settings.measure else None
        known = ~bad.to(outputs.device)
        reasons = [_REASONS[code - 1] for code in sorted(set(failed[failed > 0].tolist()))]
        return Adaptation(
            outputs=outputs,
            source_outputs=first.outputs,
            distance_source=first.measure.where(known, torch.nan),
            distance_adapted=None if adapted is None else adapted.where(known, torch.nan),
            reliable=first.reliable & known,
            skipped=bad,
            reason=", ".join(reasons) or None,
            weights={},
            forwards=self._forwards,
            backwards=self._settings.steps,
            answered=self._record.answered,
            seconds=seconds,
            answers=answers,
        )

    def _gradients(
        self, stacked: Stacked, inputs: Any, *, at_source: bool
    ) -> tuple[Weights, _Seen]:
        """Return gradients ``(B, *shape)`` of every sample's loss by its weights."""
        recorded = at_source and stacked.anchor is not None
        step = self._compiled.get(recorded) or partial(self._step, recorded)
        given = (stacked.weights, stacked.dim), (stacked.anchor, stacked.anchor_dim)
        before = self._forwards
        gradients, seen = step(*given, inputs)
        if self._forwards == before:  # compiled: the passes were counted when it was traced
            self._forwards += self._passes.get(recorded, 0)
        else:
            self._passes[recorded] = self._forwards - before
        used = {name: g for name, g in gradients.items() if name not in (self._unused or ())}
        return used, _Seen(*seen)

    def _step(
        self,
        recorded: bool,
        weights: tuple[Weights, int | None],
        anchor: tuple[Weights | None, int | None],
        inputs: Any,
    ) -> tuple[Weights, tuple[Tensor, ...]]:
        """Return gradients, and what :class:`_Seen` holds; each given with its dimension."""
        record = self._record if recorded else None

        def one(weights: Weights, anchor: Weights | None, sample: Any) -> Any:
            def loss(own: Weights) -> Any:
                return self._loss(own, anchor, sample, record)

            return grad(loss, has_aux=True)(weights)

        dims = (weights[1], anchor[1])
        gradients, seen = self._mapped(one, dims, weights[0], anchor[0], inputs)
        return gradients, seen

    def _loss(
        self, own: Weights, anchor: Weights | None, sample: Any, record: Record | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return one sample's loss, and what :class:`_Seen` holds of it."""
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

            objective = self._settings.objective(self._to_label(outputs), second)
        loss = objective.loss()
        if self._unused is None:
            self._unused = _without_influence(loss, own)
        reliable = objective.reliable[0]
        moves = reliable if objective.batch_term is None else torch.ones_like(reliable)
        seen = outputs[0], objective.measure[0], reliable, moves, loss
        return loss, tuple(value.detach() for value in seen)

    def _answers(self, stacked: Stacked, inputs: Any, answer: Answer) -> tuple[Tensor, Any]:
        """Return outputs ``(B, ...)`` and answers with every sample's own weights."""
        plain: list[Any] = []  # what is no tensor, and the structure, is the same for all

        def one(weights: Weights, sample: Any) -> Any:
            self._forwards += 1
            with self._sites.swapped(weights):
                leaves, structure = tree_flatten(answer(sample))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            plain[:] = [structure, [None if isinstance(v, Tensor) else (v,) for v in leaves]]
            return tuple(map(_without_batch, tensors))

        given = stacked.weights, inputs
        tensors = iter(self._mapped(self._graphless(one), (stacked.dim,), *given))
        structure, others = plain
        leaves = [next(tensors) if other is None else other[0] for other in others]
        outputs, answers = tree_unflatten(leaves, structure)
        return outputs, answers

    def _measured(self, stacked: Stacked, inputs: Any, outputs: Tensor) -> Tensor:
        """Return the objective's measure ``(B,)`` of outputs with the adapted weights."""

        def one(weights: Weights, anchor: Weights | None, y0: Tensor, sample: Any) -> Any:
            def second(prior: Tensor) -> Tensor:
                with self._sites.swapped(weights if anchor is None else anchor):
                    return self._to_label(self._run(sample, prior))

            return self._settings.objective(self._to_label(y0[None]), second).measure[0]

        dims = (stacked.dim, stacked.anchor_dim, 0)
        given = stacked.weights, stacked.anchor, outputs
        measure: Tensor = self._mapped(self._graphless(one), dims, *given, inputs)
        return measure

    def _graphless(self, one: Callable[..., Any]) -> Callable[..., Any]:
        return partial(without_graph, one) if self._recurrent else torch.no_grad()(one)

    def _run(self, sample: Any, prior: Tensor | None) -> Tensor:
        self._forwards += 1
        return self._forward(sample, prior)

    def _mapped(self, one: Callable[..., Any], dims: tuple[int | None, ...], *given: Any) -> Any:
        """Call ``one`` for every sample of the last argument, a batch of one each."""
        *others, inputs = given
        size = batch_size(inputs)
        along = tree_map(lambda leaf: 0 if batched(leaf, size) else None, inputs)

        def with_batch(*arguments: Any) -> Any:
            *rest, sample = arguments
            return one(*rest, _with_batch(sample, along))

        return vmap(with_batch, in_dims=(*dims, along))(*others, inputs)


def _without_influence(loss: Tensor, weights: Weights) -> frozenset[str]:
    """Return the weights that a loss does not depend on: optimizers leave those alone."""
    found = torch.autograd.grad(loss, [*weights.values()], retain_graph=True, allow_unused=True)
    return frozenset(name for name, g in zip(weights, found, strict=True) if g is None)


def _with_batch(sample: Any, along: Any) -> Any:
    """Put a dimension of one sample in front of every tensor that has samples."""
    return tree_map(lambda leaf, dim: leaf if dim is None else leaf[None], sample, along)


def _without_batch(leaf: Tensor) -> Tensor:
    return leaf[0] if leaf.ndim and leaf.shape[0] == 1 else leaf
