"""Time over batch size, steps and number of parameters, of both scopes and of the peer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from costs.clock import Piece, side_by_side
from costs.engines import LR, Ours
from costs.extent import Extent, large_networks
from costs.items import Axis, Item, Job, Point
from costs.networks import Architecture, Subject, small_cnn
from costs.peer import Peer, one_by_one

ENGINES = ("scope batch", "torch-ttt", "scope sample", "torch-ttt, one by one")
_AT = 16  # samples where it is something else that varies


@dataclass(frozen=True)
class _Place:
    """Where on a curve: at which network, with how many samples and steps."""

    at: int
    architecture: Architecture
    samples: int
    steps: int


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield every curve."""
    samples = min(_AT, extent.batch)
    on_gpu = large_networks() if device.type == "cuda" else ()
    for network in (*extent.networks, *on_gpu):
        sizes = [_Place(n, network, n, 1) for n in extent.batches]
        steps = [_Place(n, network, samples, n) for n in extent.steps]
        yield _job(extent, device, "batch size", sizes)
        yield _job(extent, device, "steps", steps)
        if network is extent.small:
            wide = [small_cnn(width, 8 * width) for width in extent.widths]
            places = [_Place(_parameters(each), each, samples, 1) for each in wide]
            yield _job(extent, device, "parameters", places)


def _job(extent: Extent, device: torch.device, axis: Axis, places: list[_Place]) -> Job:
    label = f"over {axis}: {places[0].architecture.name}"
    return Job(label, partial(_curve, extent, device, axis, places))


def _curve(extent: Extent, device: torch.device, axis: Axis, places: list[_Place]) -> list[Item]:
    """Time the engines place by place, each until a call may be expected to take too long."""
    points: list[Item] = []
    last: dict[str, tuple[int, float]] = {}
    for place in places:
        subject = Subject.of(place.architecture, "first", device)
        images = subject.images(place.samples)
        pieces = [
            Piece(name, run, lambda images=images: images)  # type: ignore[misc]
            for name, run in _engines(subject, place.steps).items()
            if _expected(last, name, place.at) <= extent.affordable
        ]
        last = {}
        if not pieces:
            break
        times = side_by_side(pieces, extent.curves)
        for piece in pieces:
            found = times.milliseconds(piece.name)
            last[piece.name] = place.at, found / 1000
            points.append(Point(place.architecture.name, axis, place.at, piece.name, found))
    return points


def _engines(subject: Subject, steps: int) -> dict[str, Callable[[Tensor], object]]:
    """Return what takes a batch, by name."""
    layer = subject.architecture.layer(subject.entry)
    peer = Peer(subject.plain, layer, subject.images(1), steps=steps, lr=LR)
    batch, sample = (Ours(subject, scope=scope, steps=steps) for scope in ("batch", "sample"))
    runs: tuple[Callable[[Tensor], object], ...] = batch, peer, sample, partial(one_by_one, peer)
    return dict(zip(ENGINES, runs, strict=True))


def _expected(last: Mapping[str, tuple[int, float]], name: str, at: int) -> float:
    """Return the seconds to expect from the last point of a curve, in proportion; 0 at first."""
    if not last:
        return 0.0
    if name not in last:
        return float("inf")
    before, seconds = last[name]
    return seconds * at / before


def _parameters(architecture: Architecture) -> int:
    return sum(p.numel() for p in architecture.make().parameters())
