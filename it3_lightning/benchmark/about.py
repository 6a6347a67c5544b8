"""What a benchmark was made with: settings, data, sizes of the network, versions."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torchmetrics
import torchvision

from it3_lightning.data import ShiftedData
from it3_lightning.mixin import IT3Mixin
from it3_lightning.specs import spec

if TYPE_CHECKING:
    from it3_lightning.benchmark.run import Benchmark

_NO_SETTINGS = ("seeds", "output", "threads", "higher_is_better", "decimals")  # change no score
_SET_BY_RUN = ("seed", "stream")


def about(
    benchmark: Benchmark, model: IT3Mixin, data: ShiftedData, configuration: object = None
) -> dict[str, Any]:
    """Return plain data; its ``"settings"`` tell whether kept scores still hold.

    Args:
        benchmark: settings.
        model: whose layers, sizes and settings.
        data: whose public attributes.
        configuration: what else the model was made from.
    """
    settings = {
        "benchmark": {k: v for k, v in asdict(benchmark).items() if k not in _NO_SETTINGS},
        "data": {"class": type(data).__name__, **_plain_attributes(data)},
        "model": _described(model),
        "configuration": configuration,
        "checkpoint": _digest(benchmark.ckpt_path),
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


def _described(model: IT3Mixin) -> dict[str, Any]:
    """Return what tells two models apart: layers, sizes, settings, optimizer, prior."""
    attributes = {k: v for k, v in vars(model).items() if k[0] != "_" and not isinstance(v, dict)}
    return {
        "layers": repr(model),
        "parameters": {name: list(p.shape) for name, p in model.named_parameters()},
        "attributes": {k: _without_address(v) for k, v in attributes.items()},
        "hparams": {k: _without_address(v) for k, v in dict(model.hparams).items()},
        "parts": [spec(model.it3_prior), spec(model.it3_conditioning)],
    }


def _without_address(value: Any) -> str:
    """Return a representation that is the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _digest(path: str | None) -> str | None:
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _plain_attributes(data: ShiftedData) -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(data).items()
        if not name.startswith("_")
        and name not in _SET_BY_RUN
        and isinstance(value, int | float | str | tuple | list)
    }
