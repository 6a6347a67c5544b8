"""What one adaptation gives: predictions, distances, what was skipped and why, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Adaptation:
    """The result of adapting to one batch. All tensors are detached.

    Args:
        outputs: ``(B, ...)``, the network's outputs from the adapted weights; the source outputs
            where the batch was skipped; ``None`` if not measured.
        source_outputs: ``(B, ...)``, outputs of the un-adapted network; ``None`` if not measured.
        distance_source: ``(B,)``, the objective's measure with the un-adapted weights.
        distance_adapted: ``(B,)``, the same with the adapted weights.
        reliable: ``(B,)`` booleans, the samples that moved the weights in the first step.
        skipped: ``(B,)`` booleans, the samples that got the source prediction.
        reason: why they were skipped.
        weights: the adapted weights by parameter name; empty where the batch was skipped. These are
            the engine's own tensors, not copies: where weights are carried along (``reset`` other
            than ``"batch"``) the next batch moves them in place. Clone what is to be kept, change
            nothing.
        forwards: forward passes run, those for measuring included.
        backwards: backward passes run.
        seconds: time the steps took, measuring not included.
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
    seconds: float
