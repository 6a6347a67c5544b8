"""Adapts to thousands of batches and says what grew: ``python tests/benchmarks/soak.py``.

A small CNN adapts to a stream, online, episodic and each sample by itself, under the engine and
under ``Trainer.predict``; some batches are not finite and are skipped. Memory, objects and time of
the first tenth of a run stand beside those of the last, and the module is held against what it was,
bit for bit. Needs Linux, which tells resident memory. ``results.json`` has all ten tenths.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from costs.engines import Ours
from costs.networks import Architecture, Subject, small_cnn
from costs.under_trainer import module_of
from lightning.pytorch import Callback, Trainer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from it3_lightning import Idempotence, IT3TestTimeCallback
from it3_lightning.benchmark.scoring import quiet, threads

TENTHS = 10
MOST_MIB, MOST_OBJECTS, MOST_TENSORS = 2.0, 32, 16  # that may be added, whatever the batches
MOST_TIME = 1.25  # times as long
_CPU = torch.device("cpu")
_EVERY = 50  # batches, of which one is not finite
_ONLINE: dict[str, Any] = {"reset": "never", "anchor": "ema"}
ENGINE: dict[str, dict[str, Any]] = {
    "online": _ONLINE,
    "online, polyak": {**_ONLINE, "optimizer": "polyak", "lr": 0.5},
    "episodic": {},
    "episodic, 2 steps": {"steps": 2},
    "sample, loop": {"scope": "sample", "backend": "loop"},
    "sample, vectorised": {"scope": "sample", "backend": "vectorised"},
    "gate": {"gate": 0.5},  # a quantile, as in a Trainer
}
TRAINER: dict[str, dict[str, Any] | None] = {
    "no callback": None,
    "online": _ONLINE,
    "episodic": {},
    "sample": {"scope": "sample"},
    "gate": {"gate": 0.5},
    "mean": {"prediction": "mean"},
}


@dataclass(frozen=True)
class Mark:
    """What a process holds after a tenth of a run, and what a batch of that tenth took.

    Args:
        mib: resident memory.
        objects: that the garbage collector knows, made since the run began.
        tensors: of them.
        ms: of CPU time a batch.
        plain: the same of a plain forward and backward, run after each batch: a busy machine slows
            both. Of both the lower quartile.
    """

    mib: float
    objects: int
    tensors: int
    ms: float
    plain: float


@dataclass(frozen=True)
class Soak:
    """A run, tenth by tenth.

    Args:
        case: what adapted, and how.
        batches: that it saw.
        marks: one for each tenth.
        moved: share of the samples that moved weights; ``None`` where nothing adapts.
        left: names of what the module is not bitwise what it was in.
    """

    case: str
    batches: int
    marks: tuple[Mark, ...]
    moved: float | None
    left: tuple[str, ...]

    @property
    def added(self) -> Mark:
        """What the last tenth holds beyond the first; of the times, times as long."""
        a, b = self.marks[0], self.marks[-1]
        grown = b.mib - a.mib, b.objects - a.objects, b.tensors - a.tensors
        return Mark(*grown, b.ms / a.ms, b.plain / a.plain)

    @property
    def slower(self) -> float:
        """How many times as long a batch takes, where plain passes take as long as before."""
        return self.added.ms / self.added.plain

    @property
    def faults(self) -> list[str]:
        """Name what grew or was left behind, or that nothing adapted."""
        added = self.added
        found = {
            "memory": added.mib > MOST_MIB,
            "objects": added.objects > MOST_OBJECTS,
            "tensors": added.tensors > MOST_TENSORS,
            "time": self.slower > MOST_TIME,
            "module": bool(self.left),
            "nothing moved": self.moved == 0,
        }
        return [name for name, grew in found.items() if grew]


class Log:
    """Takes a mark at the end of each tenth of a run; counts objects made within it.

    Args:
        batches: of the run, a multiple of ten.
        network: a copy of it runs plain passes beside, on the images.
        images: a batch.
    """

    def __init__(self, batches: int, network: nn.Module, images: Tensor) -> None:
        self.marks: list[Mark] = []
        self._network, self._images = copy.deepcopy(network), images
        self._tenth = batches // TENTHS
        self._times = [0.0] * self._tenth  # as long as they will be: the log must not grow
        self._plain = [0.0] * self._tenth
        self._seen = 0
        self._since = time.process_time()

    def __enter__(self) -> Self:
        """Look at no object that is there before."""
        gc.collect()
        gc.freeze()
        return self

    def __exit__(self, *_: object) -> None:
        """Look at all again."""
        gc.unfreeze()

    def batch(self) -> None:
        """Note the end of a batch."""
        ended, place = time.process_time(), self._seen % self._tenth
        self._times[place] = ended - self._since
        with torch.inference_mode(False), torch.enable_grad():
            loss = self._network(self._images.clone()).square().mean()
            torch.autograd.grad(loss, list(self._network.parameters()), allow_unused=True)
            del loss
        self._plain[place] = time.process_time() - ended
        self._seen += 1
        if self._seen % self._tenth == 0:
            self.marks.append(self._mark())
        self._since = time.process_time()

    def _mark(self) -> Mark:
        gc.collect()
        known = gc.get_objects()
        tensors = sum(issubclass(type(each), Tensor) for each in known)
        ms, plain = (1000 * sorted(t)[len(t) // 4] for t in (self._times, self._plain))
        return Mark(resident_mib(), len(known) - len(self.marks), tensors, ms, plain)


class Marks(Callback):
    """Takes the marks of a Trainer's run."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def on_predict_batch_end(self, *_: Any) -> None:
        """Note the end of a batch."""
        self._log.batch()


