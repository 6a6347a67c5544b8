"""Each fast path against the same engine without it: what is not 10 % faster anywhere goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from costs.clock import Piece, side_by_side
from costs.engines import Ours
from costs.extent import Extent
from costs.items import Item, Job, Required, Row
from costs.networks import Architecture, Entry, Subject
from it3_lightning.engine import fast

_SECTION = "Fast paths: with each, against without it, the same engine otherwise"


@dataclass(frozen=True)
class _Case:
    """A fast path, and where it is to show."""

    path: str
    architecture: Architecture
    entry: Entry
    size: int
    settings: dict[str, Any] = field(default_factory=dict)
    judged: bool = False

    @property
    def label(self) -> str:
        """Say what is timed."""
        given = ", ".join(f"{value}" for value in self.settings.values())
        return f"{self.path}: {self.architecture.name}, {self.entry}, batch {self.size} {given}"


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield the comparisons; one of each path is judged."""
    for case in _cases(extent):
        yield Job(f"fast path {case.label}", partial(_compare, extent, case, device))


def _cases(extent: Extent) -> Iterator[_Case]:
    vectorised = {"scope": "sample", "backend": "vectorised"}
    for size in (1, extent.batch):
        yield _Case("activation_cache", extent.small, "late", size)
        yield _Case("activation_cache", extent.large, "late", size, judged=size > 1)
    yield _Case("grad_sample", extent.small, "first", extent.batch, vectorised)
    yield _Case("grad_sample", extent.large, "first", extent.few, vectorised, judged=True)
    either = {"scope": "sample"}
    yield _Case("vmap", extent.small, "first", extent.batch, either, judged=True)
    yield _Case("vmap", extent.large, "first", extent.batch, {**either, "parameters": "norm"})


def _compare(extent: Extent, case: _Case, device: torch.device) -> list[Item]:
    subject = Subject.of(case.architecture, case.entry, device)
    images = subject.images(case.size)
    given = Ours(subject, **case.settings)
    with fast.disabled(case.path):
        plain = Ours(subject, **{**case.settings, **_loop(case)})
    pieces = [Piece("on", given, lambda: images), Piece("off", plain, lambda: images)]
    return [
        Row.timed(
            side_by_side(pieces, extent.plan),
            section=_SECTION,
            case=case.label,
            against=f"without {case.path}",
            ours=["on"],
            other=["off"],
            required=Required(1.1),
            judged=case.judged,
        )
    ]


def _loop(case: _Case) -> dict[str, Any]:
    """Without ``vmap`` there is the loop alone."""
    return {"backend": "loop"} if case.path == "vmap" else {}
