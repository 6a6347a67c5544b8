"""The score of a row: one run of a Trainer over all loaders of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from it3_lightning.benchmark.results import Record
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.data import ShiftedData
from it3_lightning.engine.selection import select
from it3_lightning.training.mixin import IT3Mixin


def scored(
    settings: BenchmarkSettings,
    row: Row,
    model: IT3Mixin,
    data: ShiftedData,
    *,
    batches: int | None = None,
) -> list[Record]:
    """Return a record for each loader of the data.

    Args:
        settings: of the Trainer and of the metric.
        row: what happens at test time.
        model: of the row's training.
        data: clean and shifted samples, with the stream and the seed set.
        batches: the most of each loader; ``None``: all.
    """
    callback = row.callback()
    callbacks = [] if callback is None else [callback]
    trainer = settings.trainer(callbacks=callbacks, limit_test_batches=batches)
    logged = trainer.test(model, datamodule=data, verbose=False)
    adapts = row.settings is not None and row.settings.steps > 0
    chosen = select(model, row.settings.parameters) if adapts and row.settings else {}
    time = 0.0 if callback is None else callback.summary.ms_per_sample
    adapted = sum(p.numel() for p in chosen.values())
    return [
        Record(
            row.training,
            row.name,
            data.stream,
            data.seed,
            shift,
            score_in(scores, settings.metric, percent=settings.percent),
            time,
            adapted,
        )
        for shift, scores in zip(data.test_names, logged, strict=True)
    ]


def score_in(scores: Mapping[str, Any], metric: str, *, percent: bool) -> float:
    """Return the score in what a loader's ``test_step`` logged.

    Raises:
        ValueError: it is not there.

    >>> score_in({"test_acc/dataloader_idx_1": 0.5}, "test_acc", percent=True)
    50.0
    """
    for key, value in scores.items():
        if key.partition("/dataloader_idx_")[0] == metric:
            return float(value) * (100 if percent else 1)
    raise ValueError(
        f"test_step logged no {metric!r}, but {', '.join(scores)}. Set benchmark.metric "
        "to one of them."
    )
