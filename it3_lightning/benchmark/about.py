"""What a benchmark was made with: settings, data, sizes of the network, versions."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import torch
import torchmetrics
import torchvision

from it3_lightning.data import ShiftedData
from it3_lightning.training.mixin import IT3Mixin
from it3_lightning.utils.specs import spec

if TYPE_CHECKING:
    from it3_lightning.benchmark.settings import BenchmarkSettings

_NO_SETTINGS = ("seeds", "output", "threads", "higher_is_better", "decimals")  # change no score
_SET_BY_RUN = ("seed", "stream")
_TRAINED_BY = ("epochs", "posthoc_epochs", "pretrained", "joint", "posthoc", "precision")
_NOT_TRAINED_ON = ("evaluate_on", "shifts", "severity", "eval_batch_size", "num_workers")


def about(
    benchmark: BenchmarkSettings, model: IT3Mixin, data: ShiftedData, configuration: object = None
) -> dict[str, Any]:
    """Return plain data: ``"settings"``, ``"training"``, ``"seeds"`` and ``"versions"``.

    The settings tell whether kept scores still hold, the training whether kept models do.

    Args:
        benchmark: settings.
        model: whose layers, sizes and settings.
        data: whose public attributes.
        configuration: what else the model was made from.
    """
    own = asdict(benchmark)
    shared = {
        "model": _described(model),
        "configuration": configuration,
        "checkpoint": _digest(benchmark.ckpt_path),
    }
    attributes = {"class": type(data).__name__, **_plain_attributes(data)}
    settings = {
        "benchmark": {k: v for k, v in own.items() if k not in _NO_SETTINGS},
        "data": attributes,
        **shared,
    }
    training = {
        "benchmark": {k: own[k] for k in _TRAINED_BY},
        "data": {k: v for k, v in attributes.items() if k not in _NOT_TRAINED_ON},
        "versions": {"it3_lightning": version("it3_lightning"), "torch": torch.__version__},
        **shared,
    }
    return {
        "settings": _plain(settings),
        "training": _plain(training),
        "seeds": list(benchmark.seeds),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "torchmetrics": torchmetrics.__version__,
            "torchvision": torchvision.__version__,
        },
    }


def _plain(values: Any) -> Any:
    """Return the values as a JSON file gives them back."""
    return json.loads(json.dumps(values, default=_without_address))


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
        and isinstance(value, int | float | str | tuple | list | Path)
    }
