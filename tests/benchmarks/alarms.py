"""Counts false alarms of ``gate="bet"``, and the samples it takes to find a shift.

``python tests/benchmarks/alarms.py`` trains a small CNN on Fashion-MNIST, measures its distances on
validation samples, test samples and their shifts, and bets along streams of them: the clean test
samples in many orders, alone and drawn anew together with the validation samples; a clean stream
that turns into a shifted one; and clean streams in orders that are not exchangeable. Then whole
streams are predicted with a method and no gate, and behind the gate. ``--digits`` takes
scikit-learn's digits and half a minute. With ``--output``, ``results.json`` there has all of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from it3_lightning import (
    ClassPrior,
    FeatureInjection,
    Idempotence,
    IT3TestTimeCallback,
    Tent,
    TestTimeCallback,
)
from it3_lightning.benchmark.scoring import quiet, threads
from it3_lightning.data import (
    DigitsDataModule,
    FashionMNISTDataModule,
    ShiftedImages,
    correlated_stream,
    unequal_stream,
)
from it3_lightning.engine.betting import ConformalMartingale
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import IT3Classifier

DELTAS = (0.1, 0.05, 0.01)
METHODS: dict[str, Any] = {"js": Idempotence("js"), "entropy": Tent()}
_STEP = 100  # distances at once, while nothing is found


@dataclass(frozen=True)
class Found:
    """What came of betting on one distance.

    Args:
        distance: that was bet on.
        orders: of the clean test samples.
        alarms: for each delta, false alarms where the test samples were put in these orders.
        redrawn: the same where validation and test samples were drawn anew as well.
        delays: for each shift, samples from its beginning to the alarm, in each order; ``None``:
            not found.
        sorted: for each stream that is not exchangeable, samples to the alarm, in each order.
    """

    distance: str
    orders: int
    alarms: dict[float, int]
    redrawn: dict[float, int]
    delays: dict[str, list[int | None]]
    sorted: dict[str, list[int | None]]


def alarm(begin: ConformalMartingale, stream: Sequence[float], delta: float) -> int | None:
    """Return the number of samples after which a bet has reached ``1 / delta``.

    >>> alarm(ConformalMartingale.of(range(100)), [50.0, *range(100, 120)], 0.01)
    4
    """
    martingale, enough = begin, 1 / delta
    for start in range(0, len(stream), _STEP):
        part = stream[start : start + _STEP]
        after = martingale.after(part)
        if after.highest >= enough:
            for place, distance in enumerate(part, start + 1):
                martingale = martingale.after([distance])
                if martingale.highest >= enough:
                    return place
        martingale = after
    return None


def false_alarms(
    known: list[float], test: list[float], orders: int, *, redrawn: bool
) -> dict[float, int]:
    """Return for each delta in how many orders of clean samples there is an alarm."""
    highest, generator = [], Random(0)
    for _ in range(orders):
        some = generator.sample(known + test, len(known) + len(test)) if redrawn else known
        rest = some[len(known) :] if redrawn else generator.sample(test, len(test))
        highest.append(ConformalMartingale.of(some[: len(known)]).after(rest).highest)
    return {delta: sum(value >= 1 / delta for value in highest) for delta in DELTAS}


def delays(
    known: list[float], clean: list[float], shifted: list[float], orders: int, before: int
) -> list[int | None]:
    """Return after how many shifted samples a bet finds them, after so many clean ones."""
    found, begin, generator = [], ConformalMartingale.of(known), Random(0)
    for _ in range(orders):
        stream = generator.sample(clean, before) + generator.sample(shifted, len(shifted))
        at = alarm(begin, stream, DELTAS[-1])
        found.append(None if at is None else at - before)  # a false alarm is negative
    return found


def in_order(labels: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Return streams of clean samples that are not exchangeable, as indices."""
    mixed = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = torch.randperm(10, generator=torch.Generator().manual_seed(seed))
    return {
        "sorted by class": mixed[classes[labels[mixed]].argsort(stable=True)],
        "correlated": correlated_stream(labels, seed),
        "unequal classes": unequal_stream(labels, seed),
    }


# Distances


def trained(args: argparse.Namespace) -> tuple[IT3Classifier, ShiftedImages]:
    """Return a network and its data."""
    seed_everything(0, verbose=False)
    given: dict[str, Any] = {"severity": args.severity}
    data: ShiftedImages = (
        DigitsDataModule(val_size=400, **given)
        if args.digits
        else FashionMNISTDataModule(
            root=args.root, train_size=25_000, val_size=4_000, test_size=5_000, **given
        )
    )
    network = SmallCNN(in_channels=1, num_classes=10, image_size=8 if args.digits else 28)
    layers = ["network.dense1", "network.dense2"]
    conditioning = FeatureInjection(layer=layers, mode=["add", "film"])
    model = IT3Classifier(network, prior=ClassPrior(10), conditioning=conditioning)
    trainer(max_epochs=args.epochs, limit_val_batches=0).fit(model, datamodule=data)
    return model, data


def trainer(*callbacks: Any, **kwargs: Any) -> Trainer:
    """Return a Trainer that writes nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    given: dict[str, Any] = {**dict.fromkeys(off, False), "accelerator": "cpu", **kwargs}
    return Trainer(callbacks=list(callbacks), **given)


def measured(
    model: IT3Classifier, data: ShiftedImages, method: Any
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the distances of the validation samples, and of each test loader by its name."""
    bets = TestTimeCallback(method, gate="bet")
    trainer(bets).validate(model, datamodule=data, verbose=False)
    known: list[float] = model.it3_calibration.reference["distances"].tolist()
    still = TestTimeCallback(method, steps=0, norm_stats="source")
    trainer(still).test(model, datamodule=data, verbose=False)
    distances = (values.tolist() for values in still.summary.distances)
    return known, dict(zip(data.test_names, distances, strict=True))


