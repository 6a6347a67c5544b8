"""What one adaptation gives: predictions, distances, what was skipped and why, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from it3_lightning.engine.trees import batch_size, joined, written
from it3_lightning.engine.types import Evaluation


@dataclass(frozen=True)
class Adaptation:
    """The result of adapting to one batch. All tensors are detached.

    Args:
        outputs: ``(B, ...)``, the network's outputs from the adapted weights; the source outputs
            where the batch was skipped; ``None`` if not measured.
        source_outputs: ``(B, ...)``, outputs of the un-adapted network; ``None`` if not measured.
        distance_source: ``(B,)``, the objective's measure with the un-adapted weights; NaN where it
            is not known, as of a sample that was skipped by itself.
        distance_adapted: ``(B,)``, the same with the adapted weights.
        reliable: ``(B,)`` booleans, the samples that moved the weights in the first step; none of
            them where the weights are still the source's, as after no step, or one that is shorter
            than their rounding.
        skipped: ``(B,)`` booleans, the samples that got the source prediction.
        reason: why they were skipped.
        weights: the adapted weights by parameter name; empty where the batch was skipped. These are
            the engine's own tensors, or the source's where no step was taken, not copies: the next
            batch overwrites them. Clone what is to be kept, change nothing.
        forwards: forward passes run, those for measuring included.
        backwards: backward passes run.
        cache_hits: calls of layers in these passes that were not computed but answered from the
            activation cache.
        seconds: time the steps took, measuring not included.
        answers: in scope ``"sample"``, what was asked for with each sample's adapted weights.
        gated: ``(B,)`` booleans, samples whose distance lies within the gate: not adapted to.
        prediction: ``(B, C, ...)`` in label space, of a method that predicts by itself.
    """

    outputs: Tensor | None
    source_outputs: Tensor | None
    distance_source: Tensor | None
    distance_adapted: Tensor | None
    reliable: Tensor | None
    skipped: Tensor
    reason: str | None
    weights: dict[str, Tensor]
    forwards: int
    backwards: int
    cache_hits: int
    seconds: float
    answers: Any = None
    gated: Tensor | None = None
    prediction: Tensor | None = None

    @classmethod
    def of(
        cls,
        inputs: Any,
        *,
        outputs: Tensor | None,
        source: Evaluation | None,
        moved: Evaluation | None,
        moves: bool,
        adapted: Evaluation | None,
        weights: dict[str, Tensor],
        forwards: int,
        backwards: int,
        cache_hits: int,
        seconds: float,
        answers: Any,
        gated: Tensor | None,
        prediction: Tensor | None = None,
    ) -> Adaptation:
        """Return the result of a batch that was adapted to.

        Args:
            inputs: of the batch.
            outputs: from the adapted weights.
            source: the evaluation of the un-adapted weights.
            moved: that before the first step.
            moves: whether the steps have changed any weight.
            adapted: that of the adapted weights.
            weights: the adapted ones.
            forwards: that were run.
            backwards: likewise.
            cache_hits: of the activation cache.
            seconds: that the steps took.
            answers: what was asked for with the adapted weights.
            gated: samples within the gate.
            prediction: of the method's own.
        """
        reliable = None if moved is None else moved.objective.reliable
        if reliable is not None and not moves:
            reliable = torch.zeros_like(reliable)
        size = batch_size(inputs) if moved is None else moved.outputs.shape[0]
        return cls(
            outputs=outputs,
            source_outputs=None if source is None else source.outputs,
            distance_source=None if source is None else source.objective.measure,
            distance_adapted=None if adapted is None else adapted.objective.measure,
            reliable=reliable,
            skipped=torch.zeros(size, dtype=torch.bool),
            reason=None,
            weights=weights,
            forwards=forwards,
            backwards=backwards,
            cache_hits=cache_hits,
            seconds=seconds,
            answers=answers,
            gated=gated,
            prediction=prediction,
        )

    @classmethod
    def skipping(
        cls,
        inputs: Any,
        outputs: Tensor | None,
        reason: str,
        forwards: int,
        cache_hits: int,
        answers: Any,
    ) -> Adaptation:
        """Return the result of a batch that keeps the source prediction."""
        size = batch_size(inputs) if outputs is None else outputs.shape[0]
        return cls(
            outputs=outputs,
            source_outputs=outputs,
            distance_source=None,
            distance_adapted=None,
            reliable=None,
            skipped=torch.ones(size, dtype=torch.bool),
            reason=reason or None,
            weights={},
            forwards=forwards,
            backwards=0,
            cache_hits=cache_hits,
            seconds=0.0,
            answers=answers,
        )


_BY_SAMPLE = ("distance_source", "distance_adapted", "reliable", "skipped", "gated")


def merged(parts: Sequence[Adaptation]) -> Adaptation:
    """Return the adaptation to a batch from those to its parts, in order.

    What is not known of a part, as of a skipped one, is NaN or ``False`` there.
    """
    if len(parts) == 1:
        return parts[0]
    values: dict[str, Any] = {name: _column(name, parts) for name in _BY_SAMPLE}
    return replace(
        parts[0],
        outputs=_whole([part.outputs for part in parts]),
        source_outputs=_whole([part.source_outputs for part in parts]),
        answers=_whole([part.answers for part in parts]),
        reason=_together([part.reason for part in parts]),
        **values,
        **{name: sum(getattr(part, name) for part in parts) for name in _COUNTS},
    )


def replaced(whole: Adaptation, part: Adaptation, rows: Sequence[int]) -> Adaptation:
    """Return an adaptation with what came of the samples in these rows put in.

    What is known of some samples only is NaN or ``False`` for the others.
    """
    values: dict[str, Any] = {}
    for name in _BY_SAMPLE:
        old, new = getattr(whole, name), getattr(part, name)
        if old is not None or new is not None:
            known = new if old is None else old
            old = _unknown(known, whole.skipped.numel()) if old is None else old
            values[name] = written(old, _unknown(known, len(rows)) if new is None else new, rows)
    return replace(
        whole,
        outputs=written(whole.outputs, part.outputs, rows),
        answers=written(whole.answers, part.answers, rows),
        reason=_together([whole.reason, part.reason]),
        **values,
        **{name: getattr(whole, name) + getattr(part, name) for name in _COUNTS},
    )


_COUNTS = ("forwards", "backwards", "cache_hits", "seconds")


def _column(name: str, parts: Sequence[Adaptation]) -> Tensor | None:
    """Join a field ``(b,)`` of the parts, filled in where it is not known."""
    values: list[Tensor | None] = [getattr(part, name) for part in parts]
    known = next((value for value in values if value is not None), None)
    if known is None:
        return None
    sizes = [part.skipped.numel() for part in parts]
    filled = [
        _unknown(known, size) if value is None else value
        for value, size in zip(values, sizes, strict=True)
    ]
    return torch.cat(filled)


def _unknown(like: Tensor, size: int) -> Tensor:
    """Return what a field ``(b,)`` holds where nothing is known."""
    return like.new_full((size,), float("nan") if like.is_floating_point() else False)


def _whole(parts: Sequence[Any]) -> Any:
    return None if any(part is None for part in parts) else joined(parts)


def _together(reasons: Sequence[str | None]) -> str | None:
    return ", ".join(dict.fromkeys(reason for reason in reasons if reason)) or None
