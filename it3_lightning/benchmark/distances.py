"""The idempotence distance of every split's samples, before and after adaptation, kept in files.

It is small on data like that of training and grows with shift (Durasov et al., IT3, ICML 2025, and
ZigZag, TMLR 2024); adaptation makes it smaller.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from it3_lightning.benchmark.rows import Row, Training
from it3_lightning.benchmark.splits import splits
from it3_lightning.data import ShiftedData
from it3_lightning.engine import Settings
from it3_lightning.predictor import IT3Predictor
from it3_lightning.training.mixin import IT3Mixin

if TYPE_CHECKING:
    from it3_lightning.benchmark.run import Benchmark

SOURCE, STATISTICS, ADAPTED = "source", "batch statistics", "default objective, episodic"
_DIGITS = 6  # significant ones that a file holds: float32 has about as many


@dataclass(frozen=True)
class Distances:
    """Distances of the samples of one split, with the weights of one row.

    Args:
        training: which trained model.
        row: what happens at test time: ``"source"``, ``"batch statistics"`` (where there are
            BatchNorm layers) or ``"default objective, episodic"``.
        seed: of training, split and shifts.
        split: ``"train"``, ``"validation"``, or the name of a test with its severity, ``"fog/3"``.
        values: one distance per sample, in units of the recipe's distance; those that are not
            finite are left out.
    """

    training: str
    row: str
    seed: int
    split: str
    values: tuple[float, ...]


def keep_distances(
    benchmark: Benchmark,
    models: Mapping[Training, IT3Mixin],
    rows: Iterable[Row],
    data: ShiftedData,
) -> None:
    """Measure the distances of a seed on the benchmark's device and write them beside its scores.

    Args:
        benchmark: settings.
        models: see :func:`measured`.
        rows: see :func:`measured`.
        data: see :func:`measured`.
    """
    device = benchmark.trainer().strategy.root_device
    found = measured(models, rows, data, benchmark.distance_samples, device)
    file = distances_file(Path(benchmark.output), data.seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(each) for each in found]))


def kept_distances(folder: Path, seeds: Sequence[int]) -> list[Distances]:
    """Return the distances of these seeds that were written."""
    files = [file for seed in seeds if (file := distances_file(folder, seed)).is_file()]
    found = [entry for file in files for entry in json.loads(file.read_text())]
    return [Distances(**{**entry, "values": tuple(entry["values"])}) for entry in found]


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
        size: samples of a split, see :func:`~it3_lightning.benchmark.splits.splits`; 0: none.
        device: where to measure.
    """
    if size == 0:
        return []
    adapted = {row.training: row.settings for row in rows if row.name == ADAPTED}
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


def distances_file(folder: Path, seed: int) -> Path:
    """Return where the distances of a seed are written."""
    return folder / f"distances_seed_{seed}.json"
