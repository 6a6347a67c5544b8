"""How much is measured: networks, sizes, rounds."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from costs.clock import Plan
from costs.networks import Architecture, resnet18, resnet50, small_cnn, vit


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What a run of the benchmark covers.

    Args:
        name: in the results.
        plan: rounds of each comparison.
        small: a small network.
        large: a large one, with norm layers.
        extra: further ones, in the comparison of scope ``"batch"`` with the peer.
        batch: size of a large batch.
        few: samples that adapt all weights of the large network by themselves.
        gated: number of large batches that come to the gate.
        calibration: number of samples that its threshold is taken from.
        curves: rounds of each point of a curve.
        batches: batch sizes of the curves.
        steps: of the curves.
        widths: of the small network, for the curve over parameters.
        lengths: of sequences, for layers over them.
        affordable: seconds that a call may be expected to take on a curve.
    """

    name: str
    plan: Plan
    small: Architecture
    large: Architecture
    extra: tuple[Architecture, ...]
    batch: int
    few: int
    gated: int
    calibration: int
    curves: Plan
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    widths: tuple[int, ...]
    lengths: tuple[int, ...]
    affordable: float = 2.0

    @property
    def networks(self) -> tuple[Architecture, Architecture]:
        """The two that all comparisons are made on."""
        return self.small, self.large

    def by_cpu_time(self) -> Extent:
        """Return the same, timed by the seconds that the process runs."""
        plan, curves = (replace(p, clock=time.process_time) for p in (self.plan, self.curves))
        return replace(self, plan=plan, curves=curves)


FULL = Extent(
    name="full",
    plan=Plan(seconds=4.0, least=5, most=300),
    small=small_cnn(),
    large=resnet18(),
    extra=(resnet18(cifar=True),),
    batch=64,
    few=8,
    gated=4,
    calibration=512,
    curves=Plan(seconds=1.0, least=3, most=50),
    batches=(1, 4, 16, 64, 256),
    steps=(1, 2, 4, 8, 16),
    widths=(4, 8, 16, 32, 64, 128),
    lengths=(128, 256, 512, 1024, 2048, 4096),
)

QUICK = Extent(
    name="quick: too small to judge by",
    plan=Plan(seconds=0.1, least=1, most=20),
    small=small_cnn(),
    large=resnet18(),
    extra=(),
    batch=2,
    few=1,
    gated=1,
    calibration=32,
    curves=Plan(seconds=0.1, least=1, most=5),
    batches=(1, 2),
    steps=(1, 2),
    widths=(4, 16),
    lengths=(32, 64),
    affordable=0.3,
)


def large_networks() -> tuple[Architecture, ...]:
    """Return what is worth timing on a GPU only."""
    return resnet50(), vit()
