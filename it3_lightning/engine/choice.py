"""Which backend serves scope ``sample``: both are tried, the faster one is taken."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from it3_lightning.engine.adaptation import Adaptation
from it3_lightning.engine.samples import batch_size, taken
from it3_lightning.engine.settings import Backend

Run = Callable[[Any], Adaptation]

_LOOPED = 4  # samples that the loop is timed on: its cost per sample is always the same
_TIMED = 2  # times that each backend is, after a first run
_VECTORISED = 64  # at most, as many as come at once
_ROUNDING = 1e3  # units of rounding that the backends' outputs may lie apart, at least
_MOVEMENT = 0.02  # or this share of how far the steps moved them
_ROUGHLY = 0.5  # the same in low precision, where Adam makes whole steps of rounding errors
_LOW = 1e-3  # unit of rounding of TF32; half precision has larger ones


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
        return fallen_back(chunk_size, said(error))
    apart = _apart(expected, found)
    if apart is None:
        return Choice("loop", chunk_size, 0, "no finite sample yet to compare by")
    difference, allowed = apart
    if not difference <= allowed:
        cause = f"its outputs differ by {difference:.2g}, where {allowed:.2g} may be rounding."
        return fallen_back(chunk_size, cause)
    if backend == "vectorised":
        return Choice("vectorised", chunk_size, tried, "as asked for")
    times = _milliseconds(loop, few), _milliseconds(vectorised, many)
    found_faster: Literal["vectorised", "loop"] = "loop" if times[0] < times[1] else "vectorised"
    reason = f"loop {times[0]:.3g}, vectorised {times[1]:.3g} ms a sample, {tried} at once"
    return Choice(found_faster, chunk_size, tried, reason)


def said(error: Exception) -> str:
    """Return an error in words."""
    return f"{type(error).__name__}: {str(error).strip()}"


def fallen_back(chunk_size: int, cause: str) -> Choice:
    """Return the loop, for good, and warn why."""
    cause = " ".join(cause.split())[:300]
    warnings.warn(
        f"The network cannot be vectorised, so samples are adapted to one by one. {cause} "
        "(backend='loop' says so at once.)",
        stacklevel=2,
    )
    return Choice("loop", chunk_size, 2**62, f"cannot be vectorised: {cause}")


def _apart(expected: Adaptation, found: Adaptation) -> tuple[float, float] | None:
    """Return by how much the outputs differ of samples that both have, and what is allowed."""
    count = min(expected.skipped.numel(), found.skipped.numel())
    kept = (expected.outputs, expected.source_outputs, found.outputs)
    theirs, source, mine = (t[:count] for t in kept if t is not None)
    finite = mine.isfinite() & theirs.isfinite() & source.isfinite()
    if not finite.any():
        return None
    mine, theirs, source = (t[finite].double() for t in (mine, theirs, source))
    spread = theirs.std(correction=0) + 1e-3 * theirs.abs().mean() + 1e-12
    moved = (theirs - source).abs().max()
    unit = _unit(expected.outputs, found.outputs)
    share = _MOVEMENT if unit < _LOW else _ROUGHLY
    allowed = torch.maximum(min(_ROUNDING * unit, 0.05) * spread, share * moved)
    return float((mine - theirs).abs().max()), float(allowed)


def _unit(*outputs: Tensor | None) -> float:
    """Return the unit of rounding of the arithmetic that made these outputs."""
    units = [_LOW if t.device.type != "cpu" else 0.0 for t in outputs if t is not None]
    units += [torch.finfo(t.dtype).eps for t in outputs if t is not None]
    for device in {t.device.type for t in outputs if t is not None}:
        if torch.is_autocast_enabled(device):
            units.append(torch.finfo(torch.get_autocast_dtype(device)).eps)
    return max(units)


def _milliseconds(run: Run, inputs: Any) -> float:
    """Return the shortest time of a few runs, per sample: what else a machine does adds to it."""
    times = []
    for _ in range(_TIMED):
        _wait()
        started = time.perf_counter()
        run(inputs)
        _wait()
        times.append(time.perf_counter() - started)
    return 1000 * min(times) / batch_size(inputs)


def _wait() -> None:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
