"""Small benchmarks of the digits, and made-up results: what the tests of the benchmark share."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from it3_lightning import ClassPrior, FeatureInjection
from it3_lightning.benchmark import Benchmark, Record, Results, Row, Tuned, scoring
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.distance_lines import Distances
from it3_lightning.benchmark.distances import ADAPTED, SOURCE
from it3_lightning.benchmark.tune_rules import Candidate, Rule
from it3_lightning.data import DigitsDataModule
from it3_lightning.networks import SmallCNN
from it3_lightning.tasks import IT3Classifier

SPLITS = ("train", "validation", "clean", "fog/1", "blur/1", "fog/5", "blur/5", "unseen_ages")
LINES = ["training samples", "validation", "clean", "severity 1", "severity 5", "unseen ages"]


def make_model() -> IT3Classifier:
    return IT3Classifier(
        SmallCNN(1, 10, 8, width=4, hidden=16),
        prior=ClassPrior(10),
        conditioning=FeatureInjection("network.dense1"),
    )


def digits(**sizes: int) -> DigitsDataModule:
    given: dict[str, Any] = {"train_size": 200, "test_size": 120, **sizes}
    return DigitsDataModule(shifts=("contrast",), severity=4, **given)


def benchmark(folder: Path, **arguments: object) -> Benchmark:
    settings = {"epochs": 1, "posthoc_epochs": 1, "streams": ("equal",), "accelerator": "cpu"}
    settings["controls"] = False
    return Benchmark(output=str(folder), **{**settings, **arguments})  # type: ignore[arg-type]


def scored_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list to which training and name of each row are added that is scored from now on."""
    ran: list[tuple[str, str]] = []
    plain = scoring.scored

    def noted(settings: Any, row: Row, *args: Any) -> Any:
        ran.append((row.training, row.name))
        return plain(settings, row, *args)

    monkeypatch.setattr(scoring, "scored", noted)
    return ran


def toy_results() -> Results:
    rows = [Row("ordinary", "source"), Row("ordinary", "batch statistics"), Row("ordinary", "Tent")]
    scores = {"source": (90.0, 50.0), "batch statistics": (90.0, 60.0), "Tent": (89.0, 63.0)}
    records = [
        Record("ordinary", row, "equal", seed, shift, score + 2 * seed * (row == "Tent"), 0.5, 7)
        for row, pair in scores.items()
        for seed in (0, 1)
        for shift, score in zip(("clean", "noise"), pair, strict=True)
    ]
    return Results("acc", rows, records)


def cells(markdown_table: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in markdown_table.splitlines()]


def toy_distances(
    trainings: tuple[str, ...] = ("joint", "post-hoc"), scale: float = 1.0
) -> list[Distances]:
    """Distances that grow from split to split and are halved by adaptation, of two seeds."""
    draw = np.random.default_rng(0)
    return [
        Distances(training, row, seed, split, tuple(values.tolist()))
        for training in trainings
        for seed in (0, 1)
        for place, split in enumerate(SPLITS)
        for row, factor in ((SOURCE, 1.0), (ADAPTED, 0.5))
        for values in [scale * factor * draw.lognormal(-6 + place / 2, 1, 40)]
    ]


def values_of(
    distances: list[Distances], training: str, row: str, seed: int, *splits: str
) -> list[float]:
    return [
        value
        for each in distances
        for value in each.values
        if (each.training, each.row, each.seed) == (training, row, seed) and each.split in splits
    ]


def toy_tuned(*gains: tuple[Candidate, float, float]) -> Tuned:
    """Tuned on made-up gains: candidate, on clean samples, on fog."""
    rule = Rule()
    verdicts = [rule.verdict({"clean": [a, a], "fog": [b, b]}, 0.5) for _, a, b in gains]
    return Tuned(
        title="test_acc",
        decimals=1,
        training="post-hoc",
        seeds=(0, 1),
        shifts=("fog",),
        base=Row("post-hoc", "source"),
        before={"clean": [90.0, 92.0], "fog": [60.0, 62.0]},
        candidates=tuple(candidate for candidate, *_ in gains),
        verdicts=tuple(verdicts),
        tolerated=0.5,
        rule=rule,
    )


def candidate(lr: float, mode: Any = "episodic", **recipe: Any) -> Candidate:
    own = Recipe(lr=lr, episodic_lr=lr, optimizer="adam", sharpen=1.0, **recipe)
    return Candidate(mode, own, "first", "published" if own.reliability is None else "sharpened")
