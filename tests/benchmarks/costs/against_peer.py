"""Compares with the peer: scope ``batch`` call by call, scope ``sample`` with the peer one by one.

Where samples adapt by themselves, the backend ``"auto"`` is compared with both others on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch

from costs.clock import Piece, Times, side_by_side
from costs.engines import LR, Ours
from costs.extent import Extent
from costs.items import Deeds, Item, Job, Required, Row
from costs.networks import Architecture, Entry, Subject
from costs.peer import Peer

_BATCH = "Scope batch against torch-ttt"
_SAMPLE = "Scope sample against torch-ttt on one sample, per sample"
_AUTO = "Backend auto against the better one, scope sample, per sample"
_SINGLE = 8  # samples that the peer takes in a round, one by one

_FASTER: dict[Entry, tuple[float, float]] = {"first": (2.0, 1.4), "late": (3.0, 2.0)}
_SMALL, _ALL, _NORM = 15.0, 4.0, 20.0  # times faster per sample

Parameters = Literal["all", "norm"]


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield every comparison with the peer."""
    entries: tuple[Entry, ...] = ("first", "late")
    for entry in entries:
        for architecture in (*extent.networks, *extent.extra):
            for size in (1, extent.batch):
                label = f"torch-ttt: {architecture.name}, {entry}, batch {size}"
                yield Job(label, partial(_batch, extent, architecture, entry, size, device))
    for architecture in extent.networks:
        choices: tuple[Parameters, ...] = ("all",)
        if architecture.name != "small CNN":
            choices = ("norm", "all")
        for parameters in choices:
            for entry in entries:
                label = f"by itself: {architecture.name}, {entry}, {parameters}"
                run = partial(_sample, extent, architecture, entry, parameters, device)
                yield Job(label, run)


def _batch(
    extent: Extent, architecture: Architecture, entry: Entry, size: int, device: torch.device
) -> list[Item]:
    subject = Subject.of(architecture, entry, device)
    images = subject.images(size)
    ours, peer = Ours(subject), _peer(subject)
    pieces = [Piece("ours", lambda _: ours(images)), Piece("peer", lambda _: peer(images))]
    times = side_by_side(pieces, extent.plan)
    required = Required(_FASTER[entry][size > 1])
    found = _row(times, _BATCH, f"{subject.name}, batch {size}", required)
    if size > 1:
        return [found]
    name = f"{subject.name}, a batch"
    deeds = Deeds(name, "it3_lightning", *ours.deeds(images))
    return [found, deeds, Deeds(name, "torch-ttt", *peer.deeds(images))]


def _sample(
    extent: Extent,
    architecture: Architecture,
    entry: Entry,
    parameters: Parameters,
    device: torch.device,
) -> list[Item]:
    subject = Subject.of(architecture, entry, device)
    small = architecture.name == "small CNN"
    size = extent.batch if small or parameters == "norm" else extent.few
    images, single = subject.images(size), list(subject.images(min(size, _SINGLE)).split(1))  # type: ignore[no-untyped-call]
    by_backend = {
        backend: Ours(subject, scope="sample", parameters=parameters, backend=backend)
        for backend in ("auto", "loop", "vectorised")
    }
    peer = _peer(subject)
    pieces = [
        *(
            Piece(backend, lambda _, ours=ours: ours(images), per=size)  # type: ignore[misc]
            for backend, ours in by_backend.items()
        ),
        Piece("peer", lambda _: [peer(image) for image in single], per=len(single)),
    ]
    times = side_by_side(pieces, extent.plan)
    what = {"all": "all weights", "norm": "norm layers"}[parameters]
    case = f"{subject.name}, {what}, {size} at once"
    faster = Required(_SMALL if small else {"all": _ALL, "norm": _NORM}[parameters])
    better = min("loop", "vectorised", key=times.milliseconds)
    note = by_backend["auto"].choice()
    return [
        _row(times, _SAMPLE, case, faster, ours="auto", note=note),
        _row(times, _AUTO, case, Required(0.95), ours="auto", other=better, note=note),
        Deeds(case, "it3_lightning", *by_backend["auto"].deeds(images)),
    ]


def _peer(subject: Subject) -> Peer:
    layer = subject.architecture.layer(subject.entry)
    return Peer(subject.plain, layer, subject.images(2), steps=1, lr=LR)


def _row(
    times: Times,
    section: str,
    case: str,
    required: Required,
    *,
    ours: str = "ours",
    other: str = "peer",
    note: str = "",
) -> Row:
    return Row(
        section=section,
        case=case,
        against="torch-ttt" if other == "peer" else other,
        ours=times.milliseconds(ours),
        other=times.milliseconds(other),
        ratio=times.ratio([other], [ours]),
        required=required,
        quartiles=times.spread([other], [ours]),
        rounds=times.rounds,
        running=times.running,
        note=note,
    )
