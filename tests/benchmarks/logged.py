"""Holds ``it3/ms_per_sample`` against the clock: ``python tests/benchmarks/logged.py``.

A run of ``Trainer.test`` with the callback takes longer than one without. Less what a Trainer does
around the steps, which is the time of the run without the callback less that of its own steps, it
is what the callback should have logged. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any
from unittest import mock

import torch
from costs.networks import CLASSES, Architecture, Subject, resnet18, small_cnn
from costs.under_trainer import WithPriors
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import ClassPrior, FeatureInjection, Idempotence, IT3TestTimeCallback
from it3_lightning.benchmark.rendering import as_markdown
from it3_lightning.benchmark.scoring import threads

Clock = Callable[[], float]
_EVERY = Idempotence(reliability=None)  # all samples adapt, also of a network with random weights
CASES: dict[str, dict[str, Any]] = {
    "source": {"steps": 0, "measure": False},
    "batch statistics": {"steps": 0, "measure": False, "norm_stats": "batch"},
    "second prediction": {"steps": 0, "measure": False, "prediction": "second"},
    "one step": {"objective": _EVERY},
    "one step, scope `sample`": {"objective": _EVERY, "scope": "sample"},
}
BATCHES: dict[str, tuple[Callable[[], Architecture], int, int]] = {
    "small CNN": (small_cnn, 64, 10),
    "ResNet-18": (resnet18, 16, 4),
}
"""Network, images in a batch, batches."""


class Timed(WithPriors):
    """A module that knows how long its own test steps took.

    Args:
        clock: tells the seconds.
    """

    def __init__(self, clock: Clock, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clock, self.seconds = clock, 0.0

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss."""
        started = self.clock()
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))
        self.seconds += self.clock() - started


@dataclass(frozen=True)
class Row:
    """What one way to adapt logged and took.

    Args:
        case: network, batches, and the way.
        logged: milliseconds a sample, as the callback logged them, median over rounds.
        taken: the same by the time of the whole run.
        ratios: of the two, one for each round.

    >>> str(Row("a", 1.0, 1.1, (0.9, 0.95, 0.9)).ratio)
    '0.9'
    """

    case: str
    logged: float
    taken: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The median of the ratio."""
        return median(self.ratios)

    @property
    def cells(self) -> list[str]:
        """What stands in the table."""
        low, _, high = quantiles(self.ratios, n=4, method="inclusive")
        near = "yes" if 0.9 <= self.ratio <= 1.1 else "no"
        numbers = [f"{self.logged:.3g}", f"{self.taken:.3g}", f"{self.ratio:.2f}"]
        return [self.case, *numbers, f"{low:.2f} to {high:.2f}", near]


TITLES = ["under `Trainer.test`", "logged", "taken", "ratio", "quartiles", "within 10 %"]


def rows(network: str, *, rounds: int, clock: Clock) -> Iterator[Row]:
    """Yield a row for each way, all of them measured side by side.

    Args:
        network: name of one of ``BATCHES``.
        rounds: how often each is run, besides the first time.
        clock: tells the seconds that pass, or those that the process runs.
    """
    make, size, count = BATCHES[network]
    subject = Subject.of(make(), "first", torch.device("cpu"))
    images = subject.images(size * count)
    data = TensorDataset(images, torch.arange(len(images)) % CLASSES)
    module = _module(subject, clock)

    def run(arguments: dict[str, Any] | None) -> tuple[float, float]:
        """Return the seconds of a run, and those that were logged, or that its steps took."""
        callbacks = [] if arguments is None else [IT3TestTimeCallback(**arguments)]
        module.seconds = 0.0
        trainer, loader = _trainer(callbacks), DataLoader(data, batch_size=size)
        started = clock()
        (logged,) = trainer.test(module, loader, verbose=False)
        passed = clock() - started
        if arguments is None:
            return passed, module.seconds
        return passed, logged["it3/ms_per_sample"] * len(images) / 1000

    around: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in CASES}
    with ticking(clock):
        for _ in range(rounds + 1):
            passed, own = run(None)
            around.append(passed - own)
            for name, pairs in found.items():
                pairs.append(run(CASES[name]))
    each = 1000 / len(images)
    for name, pairs in found.items():  # the first round allocates, and does not count
        logged = [seconds for _, seconds in pairs[1:]]
        taken = [passed - more for (passed, _), more in zip(pairs[1:], around[1:], strict=True)]
        ratios = tuple(a / b for a, b in zip(logged, taken, strict=True))
        case = f"{network}, {count} batches of {size}: {name}"
        yield Row(case, each * median(logged), each * median(taken), ratios)


@contextmanager
def ticking(clock: Clock) -> Iterator[None]:
    """Let the callback take its times by a clock, and a Trainer keep its notices to itself."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with mock.patch("time.perf_counter", clock), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers, which the data needs none of
        yield


def _module(subject: Subject, clock: Clock) -> Timed:
    layer = f"net.{subject.architecture.layer(subject.entry)}"
    parts = {"prior": ClassPrior(CLASSES), "conditioning": FeatureInjection(layer)}
    module = Timed(clock, subject.plain, **parts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in module.it3_parts()[1].parameters():
            nn.init.normal_(parameter, std=0.3)
    return module.eval()


def _trainer(callbacks: list[Any]) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCHES, default=[*BATCHES])
    parser.add_argument("--rounds", default=9, type=int)
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine")
    given = parser.parse_args(arguments)
    clock = time.process_time if given.cpu_time else time.perf_counter
    with threads(1):
        told = [r for n in given.networks for r in rows(n, rounds=given.rounds, clock=clock)]
    sys.stdout.write(as_markdown([TITLES, *(row.cells for row in told)], left=(0,)) + "\n")


if __name__ == "__main__":
    main()
