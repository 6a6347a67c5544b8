"""Scope ``sample``, vectorised: every sample its own weights, all of them at once.

In the first step all samples share the source weights, so the passes are those of a batch and only
the gradients are per sample; from then on the weights, too, have a dimension of samples in front,
and ``torch.func`` runs the network for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.gradients import Gradients
from it3_lightning.engine.mapped import Counted, mapped, without_batch
from it3_lightning.engine.outcome import Forward, ToLabel
from it3_lightning.engine.record import Record
from it3_lightning.engine.samples import Answer, batch_size, copied, joined, taken
from it3_lightning.engine.seen import REASONS, Seen
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.stacked import Stacked, Weights
from it3_lightning.engine.vmappable import recurrent_layers, vmappable, without_graph
from it3_lightning.engine.weights import Sites
from it3_lightning.graphs import graph_count

_LARGE = 1 << 20  # elements of a sample's weights: to read them takes longer than calling layers


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
        self._run = Counted(forward)
        self._to_label = to_label
        self._settings = settings
        self._record = record
        self._gradients = Gradients(module, selected, self._run, to_label, settings, record)
        self._device = next(iter(selected.values())).device.type
        self._large = sum(p.numel() for p in selected.values()) >= _LARGE and self._device == "cpu"
        self._memory: Weights = {}

    def release(self) -> None:
        """Give back the memory that is kept for the next batch."""
        self._memory.clear()

    def __call__(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to every sample of the inputs, and answer with its weights.

        Raises:
            Exception: whatever ``torch.func`` says of a network that cannot be vectorised.
        """
        if any(graph_count(leaf) for leaf in tree_leaves(inputs)):
            raise NotImplementedError("torch.func takes tensors, not batches of graphs.")
        self._run.count = self._record.answered = 0
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
        stacked = Stacked(self._selected, self._settings, size, self._memory)
        failed = torch.zeros(size, dtype=torch.long)
        active = torch.ones(size, dtype=torch.bool)
        first: Seen | None = None
        for _ in range(self._settings.steps):
            find = self._gradients.further if first else self._gradients.first
            gradients, seen = find(stacked, inputs)
            first = first or seen
            failed = torch.where(active, seen.trouble(), failed)
            active &= (failed == 0) & seen.moves.cpu()
            if active.any():
                finite = stacked.step(gradients, active, seen.loss)
                failed[active & ~finite] = len(REASONS)
                active &= finite
            del gradients
        assert first is not None
        bad = failed > 0
        stacked.back_to_source(bad)
        seconds = time.perf_counter() - started
        outputs, answers = self._answers(stacked, inputs, answer)
        adapted = self._measured(stacked, inputs, outputs) if self._settings.measure else None
        known = ~bad.to(outputs.device)
        reasons = [REASONS[code - 1] for code in sorted(set(failed[failed > 0].tolist()))]
        return Adaptation(
            outputs=outputs,
            source_outputs=first.outputs,
            distance_source=first.measure.where(known, torch.nan),
            distance_adapted=None if adapted is None else adapted.where(known, torch.nan),
            reliable=first.reliable & known,
            skipped=bad,
            reason=", ".join(reasons) or None,
            weights={},
            forwards=self._run.count,
            backwards=self._settings.steps,
            answered=self._record.answered,
            seconds=seconds,
            answers=answers,
        )

    def _answers(self, stacked: Stacked, inputs: Any, answer: Answer) -> tuple[Tensor, Any]:
        """Return outputs ``(B, ...)`` and answers with every sample's own weights."""
        if stacked.dim is not None and self._large:
            return self._answers_one_by_one(stacked.weights, inputs, answer)
        plain: list[Any] = []  # what is no tensor, and the structure, is the same for all

        def one(weights: Weights, sample: Any) -> Any:
            self._run.count += 1
            with self._sites.swapped(weights):
                leaves, structure = tree_flatten(answer(copied(sample)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            plain[:] = [structure, [None if isinstance(v, Tensor) else (v,) for v in leaves]]
            return tuple(map(without_batch, tensors))

        given = stacked.weights, inputs
        tensors = iter(mapped(self._graphless(one), (stacked.dim,), *given))
        structure, others = plain
        leaves = [next(tensors) if other is None else other[0] for other in others]
        outputs, answers = tree_unflatten(leaves, structure)
        return outputs, answers

    def _answers_one_by_one(
        self, weights: Weights, inputs: Any, answer: Answer
    ) -> tuple[Tensor, Any]:
        """Do the same sample by sample."""
        parts = []
        for row in range(batch_size(inputs)):
            self._run.count += 1
            with self._sites.swapped({name: w[row] for name, w in weights.items()}):
                parts.append(answer(copied(taken(inputs, range(row, row + 1)))))
        outputs, answers = joined(parts)
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
        measure: Tensor = mapped(self._graphless(one), dims, *given, inputs)
        return measure

    def _graphless(self, one: Callable[..., Any]) -> Callable[..., Any]:
        return partial(without_graph, one) if self._recurrent else torch.no_grad()(one)
