"""Times this version beside another: ``python tests/benchmarks/versions.py CHECKOUT``.

Both are loaded in one process and run in turns, on the same networks and images. The other version
comes from a checkout, such as ``git worktree add ../before v0.1.0`` makes. Prints, for every case,
the time of both and how many times as fast this one is.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from costs.clock import Piece, Plan, side_by_side
from costs.floor import BY_OPTIMIZER, LOOP, Floor
from costs.networks import CLASSES, Architecture, Entry, Subject, resnet18, small_cnn
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from it3_lightning.benchmark.run import threads  # type: ignore[attr-defined]  # in old versions too

NAME = "it3_lightning"
Run = Callable[[Any], object]


class Version:
    """A version of the package, loaded beside any other.

    Args:
        folder: of its checkout; ``None``: the one that is installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._modules: dict[str, ModuleType] = {}
        with self.active():
            self.package = importlib.import_module(NAME)
            self.engine = importlib.import_module(f"{NAME}.engine")
            for module in ("tasks", "conditioning", "priors"):
                importlib.import_module(f"{NAME}.{module}")

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let imports within find this version."""
        before = {n: sys.modules.pop(n) for n in list(sys.modules) if n.split(".")[0] == NAME}
        sys.modules.update(self._modules)
        if self._folder is not None:
            sys.path.insert(0, str(self._folder))
        importlib.invalidate_caches()
        try:
            yield
        finally:
            found = {n: m for n, m in sys.modules.items() if n.split(".")[0] == NAME}
            self._modules = found
            for name in found:
                del sys.modules[name]
            sys.modules.update(before)
            if self._folder is not None:
                sys.path.remove(str(self._folder))

    def engine_on(self, subject: Subject, **settings: Any) -> Run:
        """Return what adapts to images and predicts, one step of Adam, nothing measured."""
        with self.active():
            package = self.package
            given = {"objective": package.Idempotence(reliability=None), "lr": 1e-4}
            made = package.Settings(**{**given, "measure": False, **settings})
            adapter = self.engine.adapter(
                subject.conditioned,
                subject.conditioned,
                package.ClassPrior(CLASSES).from_output,
                made,
                enters={subject.conditioned.enters: "output"},
            )

            answer = self.plain(subject)

        def run(images: Tensor) -> object:
            with adapter.adapted(images, answer) as adaptation:
                return adaptation.outputs

        with self.active():  # whatever is imported at the first run
            run(subject.images(1))
        return run

    def plain(self, subject: Subject) -> Any:
        """Return the neutral pass as an answer."""
        for name in ("types", "samples"):
            try:
                module = importlib.import_module(f"{NAME}.engine.{name}")
            except ImportError:
                continue
            if hasattr(module, "Plain"):
                return module.Plain(subject.conditioned)
        raise ImportError("this version has no plain answer")

    def trainer_on(self, subject: Subject, loader: DataLoader[Any]) -> Run:
        """Return what predicts under a Trainer, scope ``sample``, with the defaults."""
        with self.active():
            sys.modules.pop("costs.under_trainer", None)
            under = importlib.import_module("costs.under_trainer")
            sys.modules.pop("costs.under_trainer", None)
            module = under.module_of(subject)

        def run(_: object) -> object:
            with self.active():
                return under.predict(module, loader, "cpu")

        return run


def cases() -> Iterator[tuple[str, Architecture, Entry, int, dict[str, Any]]]:
    """Yield what is timed: a name, a network, where the prior enters, how many, settings."""
    small, large = small_cnn(), resnet18()
    entries: tuple[Entry, ...] = ("first", "late")
    for entry in entries:
        for architecture in (small, large):
            for size in (1, 2, 64):
                yield "scope batch, Adam", architecture, entry, size, {}
    for architecture in (small, large):
        yield "scope batch, Polyak", architecture, "first", 16, {"lr": 0.5, "optimizer": "polyak"}
        yield "scope batch, 3 steps", architecture, "first", 16, {"steps": 3}
    by_sample = {"scope": "sample", "backend": "vectorised"}
    for entry in entries:
        yield "scope sample", small, entry, 64, by_sample
        yield "scope sample, norm", large, entry, 64, {**by_sample, "parameters": "norm"}
        yield "scope sample", large, entry, 8, by_sample
    yield "scope sample, loop", small, "first", 16, {"scope": "sample", "backend": "loop"}


def compared(
    other: Version, plan: Plan, only: str
) -> Iterator[tuple[str, float, float, float, str]]:
    """Yield for each case its name, milliseconds here and there, their ratio, and a note."""
    this = Version(None)
    device = torch.device("cpu")
    for name, architecture, entry, size, settings in cases():
        subject = Subject.of(architecture, entry, device)
        label = f"{name}: {subject.name}, {size}"
        if only not in label:
            continue
        images = subject.images(size)
        runs = {"here": this.engine_on(subject, **settings)}
        runs["there"] = other.engine_on(subject, **settings)
        pieces = [Piece(key, run, lambda images=images: images) for key, run in runs.items()]  # type: ignore[misc]
        floor = Floor(subject, images).pieces() if not settings and size <= 2 else []
        pieces += [piece for piece in floor if piece.name in (LOOP, BY_OPTIMIZER)]
        times = side_by_side(pieces, plan)
        loops = ", ".join(
            f"{times.ratio(['here'], [name]):.2f} x a {name}"
            for name in ((LOOP, BY_OPTIMIZER) if floor else ())
        )
        yield label, *_both(times), loops
    for batches in (4, 40) if only in "Trainer.predict" else ():
        subject = Subject.of(small_cnn(), "first", device)
        loader: DataLoader[Any] = DataLoader(subject.images(batches * 64), batch_size=64)  # type: ignore[arg-type]
        runs = {"here": this.trainer_on(Subject.of(small_cnn(), "first", device), loader)}
        runs["there"] = other.trainer_on(Subject.of(small_cnn(), "first", device), loader)
        times = side_by_side([Piece(key, run) for key, run in runs.items()], plan)
        yield f"Trainer.predict, scope sample, {batches} batches of 64", *_both(times), ""


def _both(times: Any) -> tuple[float, float, float]:
    here, there = times.milliseconds("here"), times.milliseconds("there")
    return here, there, times.ratio(["there"], ["here"])


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="folder of the other version")
    parser.add_argument("--seconds", default=4.0, type=float, help="for each comparison")
    parser.add_argument("--only", default="", help="cases whose name has these words in it")
    parser.add_argument("--least", default=5, type=int, help="rounds, whatever the seconds")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine")
    given = parser.parse_args()
    table = Table("case", "here, ms", "there, ms", "times as fast", "", title="This version first")
    console = Console(width=120)
    with threads(1):
        other = Version(given.checkout.resolve())
        clock = time.process_time if given.cpu_time else time.perf_counter
        plan = Plan(given.seconds, given.least, 300, clock)
        for label, here, there, ratio, note in compared(other, plan, given.only):
            table.add_row(label, f"{here:.3g}", f"{there:.3g}", f"{ratio:.2f}", note)
            console.print(f"{label}: {here:.3g} {there:.3g} {ratio:.2f} {note}", highlight=False)
    console.print(table)


if __name__ == "__main__":
    main()
