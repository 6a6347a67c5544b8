"""A module from a checkpoint, and whether its weights are ready to predict with."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule


def loaded(
    path: str | Path, module_class: type[LightningModule], kwargs: dict[str, Any]
) -> LightningModule:
    """Return the module in a checkpoint that a Trainer wrote.

    Args:
        path: of the checkpoint.
        module_class: of the module in it.
        kwargs: of ``module_class.load_from_checkpoint``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no Trainer wrote it, or not to its end.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):  # which Trainers write
        raise ValueError(
            f"Expected a checkpoint that a Trainer wrote, got another or a truncated file: {path}."
        )
    try:
        with torch.inference_mode(False):
            return module_class.load_from_checkpoint(path, **kwargs)
    except KeyError as error:
        if error.args != ("pytorch-lightning_version",):
            raise
        raise ValueError(
            f"Expected a checkpoint that a Trainer wrote, got a file without {error}: {path}. Load "
            "weights alone into a module, and make the predictor of that: IT3Predictor(module)."
        ) from error


def check_weights(module: LightningModule) -> None:
    """Refuse weights that cannot adapt, and those of a network that still waits for its own.

    Raises:
        MisconfigurationException: they were made in inference mode, or never loaded.
    """
    if any(parameter.is_inference() for parameter in module.parameters()):
        raise MisconfigurationException(
            f"{type(module).__name__} was made in inference mode, where no weight can adapt. Make "
            "or load it outside of torch.inference_mode()."
        )
    if getattr(module, "it3_source_due", False):
        raise MisconfigurationException(
            f"{type(module).__name__} has not loaded its source_checkpoint, nor trained its "
            "conditioning. Fit it first, or load a checkpoint written after fitting: "
            "IT3Predictor.from_checkpoint(path, ...)."
        )