class Stream(IterableDataset[Tensor]):
    """Draws batches of images without end; one in fifty is not finite.

    Args:
        batches: how many.
        shape: of a batch.
    """

    def __init__(self, batches: int, shape: Sequence[int]) -> None:
        self._batches = batches
        self._shape = tuple(shape)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for index in range(self._batches):
            images = torch.randn(self._shape, generator=generator)
            if index % _EVERY == _EVERY // 2:
                images[0] = torch.nan
            yield images


def resident_mib() -> float:
    """Return the memory that the process holds, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def identity(module: nn.Module) -> dict[str, Any]:
    """Note what a module is: bits of its tensors, flags, modes, hooks, names of attributes."""
    noted: dict[str, Any] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        bits = tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        noted[name] = bits, tensor.dtype, tensor.requires_grad, id(tensor.grad), tensor.data_ptr()
    for name, layer in module.named_modules():
        own = vars(layer)
        hooks = {key: {**own[key]} for key in own if key.endswith("hooks")}
        noted[f"layer {name!r}"] = layer.training, sorted(own), hooks
    return noted


def left_in(module: nn.Module, before: dict[str, Any]) -> tuple[str, ...]:
    """Name what is not what it was."""
    after = identity(module)
    return tuple(name for name in {**before, **after} if before.get(name) != after.get(name))


def under_engine(name: str, architecture: Architecture, batches: int, size: int) -> Soak:
    """Adapt a network in plain torch."""
    subject = Subject.of(architecture, "late", _CPU)
    settings, moved = ENGINE[name], 0
    if "gate" in settings:
        known = Ours(subject, measure=True).adapt(subject.images(32)).distance_source
        assert known is not None
        settings = {"gate": float(known.quantile(settings["gate"]))}
    before, engine = identity(subject.conditioned), Ours(subject, **settings)
    with Log(batches, subject.plain, subject.images(size)) as log:
        for images in Stream(batches, (size, *architecture.shape)):
            reliable = engine.adapt(images).reliable
            moved += 0 if reliable is None else int(reliable.sum())
            log.batch()
    left, share = left_in(subject.conditioned, before), moved / (batches * size)
    return Soak(f"engine, {name}", batches, tuple(log.marks), share, left)


def under_trainer(name: str, architecture: Architecture, batches: int, size: int) -> Soak:
    """Let a Trainer predict a stream."""
    subject, settings = Subject.of(architecture, "late", _CPU), TRAINER[name]
    module = module_of(Subject.of(architecture, "late", _CPU))
    published = Idempotence(reliability=None)
    adapting = IT3TestTimeCallback(objective=published, **settings or {})
    callbacks = [adapting] if settings is not None else []

    def loader(count: int) -> DataLoader[Tensor]:
        return DataLoader(Stream(count, (size, *architecture.shape)), batch_size=None)

    _trainer(*callbacks).validate(module, loader(16), verbose=False)  # calibrates a gate
    _trainer().predict(module, loader(1))  # what Lightning itself keeps on a module
    before = identity(module)
    with Log(batches, subject.plain, subject.images(size)) as log:
        trainer = _trainer(*callbacks, Marks(log))
        trainer.predict(module, loader(batches), return_predictions=False)
    share = None if settings is None else adapting.summary.moved / (batches * size)
    return Soak(f"Trainer, {name}", batches, tuple(log.marks), share, left_in(module, before))


def _trainer(*callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def soaked(
    architecture: Architecture, batches: int, size: int, only: str, tell: Callable[[Soak], object]
) -> list[Soak]:
    """Make the runs whose name has these words in it, one after the other; tell of each."""
    found: list[Soak] = []
    for runner, cases in ((under_engine, ENGINE), (under_trainer, TRAINER)):
        for name in cases:
            if only in f"{runner.__name__.removeprefix('under_')}, {name}":
                found.append(runner(name, architecture, batches, size))
                tell(found[-1])
    return found


def table(found: Sequence[Soak]) -> Table:
    """Return a table of the runs, the last tenth of each beside its first."""
    made = Table(title="The last tenth of each run beside the first", box=SIMPLE, padding=(0, 0))
    made.add_column("case", no_wrap=True)
    for title in ("MiB", "added", "objects", "tensors", "ms", "times", "module", "verdict"):
        made.add_column(title, justify="left" if title in ("module", "verdict") else "right")
    for soak in found:
        first, added = soak.marks[0], soak.added
        made.add_row(
            soak.case,
            f"{first.mib:.0f}",
            f"{added.mib:+.2f}",
            f"{added.objects:+}",
            f"{added.tensors:+}",
            f"{first.ms:.2f}",
            f"{soak.slower:.2f}",
            "changed" if soak.left else "bitwise",
            ", ".join(soak.faults) or "flat",
        )
    return made


def verdict(found: Sequence[Soak]) -> str:
    """Say in a line what came of all runs."""
    bad = [f"{soak.case} ({', '.join(soak.faults)})" for soak in found if soak.faults]
    batches = f"{len(found)} runs of {found[0].batches:,} batches"
    if bad:
        return f"{batches}, not flat: {'; '.join(bad)}."
    return f"{batches}: memory and time flat, modules bitwise what they were."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print a table and a verdict, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default=5000, type=int, help="of each run, a multiple of ten")
    parser.add_argument("--size", default=4, type=int, help="images in a batch")
    parser.add_argument("--only", default="", metavar="WORDS", help="such as 'Trainer, online'")
    parser.add_argument("--output", default=Path("results/soak"), type=Path, help="folder")
    given = parser.parse_args(arguments)
    if given.batches < TENTHS or given.batches % TENTHS:
        parser.error(f"expected --batches that divide into tenths, got {given.batches}")
    console = Console(width=100, highlight=False)
    with threads(1), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batches that are not finite, and of few workers
        net = small_cnn(4, 16)
        found = soaked(net, given.batches, given.size, given.only, lambda s: console.print(s.case))
    given.output.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(soak), "faults": soak.faults} for soak in found]
    (given.output / "results.json").write_text(json.dumps(rows, indent=1))
    console.print(table(found))
    console.print(verdict(found))


if __name__ == "__main__":
    main()
