"""Compares with the peer: scope ``batch`` call by call, scope ``sample`` with the peer one by one.

Where samples adapt by themselves, the backend ``"auto"`` is compared with both others on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from costs.clock import Piece, side_by_side
from costs.engines import LR, Ours
from costs.extent import Extent
from costs.items import Deeds, Item, Job, Required, Row
from costs.networks import Architecture, Entry, Subject
from costs.peer import Peer, one_by_one

_BATCH = "Scope batch against torch-ttt"
_SAMPLE = "Scope sample against torch-ttt on one sample, per sample"
_AUTO = "Backend auto against the better one, scope sample, per sample"

_SINGLE = 4  # samples that the peer takes in a round, one by one
_BACKENDS = ("auto", "loop", "vectorised")
_AS_GOOD = Required(0.95)


@dataclass(frozen=True)
class _Case:
    """A network, how many samples come, and how many times faster we have to be, if judged."""

    architecture: Architecture
    entry: Entry
    size: int
    required: Required
    parameters: Literal["all", "norm"] = "all"
    judged: bool = True


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield every comparison with the peer."""
    for case in _of_batches(extent):
        label = f"torch-ttt: {case.architecture.name}, {case.entry}, batch {case.size}"
        yield Job(label, partial(_batch, extent, case, device))
    for case in _of_samples(extent):
        label = f"by itself: {case.architecture.name}, {case.entry}, {case.parameters}"
        yield Job(label, partial(_sample, extent, case, device))


def _of_batches(extent: Extent) -> Iterator[_Case]:
    faster: dict[Entry, tuple[float, float]] = {"first": (2.0, 1.4), "late": (3.0, 2.0)}
    for entry, (alone, together) in faster.items():
        for architecture in (*extent.networks, *extent.extra):
            judged = architecture in extent.networks
            yield _Case(architecture, entry, 1, Required(alone), judged=judged)
            yield _Case(architecture, entry, extent.batch, Required(together), judged=judged)


def _of_samples(extent: Extent) -> Iterator[_Case]:
    entries: tuple[Entry, ...] = ("first", "late")
    for entry in entries:
        yield _Case(extent.small, entry, extent.batch, Required(15.0))
        yield _Case(extent.large, entry, extent.batch, Required(20.0), "norm")
        yield _Case(extent.large, entry, extent.few, Required(4.0))


def _batch(extent: Extent, case: _Case, device: torch.device) -> list[Item]:
    subject = Subject.of(case.architecture, case.entry, device)
    images = subject.images(case.size)
    ours, peer = Ours(subject), _peer(subject)
    pieces = [Piece("ours", ours, lambda: images), Piece("torch-ttt", peer, lambda: images)]
    times = side_by_side(pieces, extent.plan)
    row = Row.timed(
        times,
        section=_BATCH,
        case=f"{subject.name}, batch {case.size}",
        against="torch-ttt",
        ours=["ours"],
        other=["torch-ttt"],
        required=case.required,
        judged=case.judged,
    )
    if case.size > 1:
        return [row]
    name = f"{subject.name}, a batch"
    done = Deeds(name, "it3_lightning", *ours.deeds(images))
    return [row, done, Deeds(name, "torch-ttt", *peer.deeds(images))]


def _sample(extent: Extent, case: _Case, device: torch.device) -> list[Item]:
    subject = Subject.of(case.architecture, case.entry, device)
    images, some = subject.images(case.size), subject.images(min(case.size, _SINGLE))
    given: dict[str, Any] = {"scope": "sample", "parameters": case.parameters}
    engines = {name: Ours(subject, backend=name, **given) for name in _BACKENDS}
    pieces = [Piece(name, run, lambda: images, len(images)) for name, run in engines.items()]
    pieces.append(Piece("torch-ttt", partial(one_by_one, _peer(subject)), lambda: some, len(some)))
    times = side_by_side(pieces, extent.plan)
    what = {"all": "all weights", "norm": "norm layers"}[case.parameters]
    name = f"{subject.name}, {what}, {case.size} at once"
    better = min("loop", "vectorised", key=times.milliseconds)
    compared = ((_SAMPLE, "torch-ttt", case.required), (_AUTO, better, _AS_GOOD))
    rows = [
        Row.timed(
            times,
            section=section,
            case=name,
            against=other,
            ours=["auto"],
            other=[other],
            required=required,
            note=engines["auto"].choice(),
        )
        for section, other, required in compared
    ]
    return [*rows, Deeds(name, "it3_lightning", *engines["auto"].deeds(images))]


def _peer(subject: Subject) -> Peer:
    layer = subject.architecture.layer(subject.entry)
    return Peer(subject.plain, layer, subject.images(2), steps=1, lr=LR)