def labels_of(data: ShiftedImages) -> torch.Tensor:
    """Return the labels of the clean test samples."""
    return torch.cat([labels for _, labels in data.test_dataloader()[0]])


def found(model: IT3Classifier, data: ShiftedImages, name: str, args: argparse.Namespace) -> Found:
    """Bet on one distance along all streams."""
    known, tests = measured(model, data, METHODS[name])
    clean, labels = tests.pop("clean"), labels_of(data)
    few = range(args.few)
    ordered = [in_order(labels, seed) for seed in few]
    begin = ConformalMartingale.of(known)

    def first(stream: str, seed: int) -> int | None:
        rows = ordered[seed][stream].tolist()
        return alarm(begin, [clean[row] for row in rows], DELTAS[-1])

    return Found(
        distance=name,
        orders=args.orders,
        alarms=false_alarms(known, clean, args.orders, redrawn=False),
        redrawn=false_alarms(known, clean, args.orders, redrawn=True),
        delays={
            shift: delays(known, clean, shifted, args.few, args.clean)
            for shift, shifted in tests.items()
        },
        sorted={stream: [first(stream, seed) for seed in few] for stream in ordered[0]},
    )


# Accuracy


def accuracies(model: IT3Classifier, data: ShiftedImages) -> dict[str, dict[str, float]]:
    """Return the accuracy on clean streams and shifts: source, a method, and behind the gate."""
    (clean, *shifted), labels = data.test_dataloader(), labels_of(data)
    orders = {"clean": torch.arange(len(labels)), **in_order(labels, 0)}
    given: dict[str, Any] = {"batch_size": 100, "collate_fn": clean.collate_fn}
    samples: Any = clean.dataset
    loaders = {name: DataLoader(samples.select(rows), **given) for name, rows in orders.items()}
    loaders.update(zip(data.test_names[1:], shifted, strict=True))
    callbacks = {
        "source": IT3TestTimeCallback(steps=0),
        "Tent": TestTimeCallback(Tent()),
        "Tent, gate='bet'": TestTimeCallback(Tent(), gate="bet"),
    }
    trainer(callbacks["Tent, gate='bet'"]).validate(model, datamodule=data, verbose=False)
    table: dict[str, dict[str, float]] = {}
    for name, callback in callbacks.items():
        scores = trainer(callback).test(model, list(loaders.values()), verbose=False)
        for stream, logged in zip(loaders, scores, strict=True):
            (key,) = (key for key in logged if "acc" in key)
            table.setdefault(stream, {})[name] = 100 * logged[key]
    return table


# What it prints


def shown(results: Sequence[Found], accuracy: dict[str, dict[str, float]], clean: int) -> None:
    """Print the tables."""
    console = Console(width=100)
    alarms = Table("distance", *(f"delta {delta:g}" for delta in DELTAS), box=SIMPLE)
    for each in results:
        for name, counts in (("test alone", each.alarms), ("all anew", each.redrawn)):
            alarms.add_row(f"{each.distance}, {name}", *map(str, counts.values()))
    console.print(f"False alarms in {results[0].orders} orders of the clean test samples", alarms)
    names = [each.distance for each in results]
    late = Table("shift", *names, box=SIMPLE)
    for shift in results[0].delays:
        late.add_row(shift, *(_spread(each.delays[shift]) for each in results))
    note = f"after {clean} clean ones, delta {DELTAS[-1]:g}"
    console.print(f"Samples from the beginning of a shift to the alarm, {note}", late)
    rows = Table("clean stream", *names, box=SIMPLE)
    for stream in results[0].sorted:
        rows.add_row(stream, *(_spread(each.sorted[stream]) for each in results))
    console.print("Samples to the alarm on clean streams that are not exchangeable", rows)
    scores = Table("stream", *next(iter(accuracy.values())), box=SIMPLE)
    for stream, values in accuracy.items():
        scores.add_row(stream, *(f"{value:.1f}" for value in values.values()))
    console.print("Accuracy in percent, in batches of 100", scores)


def _spread(values: Sequence[int | None]) -> str:
    """Return the median and the range of what was found, and how often nothing was.

    >>> _spread([3, 1, None, 2])
    '2 (1 to 3), never in 1 of 4'
    """
    known = sorted(value for value in values if value is not None)
    never = f"never in {len(values) - len(known)} of {len(values)}"
    if not known:
        return never
    told = f"{statistics.median_low(known)} ({known[0]} to {known[-1]})"
    return told if len(known) == len(values) else f"{told}, {never}"


def main(given: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist", help="IDX files")
    parser.add_argument("--digits", action="store_true", help="scikit-learn's digits instead")
    parser.add_argument("--severity", type=int, default=3, help="of the shifts, 1 to 5")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--orders", type=int, default=200, help="of the clean test samples")
    parser.add_argument("--few", type=int, default=20, help="orders of every other stream")
    parser.add_argument("--clean", type=int, default=1000, help="samples before a shift")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(given)
    with quiet(), threads(1):
        model, data = trained(args)
        results = [found(model, data, name, args) for name in METHODS]
        accuracy = accuracies(model, data)
    shown(results, accuracy, args.clean)
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        kept = {"bets": [asdict(each) for each in results], "accuracy": accuracy}
        (args.output / "results.json").write_text(json.dumps(kept, indent=2))


if __name__ == "__main__":
    main()
