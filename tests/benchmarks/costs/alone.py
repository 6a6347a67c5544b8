"""Compares the engine with itself and its limits: its floor, no gate, the memory it may need."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch

from costs.clock import Piece, side_by_side
from costs.engines import LR, Ours
from costs.extent import Extent
from costs.floor import PARTS, UPDATE, Floor
from costs.items import Item, Job, Required, Row
from costs.memory import MIB, kept_bytes, peak_bytes
from costs.networks import Architecture, Entry, Subject
from costs.peer import Peer

_FLOOR = "Scope batch against the passes it cannot do without, each timed alone"
_GATE = "A gate that 95 % of clean samples stay under, against no gate"
_MEMORY = "Memory at its peak beyond network and batch, scope batch"
_QUANTILE = 0.95

Scope = Literal["batch", "sample"]


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield every comparison that needs no peer."""
    entries: tuple[Entry, ...] = ("first", "late")
    scopes: tuple[Scope, ...] = ("batch", "sample")
    for architecture in extent.networks:
        for entry in entries:
            for size in (1, extent.batch):
                label = f"floor: {architecture.name}, {entry}, batch {size}"
                yield Job(label, partial(_floor, extent, architecture, entry, size, device))
    for architecture in extent.networks:
        for scope in scopes:
            label = f"gate: {architecture.name}, scope {scope}"
            yield Job(label, partial(_gate, extent, architecture, scope, device))
    for size in (1, extent.batch):
        architecture = extent.networks[-1]
        label = f"memory: {architecture.name}, batch {size}"
        yield Job(label, partial(_memory, architecture, size, device))


def _floor(
    extent: Extent, architecture: Architecture, entry: Entry, size: int, device: torch.device
) -> list[Item]:
    subject = Subject.of(architecture, entry, device)
    images = subject.images(size)
    ours, floor = Ours(subject), Floor(subject, images)
    times = side_by_side([Piece("ours", lambda _: ours(images)), *floor.pieces()], extent.plan)
    parts = ", ".join(f"{name} {times.milliseconds(name):.3g}" for name in (*PARTS, UPDATE))
    return [
        Row(
            section=_FLOOR,
            case=f"{subject.name}, batch {size}",
            against="its passes",
            ours=times.milliseconds("ours"),
            other=times.milliseconds(*PARTS),
            ratio=times.ratio(["ours"], PARTS),
            required=Required(1.1, at_most=True),
            quartiles=times.spread(["ours"], PARTS),
            rounds=times.rounds,
            running=times.running,
            with_update=times.ratio(["ours"], [*PARTS, UPDATE]),
            note=f"ms: {parts}",
        )
    ]


def _gate(
    extent: Extent, architecture: Architecture, scope: Scope, device: torch.device
) -> list[Item]:
    subject = Subject.of(architecture, "first", device)
    norm = scope == "sample" and architecture.name != "small CNN"
    parameters = "norm" if norm else "all"
    batches = [subject.images(extent.batch, seed=1 + i) for i in range(extent.gated)]
    still = Ours(subject, steps=0, measure=True).adapt(subject.images(extent.calibration))
    assert still.distance_source is not None
    gate = still.distance_source.quantile(_QUANTILE).item()
    open_, gated = (
        Ours(subject, scope=scope, parameters=parameters, gate=limit) for limit in (None, gate)
    )
    share = _moving(gated, batches)
    pieces = [
        Piece(name, lambda _, run=run: [run(images) for images in batches], per=len(batches))  # type: ignore[misc]
        for name, run in (("gated", gated), ("open", open_))
    ]
    times = side_by_side(pieces, extent.plan)
    what = "norm layers" if norm else "all weights"
    return [
        Row(
            section=_GATE,
            case=f"{subject.name}, {what}, scope {scope}, {extent.batch} samples",
            against="no gate",
            ours=times.milliseconds("gated"),
            other=times.milliseconds("open"),
            ratio=times.ratio(["gated"], ["open"]),
            required=Required(0.5, at_most=True),
            quartiles=times.spread(["gated"], ["open"]),
            rounds=times.rounds,
            running=times.running,
            note=f"{share:.1%} of the samples lie beyond the gate",
        )
    ]


def _moving(gated: Ours, batches: list[torch.Tensor]) -> float:
    """Return the share of samples that the gate lets adapt."""
    within = [gated.adapt(images).gated for images in batches]
    return 1 - torch.cat([mask for mask in within if mask is not None]).float().mean().item()


def _memory(architecture: Architecture, size: int, device: torch.device) -> list[Item]:
    subject = Subject.of(architecture, "first", device)
    images, floor_images = subject.images(size), subject.images(size)
    module = subject.conditioned
    there = [*module.parameters(), *module.buffers(), images, floor_images]
    floor = Floor(subject, floor_images)
    weights = sum(p.numel() * p.element_size() for p in module.net.parameters())
    limit = 2 * weights + kept_bytes(floor.loss, there)
    floor.gradients(floor.loss())
    ours = peak_bytes(partial(Ours(subject), images), there)
    layer = architecture.layer("first")
    peer = Peer(subject.plain, layer, images, steps=1, lr=LR)
    peer(images)
    plain = [*subject.plain.parameters(), *subject.plain.buffers(), images]
    theirs = peak_bytes(partial(peer, images), plain)
    bounds = (
        ("2 x weights + activations", limit, Required(1.0, at_most=True)),
        ("torch-ttt", theirs, None),
    )
    return [
        Row(
            section=_MEMORY,
            case=f"{subject.name}, batch {size}",
            against=against,
            ours=ours / MIB,
            other=other / MIB,
            ratio=ours / other,
            required=required,
            unit="MiB",
            note=f"weights {weights / MIB:.1f} MiB",
        )
        for against, other, required in bounds
    ]
