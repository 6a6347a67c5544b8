"""Which backend serves scope ``sample``: both are tried, the faster one is taken."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.samples import batch_size, taken
from it3_lightning.engine.settings import Backend

Run = Callable[[Any], Adaptation]

_LOOPED = 4  # samples that the loop is timed on: its cost per sample is always the same
_VECTORISED = 64  # at most, as many as come at once
_TOLERANCE = 1e-2  # between the backends' outputs, in standard deviations of the outputs


@dataclass(frozen=True)
class Choice:
    """The backend taken.

    Args:
        backend: its name.
        chunk_size: samples that are vectorised at once.
        tried: the number of samples it was chosen by.
        reason: why, in words.
    """

    backend: Literal["vectorised", "loop"]
    chunk_size: int
    tried: int
    reason: str

    def serves(self, size: int) -> bool:
        """Whether it still holds for batches of this size, or should be made anew."""
        return min(size, self.chunk_size, _VECTORISED) < 2 * self.tried

    def __str__(self) -> str:
        return f"backend {self.backend!r}: {self.reason}"


def chosen(backend: Backend, chunk_size: int, inputs: Any, *, loop: Run, vectorised: Run) -> Choice:
    """Try the backends on some of the inputs.

    Args:
        backend: what is asked for.
        chunk_size: samples that may be vectorised at once.
        inputs: a batch.
        loop: runs the loop.
        vectorised: runs ``torch.func``.
    """
    size = batch_size(inputs)
    few = taken(inputs, range(min(size, _LOOPED)))
    many = taken(inputs, range(min(size, chunk_size, _VECTORISED)))
    tried = batch_size(many)
    if backend == "loop":
        return Choice("loop", chunk_size, 2**62, "as asked for")
    expected = loop(few)
    try:
        found = vectorised(many)
    except Exception as error:  # torch.func has no class of errors of its own
        return _fallen_back(chunk_size, f"{type(error).__name__}: {str(error).strip()}")
    difference = _difference(expected, found)
    if not difference < _TOLERANCE:
        return _fallen_back(chunk_size, f"its outputs differ by {difference:.2g} deviations")
    if backend == "vectorised":
        return Choice("vectorised", chunk_size, tried, "as asked for")
    times = _milliseconds(loop, few), _milliseconds(vectorised, many)
    found_faster: Literal["vectorised", "loop"] = "loop" if times[0] < times[1] else "vectorised"
    reason = f"loop {times[0]:.3g}, vectorised {times[1]:.3g} ms a sample, {tried} at once"
    return Choice(found_faster, chunk_size, tried, reason)


def _fallen_back(chunk_size: int, cause: str) -> Choice:
    cause = " ".join(cause.split())[:300]
    warnings.warn(
        f"The network cannot be vectorised, so samples are adapted to one by one. {cause} "
        "(backend='loop' says so at once.)",
        stacklevel=2,
    )
    return Choice("loop", chunk_size, 2**62, f"cannot be vectorised: {cause}")


def _difference(expected: Adaptation, found: Adaptation) -> float:
    """Return the largest difference of the samples both have, in standard deviations."""
    assert expected.outputs is not None
    assert found.outputs is not None
    mine = found.outputs[: len(expected.outputs)].float()
    theirs = expected.outputs.float()
    finite = mine.isfinite() & theirs.isfinite()
    if not finite.any():
        return 0.0
    spread = theirs[finite].std(correction=0) + 1e-3 * theirs[finite].abs().mean() + 1e-12
    return float((mine - theirs)[finite].abs().max() / spread)


def _milliseconds(run: Run, inputs: Any) -> float:
    """Return the time of a second run, per sample."""
    _wait()
    started = time.perf_counter()
    run(inputs)
    _wait()
    return 1000 * (time.perf_counter() - started) / batch_size(inputs)


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
