"""The trained models of a seed: kept in the output folder, trained where they are not there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from it3_lightning.benchmark.rows import Training
from it3_lightning.benchmark.settings import BenchmarkSettings
from it3_lightning.benchmark.training import MakeModel, Models, Say, fresh, train_models
from it3_lightning.data import ShiftedData
from it3_lightning.training.post_hoc import network_weights

State = Mapping[str, Tensor]
_TRAININGS: tuple[Training, ...] = ("ordinary", "joint", "post-hoc")


def models_of(
    settings: BenchmarkSettings,
    seed: int,
    make_model: MakeModel,
    data: ShiftedData,
    say: Say,
    training: Any,
) -> Models:
    """Return the three trained models of a seed, from their file where that fits.

    They are kept in ``models/seed_N.ckpt`` of the output folder: their states, and what the
    training depended on. Rows, recipes, shifts and splits to evaluate on are no part of that, so
    ``benchmark`` and ``tune`` share trainings.

    Args:
        settings: of the training.
        seed: of weights and order.
        make_model: returns a fresh model with priors.
        data: to train on.
        say: is told what is being done.
        training: plain data, all that training depends on besides the seed.
    """
    file = Path(settings.output) / "models" / f"seed_{seed}.ckpt"
    fingerprint = json.dumps(training, sort_keys=True)
    kept = _read(file)
    data.seed, data.stream = seed, "equal"
    if kept.get("fingerprint") == fingerprint:
        say(f"seed {seed}: models from {file}")
        return _with_states(settings, seed, make_model, kept["states"])
    models = train_models(settings, seed, make_model, data, say)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")  # what is interrupted leaves no half of a file
    torch.save({"fingerprint": fingerprint, "states": _states(models)}, part)
    part.replace(file)
    return models


def _states(models: Models) -> dict[str, State]:
    """Return the states by training; the post-hoc network is the ordinary one, and kept once."""
    states: dict[str, State] = {training: models[training].state_dict() for training in models}
    network = network_weights(states["post-hoc"])
    states["post-hoc"] = {k: v for k, v in states["post-hoc"].items() if k not in network}
    return states


def _with_states(
    settings: BenchmarkSettings, seed: int, make_model: MakeModel, states: Mapping[str, State]
) -> Models:
    models = {training: fresh(settings, seed, make_model, training) for training in _TRAININGS}
    network = network_weights(states["ordinary"])
    for training, model in models.items():
        more = network if training == "post-hoc" else {}
        model.load_state_dict({**more, **states[training]})
    return models


def _read(file: Path) -> dict[str, Any]:
    """Return what a file holds; nothing where it is missing or damaged."""
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return {}
    return content
