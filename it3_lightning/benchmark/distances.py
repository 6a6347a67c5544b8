"""Idempotence distances: measured on every split, kept in files, and judged as shift detectors.

The distance is small on data like that of training and grows with shift (Durasov et al., IT3, ICML
2025, and ZigZag, TMLR 2024); adaptation makes it smaller. As a detector of shift it stands beside
the confidence, by the area under the ROC curve: 50 is no separation at all.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.benchmark.distance_lines import Distances
from it3_lightning.benchmark.kept import kept, rebuilt
from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Row, Training
from it3_lightning.data import ShiftedData
from it3_lightning.data.sampling import sampled
from it3_lightning.data.shifts import SEVERITIES
from it3_lightning.engine import Settings
from it3_lightning.methods import Idempotence
from it3_lightning.predictor import IT3Predictor
from it3_lightning.priors import ClassPrior
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.files import write_json

SOURCE, STATISTICS, ADAPTED = "source", "batch statistics", "default objective, episodic"
DISTANCE, CONFIDENCE = "distance", "1 - confidence"
_TRAININGS = ("joint", "post-hoc")  # those whose distances are told
_DIGITS = 6  # significant ones that a file holds: float32 has about as many
_Loader = DataLoader[Any]


def keep_distances(
    benchmark: BenchmarkSettings,
    models: Mapping[Training, IT3Mixin],
    rows: Iterable[Row],
    data: ShiftedData,
    fingerprint: str,
) -> tuple[list[Record], list[Distances]]:
    """Measure separations and distances of a seed on the benchmark's device, and write them.

    Args:
        benchmark: settings.
        models: see :func:`measured`.
        rows: see :func:`measured`.
        data: see :func:`measured`.
        fingerprint: of the settings.
    """
    device = benchmark.trainer().strategy.root_device
    told = separations(models, data, Idempotence(benchmark.recipe.distance))
    found = measured(models, rows, data, benchmark.distance_samples, device)
    content = {
        "fingerprint": fingerprint,
        "separations": [asdict(each) for each in told],
        "distances": [asdict(each) for each in found],
    }
    write_json(_file(Path(benchmark.output), data.seed), content)
    return told, found


def kept_distances(
    folder: Path, seed: int, fingerprint: str
) -> tuple[list[Record], list[Distances]] | None:
    """Return what was written for a seed; ``None`` where it is to be measured."""

    def read(content: dict[str, Any]) -> tuple[list[Record], list[Distances]]:
        told = [rebuilt(Record, saved) for saved in content["separations"]]
        return told, [rebuilt(Distances, saved) for saved in content["distances"]]

    return kept(_file(folder, seed), fingerprint, read)


def _file(folder: Path, seed: int) -> Path:
    return folder / f"distances_seed_{seed}.json"


def measured(
    models: Mapping[Training, IT3Mixin],
    rows: Iterable[Row],
    data: ShiftedData,
    size: int,
    device: torch.device,
) -> list[Distances]:
    """Measure the distances of some samples of every split.

    Args:
        models: by training; the ordinary one knows no second prediction.
        rows: of the benchmark, among them the default objective, episodic, of each training.
        data: with the seed set.
        size: samples of a split, see :func:`splits`; 0: none.
        device: where to measure.
    """
    if size == 0:
        return []
    on = (row for row in rows if row.training in _TRAININGS)
    adapted = {row.training: row.settings for row in on if row.name == ADAPTED}
    homes = {training: models[training].device for training in adapted}
    found = []
    try:
        meters = {t: _Meter(models[t], s, device) for t, s in adapted.items() if s is not None}
        with closing(splits(data, size)) as parts:
            for split, loader in parts:
                values = _of_loader(meters, loader)
                found += [Distances(*key, data.seed, split, v) for key, v in values.items()]
    finally:
        for training, home in homes.items():
            models[training].to(home)
    return found


def splits(data: ShiftedData, size: int) -> Generator[tuple[str, _Loader]]:
    """Yield name and loader of some samples of every split; one severity at a time is in memory.

    The names are ``"train"``, ``"validation"``, ``"clean"``, then those of the shifts, with their
    severity where they have one: ``"fog/1"`` to ``"fog/5"``. Classes are as frequent as they are,
    batches those of tests. All shifts of a severity share its samples in equal parts, whole
    batches at that, and at least one of each.

    Args:
        data: as it is to be left; close the iterator if it is not used up.
        size: samples of a split, of a severity, and of any other shift: at most this many, but for
            the last sentence above.
    """
    before = data.severity, data.stream
    data.stream = "equal"
    try:
        clean = data.test_dataloader()[0]
        batch_size = clean.batch_size or 1

        def some(loader: _Loader, most: int = size) -> _Loader:
            return sampled(loader, most, batch_size=batch_size, seed=data.seed)

        yield "train", some(data.plain_train_dataloader())
        yield "validation", some(data.val_dataloader())
        yield "clean", some(clean)
        batches = size // batch_size // max(len(data.shifts), 1)
        for name, loader in _shifted(data):
            graded = "/" in name
            yield name, some(loader, max(batches, 1) * batch_size if graded else size)
    finally:
        data.severity, data.stream = before


def separations(
    models: Mapping[Training, IT3Mixin], data: ShiftedData, objective: Idempotence
) -> list[Record]:
    """Return a record for each training on priors, shift and score, in percent.

    Args:
        models: by training; the ordinary one knows no second prediction.
        data: clean and shifted samples, with the stream and the seed set.
        objective: measures the distance.
    """
    return [
        record
        for training, model in models.items()
        if training in _TRAININGS
        for record in _of_model(model, training, data, objective)
    ]


class _Meter:
    """Measures the distances of a batch with one trained model, in every row.

    Args:
        model: that is measured, moved to the device.
        settings: of the adaptation.
        device: where to measure.
    """

    def __init__(self, model: IT3Mixin, settings: Settings, device: torch.device) -> None:
        self._model = model
        adapting = replace(settings, measure=True)
        self._adapting = IT3Predictor(model, adapting, device=device)
        self._still: IT3Predictor | None = None
        if settings.norm_stats == "batch":
            self._still = IT3Predictor(model, replace(adapting, steps=0, norm_stats="source"))

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        """Return distances ``(B,)`` by the name of the row."""
        inputs = self._model.it3_inputs(batch)
        prediction = self._adapting(inputs)
        if self._still is None:
            found = {SOURCE: prediction.distance}
        else:
            found = {SOURCE: self._still(inputs).distance, STATISTICS: prediction.distance}
        return {**found, ADAPTED: prediction.distance_adapted}


def _of_loader(
    meters: Mapping[Training, _Meter], loader: Iterable[Any]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """Return the distances of all samples of a loader, by training and row."""
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for batch in loader:
        for training, meter in meters.items():
            for row, distance in meter(batch).items():
                parts.setdefault((training, row), []).append(distance.cpu())
    return {key: _numbers(torch.cat(values)) for key, values in parts.items()}


def _numbers(distance: Tensor) -> tuple[float, ...]:
    known = distance[distance.isfinite()].tolist()
    return tuple(float(f"{value:.{_DIGITS}g}") for value in known)


def _shifted(data: ShiftedData) -> Iterator[tuple[str, _Loader]]:
    """Yield the loaders of every shift at every severity, and once those that have none."""
    if data.severity is None:
        yield from list(zip(data.test_names, data.test_dataloader(), strict=True))[1:]
        return
    for severity in SEVERITIES:
        data.severity = severity
        loaders = dict(zip(data.test_names, data.test_dataloader(), strict=True))
        yield from ((f"{name}/{severity}", loaders[name]) for name in data.shifts)
    yield from ((name, loaders[name]) for name in data.test_names[1:] if name not in data.shifts)


def _of_model(
    model: IT3Mixin, training: Training, data: ShiftedData, objective: Idempotence
) -> list[Record]:
    predictor = IT3Predictor(model, Settings(objective=objective, steps=0))
    clean, *shifted = [_scores(predictor, model, loader) for loader in data.test_dataloader()]
    return [
        Record(
            training, name, data.stream, data.seed, shift, _auroc(clean[name], its[name]), 0.0, 0
        )
        for shift, its in zip(data.test_names[1:], shifted, strict=True)
        for name in clean
    ]


def _scores(predictor: IT3Predictor, model: IT3Mixin, loader: object) -> dict[str, Tensor]:
    """Return scores ``(N,)`` of a loader's samples: the larger, the less like the training data."""
    prior, parts = model.it3_parts()[0], dict[str, list[Tensor]]()
    for batch in loader:  # type: ignore[attr-defined]
        prediction = predictor(model.it3_inputs(batch))
        parts.setdefault(DISTANCE, []).append(prediction.distance.cpu())
        if isinstance(prior, ClassPrior):
            most = prior.from_output(prediction.outputs).amax(1)
            confidence = most.reshape(len(most), -1).mean(1)
            parts.setdefault(CONFIDENCE, []).append(1 - confidence.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def _auroc(clean: Tensor, shifted: Tensor) -> float:
    """Return the area under the ROC curve, in percent.

    >>> _auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0]))
    100.0
    """
    scores = torch.cat([clean, shifted]).double()
    target = torch.cat([torch.zeros(len(clean)), torch.ones(len(shifted))]).long()
    known = scores.isfinite()
    return 100 * float(binary_auroc((scores / (1 + scores))[known], target[known]))
