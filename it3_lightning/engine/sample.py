"""Scope ``sample``: every sample of a batch gets its own adapted weights, as if it came alone.

Two backends with one result: a loop over batches of one, and ``torch.func``. Which one is faster
depends on the network, so both are tried on the first batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from it3_lightning.engine.adaptation import Adaptation, merged, replaced
from it3_lightning.engine.batch import BatchAdapter
from it3_lightning.engine.choice import Choice, chosen, fallen_back, said
from it3_lightning.engine.chunks import bytes_of_weights, copies_of_weights, samples_within
from it3_lightning.engine.outcome import Forward, ToLabel
from it3_lightning.engine.record import Enters
from it3_lightning.engine.samples import Answer, Plain, batch_size, cast_like, taken
from it3_lightning.engine.settings import Settings
from it3_lightning.engine.untraced import untraced
from it3_lightning.engine.vectorised import Vectorised
from it3_lightning.engine.vmappable import plain_attention
from it3_lightning.snapshot import Snapshot


class SampleAdapter:
    """Adapts a module to each sample of one batch after another.

    Args:
        module: whose parameters adapt.
        forward: ``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one.
        to_label: brings outputs into label space, ``(B, C, ...)``.
        settings: how to adapt.
        enters: see :class:`~it3_lightning.engine.BatchAdapter`.

    Raises:
        ValueError: the selection of parameters matches nothing.

    >>> net, x = nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
    >>> _ = nn.init.ones_(net.weight)
    >>> def forward(x, prior):  # knows the second prediction: half of the first
    ...     return net(x) if prior is None else prior / 2
    >>> settings = Settings(scope="sample", lr=0.1, optimizer="sgd")
    >>> with SampleAdapter(net, forward, lambda y: y, settings).adapted(x) as adaptation:
    ...     adaptation.outputs.flatten()  # w = 1 - 0.1 x^2 / 2, each by its own x
    tensor([0.9500, 1.6000])
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Forward,
        to_label: ToLabel,
        settings: Settings,
        *,
        enters: Enters = MappingProxyType({}),
    ) -> None:
        self._module = module
        self._settings = settings
        self._forward = forward
        alone = replace(settings, scope="batch", gate=None, compile=False)
        self._alone = BatchAdapter(module, forward, to_label, alone, enters=enters)
        still = replace(alone, steps=0, measure=settings.measure or settings.gate is not None)
        self._still = BatchAdapter(module, forward, to_label, still, enters=enters)
        self.selected = self._alone.selected
        self._vectorised = Vectorised(
            module, self.selected, forward, to_label, settings, self._alone.record
        )
        self.choice: Choice | None = None
        self._like: Any = None  # outputs and answers of the loop, in their data types

    def restart(self) -> None:
        """Do nothing: no sample leaves anything to the next."""

    @contextmanager
    def adapted(self, inputs: Any, answer: Answer | None = None) -> Iterator[Adaptation]:
        """Adapt to each sample and run the body, with the source weights in place.

        Args:
            inputs: what ``forward`` takes: tensors ``(B, ...)``, possibly nested. Never labels.
            answer: what to run with each sample's adapted weights: inputs to outputs ``(B, ...)``
                and what becomes :attr:`Adaptation.answers`. Default: the neutral forward pass.
        """
        with torch.inference_mode(False), torch.no_grad():  # samples taken out must be ordinary
            adaptation = self._adapt(inputs, answer or Plain(self._forward))
        yield adaptation

    def _adapt(self, inputs: Any, answer: Answer) -> Adaptation:
        if self._settings.steps == 0:
            return self._source(inputs, answer)
        if self._settings.gate is None:
            return self._each(inputs, answer)
        return self._gated(inputs, answer, self._settings.gate)

    def _source(self, inputs: Any, answer: Answer) -> Adaptation:
        """Predict with the source weights; measure the samples whose prediction is finite."""
        with self._still.adapted(inputs, answer) as source:
            pass
        if source.reason is None or source.outputs is None:
            return source
        rows = source.outputs.isfinite().flatten(1).all(1).nonzero()[:, 0].tolist()
        if not rows:
            return source
        with self._still.adapted(taken(inputs, rows), answer) as finite:
            pass
        both = replaced(source, finite, rows)
        return replace(both, outputs=source.outputs, answers=source.answers)

    def _gated(self, inputs: Any, answer: Answer, gate: float) -> Adaptation:
        """Adapt to the samples beyond the gate; the others keep the source prediction."""
        source = self._source(inputs, answer)
        if source.distance_source is None:  # no sample is finite
            return source
        within = source.distance_source <= gate
        rows = (~within.cpu() & ~source.skipped).nonzero()[:, 0].tolist()
        source = replace(
            source,
            reliable=torch.zeros_like(within),
            gated=within.cpu(),
            distance_adapted=source.distance_adapted if self._settings.measure else None,
        )
        if not rows:
            return source
        return replaced(source, self._each(taken(inputs, rows), answer), rows)

    def _each(self, inputs: Any, answer: Answer) -> Adaptation:
        size = batch_size(inputs)
        if self.choice is None or not self.choice.serves(size):
            self.choice = self._choose(inputs, answer)
        if self.choice.backend == "loop":
            return self._looped(inputs, answer)
        chunk = self.choice.chunk_size
        parts = [range(start, min(start + chunk, size)) for start in range(0, size, chunk)]
        try:
            return merged([self._at_once(taken(inputs, part), answer) for part in parts])
        except Exception as error:  # of a batch unlike the one the choice was made by
            looped = self._looped(inputs, answer)  # raises what is no fault of torch.func
            self.choice = fallen_back(chunk, said(error))
            return looped

    def _looped(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to one sample after the other."""
        parts = []
        for index in range(batch_size(inputs)):
            with self._alone.adapted(taken(inputs, range(index, index + 1)), answer) as adaptation:
                parts.append(replace(adaptation, weights={}))
        looped = merged(parts)
        self._like = tree_map(_empty, (looped.outputs, looped.answers))
        return looped

    def _at_once(self, inputs: Any, answer: Answer) -> Adaptation:
        """Adapt to all samples by ``torch.func``; what goes wrong in the end keeps the source."""
        snapshot = Snapshot(self._module)
        with untraced(snapshot):
            for parameter in snapshot.parameters:
                parameter.requires_grad_(False)
                parameter.grad = None
            adaptation = self._vectorised(inputs, answer)
        assert adaptation.outputs is not None
        outputs, answers = cast_like((adaptation.outputs, adaptation.answers), self._like)
        source = cast_like(adaptation.source_outputs, outputs)
        adaptation = replace(adaptation, outputs=outputs, answers=answers, source_outputs=source)
        bad = ~outputs.isfinite().flatten(1).all(1).cpu() & ~adaptation.skipped
        if not bad.any():
            return adaptation
        rows = bad.nonzero()[:, 0].tolist()
        kept = self._source(taken(inputs, rows), answer)
        kept = replace(
            kept,
            skipped=torch.ones_like(kept.skipped),
            reason="non-finite output",
            distance_source=None,
            distance_adapted=None,
            reliable=None,
        )
        return replaced(adaptation, kept, rows)

    def _choose(self, inputs: Any, answer: Answer) -> Choice:
        """Try both backends."""
        with plain_attention(self._module):
            kept = self._alone.bytes_kept(taken(inputs, range(1)))
        size = self._settings.chunk_size
        if size == "auto":
            size = samples_within(
                self._settings.memory,
                weights=bytes_of_weights(self.selected.values()),
                activations=kept,
                copies=copies_of_weights(self._settings),
            )
        choice = chosen(
            self._settings.backend,
            size,
            inputs,
            loop=lambda part: self._looped(part, answer),
            vectorised=lambda part: self._at_once(part, answer),
        )
        if choice.backend == "loop":
            self._vectorised.release()
        return choice


def _empty(leaf: Any) -> Any:
    return leaf.new_empty(0) if isinstance(leaf, Tensor) else leaf
