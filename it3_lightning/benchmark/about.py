"""What a benchmark was made with: settings, data, sizes of the network, versions."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torchmetrics
import torchvision
from torch import nn

from it3_lightning.data import ShiftedImages

if TYPE_CHECKING:
    from it3_lightning.benchmark.run import Benchmark

_NO_SETTINGS = ("seeds", "output", "threads")  # that change no score of a seed
_SET_BY_RUN = ("seed", "stream")


def about(benchmark: Benchmark, model: nn.Module, data: ShiftedImages) -> dict[str, Any]:
    """Return plain data; its ``"settings"`` tell whether kept scores still hold.

    Args:
        benchmark: settings.
        model: whose parameters' names and sizes.
        data: whose public attributes.
    """
    settings = {
        "benchmark": {k: v for k, v in asdict(benchmark).items() if k not in _NO_SETTINGS},
        "data": {"class": type(data).__name__, **_plain_attributes(data)},
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
    }
    return {
        "settings": json.loads(json.dumps(settings, default=repr)),
        "seeds": list(benchmark.seeds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "torchmetrics": torchmetrics.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def _plain_attributes(data: ShiftedImages) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(data).items()
        if not name.startswith("_")
        and name not in _SET_BY_RUN
        and isinstance(value, int | float | str | tuple | list)
    }
