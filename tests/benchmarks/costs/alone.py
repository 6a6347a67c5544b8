"""Compares the engine with itself and its limits: its floor, no gate, the memory it may need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from costs.clock import Piece, side_by_side
from costs.engines import LR, Ours
from costs.extent import Extent
from costs.floor import BY_OPTIMIZER, LOOP, PARTS, UPDATE, Floor
from costs.items import Item, Job, Required, Row
from costs.memory import MIB, kept_bytes, peak_bytes
from costs.networks import Architecture, Entry, Subject
from costs.peer import Peer

_FLOOR = "Scope batch against the passes it cannot do without, each timed alone"
_GATE = "A gate that 95 % of clean samples stay under, against no gate"
_MEMORY = "Memory at its peak beyond network and batch, scope batch"
_SHARE = 0.95

Scope = Literal["batch", "sample"]


def jobs(extent: Extent, device: torch.device) -> Iterator[Job]:
    """Yield every comparison that needs no peer."""
    entries: tuple[Entry, ...] = ("first", "late")
    sizes = 1, extent.batch
    for architecture in extent.networks:
        for entry in entries:
            for size in sizes:
                label = f"floor: {architecture.name}, {entry}, batch {size}"
                yield Job(label, partial(_floor, extent, architecture, entry, size, device))
    gates: tuple[tuple[Scope, int], ...]
    gates = ("batch", 1), ("batch", extent.batch), ("sample", extent.batch)
    for architecture in extent.networks:
        for scope, size in gates:
            label = f"gate: {architecture.name}, scope {scope}, batch {size}"
            yield Job(label, partial(_gate, extent, architecture, scope, size, device))
    for size in sizes:
        label = f"memory: {extent.large.name}, batch {size}"
        yield Job(label, partial(_memory, extent.large, size, device))


def _floor(
    extent: Extent, architecture: Architecture, entry: Entry, size: int, device: torch.device
) -> list[Item]:
    subject = Subject.of(architecture, entry, device)
    images = subject.images(size)
    pieces = [Piece("ours", Ours(subject), lambda: images), *Floor(subject, images).pieces()]
    times = side_by_side(pieces, extent.plan)
    parts = ", ".join(f"{name} {times.milliseconds(name):.3g}" for name in (*PARTS, UPDATE))
    compared = (
        ("its passes", PARTS, f"ms: {parts}"),
        ("a plain loop", (LOOP,), "plain gradient descent, weights not put back"),
        ("a loop with torch.optim", (BY_OPTIMIZER,), "Adam, weights put back"),
    )
    row, *loops = (
        Row.timed(
            times,
            section=_FLOOR,
            case=f"{subject.name}, batch {size}",
            against=against,
            ours=["ours"],
            other=names,
            required=Required(1.1, at_most=True),
            judged=names is PARTS,
            note=note,
        )
        for against, names, note in compared
    )
    return [replace(row, with_update=times.ratio(["ours"], [*PARTS, UPDATE])), *loops]


def _gate(
    extent: Extent, architecture: Architecture, scope: Scope, size: int, device: torch.device
) -> list[Item]:
    subject = Subject.of(architecture, "first", device)
    norm = scope == "sample" and architecture is extent.large
    images = subject.images(extent.batch * (extent.gated if size > 1 else 1), seed=1)
    batches: tuple[Tensor, ...] = images.split(size)  # type: ignore[no-untyped-call]
    limit = _quantile(subject, extent.calibration)
    engines = {
        name: Ours(subject, scope=scope, parameters="norm" if norm else "all", gate=gate)
        for name, gate in (("gated", limit), ("open", None))
    }
    share = _moving(engines["gated"], batches)
    pieces = [
        Piece(name, partial(_each, run), lambda: batches, len(batches))
        for name, run in engines.items()
    ]
    what = "norm layers" if norm else "all weights"
    return [
        Row.timed(
            side_by_side(pieces, extent.plan),
            section=_GATE,
            case=f"{subject.name}, {what}, scope {scope}, batch {size}",
            against="no gate",
            ours=["gated"],
            other=["open"],
            required=Required(0.5, at_most=True),
            note=f"{share:.1%} of the samples lie beyond the gate",
        )
    ]


def _quantile(subject: Subject, number: int) -> float:
    """Return the distance that a share of images that are not timed stay under."""
    still = Ours(subject, steps=0, measure=True).adapt(subject.images(number))
    assert still.distance_source is not None
    return still.distance_source.quantile(_SHARE).item()


def _moving(gated: Ours, batches: Sequence[Tensor]) -> float:
    """Return the share of samples that the gate lets adapt."""
    within = [gated.adapt(images).gated for images in batches]
    return 1 - torch.cat([mask for mask in within if mask is not None]).float().mean().item()


def _each(run: Ours, batches: Sequence[Tensor]) -> list[Tensor]:
    return [run(images) for images in batches]


def _memory(architecture: Architecture, size: int, device: torch.device) -> list[Item]:
    subject = Subject.of(architecture, "first", device)
    images, module = subject.images(size), subject.conditioned
    floor = Floor(subject, images)
    there = [*module.parameters(), *module.buffers(), images]
    weights = sum(p.numel() * p.element_size() for p in module.net.parameters())
    limit = 2 * weights + kept_bytes(floor.loss, there)
    floor.gradients(floor.loss())
    ours = peak_bytes(partial(Ours(subject), images), there)
    peer = Peer(subject.plain, architecture.first, images, steps=1, lr=LR)
    peer(images)
    theirs = peak_bytes(
        partial(peer, images), [*subject.plain.parameters(), *subject.plain.buffers(), images]
    )
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
