"""Dry run: what a benchmark would find out after training only, found out before."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice, zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from it3_lightning.benchmark.config import BenchmarkSettings
from it3_lightning.data import ShiftedData
from it3_lightning.training.mixin import IT3Mixin

_LOOKED_AT = 20  # batches: where all of them are equal, loaders are


def dry_run(settings: BenchmarkSettings, model: IT3Mixin, data: ShiftedData) -> None:
    """Test an untrained model on a batch of each loader, and look at what the loaders follow.

    Args:
        settings: of the Trainer and of the metric.
        model: fresh.
        data: with the stream and the split set that the benchmark is to be run on.

    Raises:
        ValueError: the metric is not logged, there is not one loader for each of ``test_names``, or
            loaders of data of one's own ignore the stream or the split.
    """
    model.it3_train = "off"
    trainer = settings.trainer(limit_test_batches=1)
    logged = trainer.test(model, datamodule=data, verbose=False)
    names = data.test_names
    if len(logged) != len(names):
        raise ValueError(
            f"Expected a test loader for each of {', '.join(names)}, got {len(logged)} of "
            f"{type(data).__name__}. A test_dataloader of your own has to follow shifts and "
            f"stream={data.stream!r}, or override test_names."
        )
    for found in logged:
        score_in(found, settings.metric)
    if data.stream in ("unequal", "correlated"):
        _check_followed(data, "stream", data.stream, "equal")
    if data.evaluate_on == "validation":
        _check_followed(data, "evaluate_on", "validation", "test")


def score_in(scores: Mapping[str, Any], metric: str) -> float:
    """Return the score in what a loader's ``test_step`` logged.

    Raises:
        ValueError: it is not there.

    >>> score_in({"test_acc/dataloader_idx_1": 0.5}, "test_acc")
    0.5
    """
    for key, value in scores.items():
        if key.partition("/dataloader_idx_")[0] == metric:
            return float(value)
    raise ValueError(
        f"test_step logged no {metric!r}, but {', '.join(scores)}. Set benchmark.metric "
        "to one of them."
    )


def _check_followed(data: ShiftedData, name: str, value: str, other: str) -> None:
    """Refuse data whose clean samples are the same whatever a setting says."""
    own = data.test_dataloader()[0]
    setattr(data, name, other)
    try:
        ignored = _same(own, data.test_dataloader()[0])
    finally:
        setattr(data, name, value)
    if ignored:
        raise ValueError(
            f"Expected other test samples with {name}={value!r} than with {name}={other!r}, got "
            f"the same of {type(data).__name__}. A test_dataloader of your own has to follow "
            f"{name}; else leave {value} out."
        )


def _same(one: Iterable[Any], other: Iterable[Any]) -> bool:
    return all(
        len(mine) == len(theirs) and all(map(_equal, mine, theirs))
        for mine, theirs in (
            map(tree_leaves, pair) for pair in islice(zip_longest(one, other), _LOOKED_AT)
        )
    )


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return (type(one) is type(other) and not isinstance(one, str | int | float)) or one == other
