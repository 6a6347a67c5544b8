"""Names that the engine's files share: choices, kinds of functions, what a pass gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from it3_lightning.methods.base import Objective

Anchor = Literal["frozen", "ema", "live"]
Reset = Literal["batch", "weights", "never"] | int
Scope = Literal["batch", "sample"]
Backend = Literal["auto", "vectorised", "loop"]
NormStats = Literal["source", "batch", "mixed", "evidence"]

Weights = dict[str, Tensor]
"""Tensors by the names of parameters."""

Forward = Callable[[Any, Tensor | None], Tensor]
"""``(inputs, prior) -> outputs (B, ...)``, ``prior=None`` being the neutral one."""

ToLabel = Callable[[Tensor], Tensor]
"""Brings outputs into label space, ``(B, C, ...)``."""

Enters = Mapping[str, Literal["input", "output"]]
"""The layers at whose input or output the prior enters, by name; empty: unknown."""

Answer = Callable[[Any], tuple[Tensor, Any]]
"""Inputs to outputs ``(B, ...)``, and what is answered with them, each leaf ``(B, ...)``."""

Isolation = Callable[[], AbstractContextManager[None]]
"""Returns a context whose passes leave no trace in what the engine does not know of, as logs."""

InputsIn = Callable[[Any], Any]
"""Finds a network's inputs in what is given to a pass."""

SampleDims = Callable[[Any], Any]
"""For each tensor of a network's inputs the dimension of its samples, ``None`` where all samples
share it; ``None`` in place of it all: by the rule of :mod:`it3_lightning.engine.trees`."""

ValidIn = Callable[[Any, Tensor], Tensor | None]
"""A network's inputs and its prediction in label space, ``(B, C, ...)``, to the positions that are
valid, ``(B, ...)`` booleans; ``None``: all."""

SOURCE = 0
"""The version of the weights that training left."""


class Skip(Exception):  # noqa: N818  # no error: the batch keeps its source prediction
    """The batch cannot be adapted to; the message says why."""


@dataclass(frozen=True)
class Plain:
    """The neutral forward pass as an answer: the same pass as the first of a step.

    Args:
        forward: ``(inputs, prior) -> outputs (B, ...)``.
    """

    forward: Forward

    def __call__(self, inputs: Any) -> tuple[Tensor, Any]:
        """Return the outputs, and nothing else."""
        return self.forward(inputs, None), None


@dataclass(frozen=True)
class Evaluation:
    """Outputs ``(B, ...)`` of the first pass, and what the method makes of them."""

    outputs: Tensor
    objective: Objective


REASONS = ("non-finite output", "non-finite loss", "non-finite gradient or weights")


@dataclass(frozen=True)
class SampleEvaluations:
    """What one evaluation says of every sample by itself.

    Args:
        outputs: of the first pass, ``(B, ...)``; all others are ``(B,)``.
        measure: of the objective.
        reliable: whether it counts.
        moves: whether its weights move.
        loss: of the sample alone.
    """

    outputs: Tensor
    measure: Tensor
    reliable: Tensor
    moves: Tensor
    loss: Tensor
