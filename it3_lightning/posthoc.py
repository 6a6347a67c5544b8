"""The weights of a network that is taken as it is, from an ordinary checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from it3_lightning.selection import OWN


def network_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state that are the network's own, and none of this library.

    >>> network_weights({"net.weight": 1, "it3_prior.mean": 2})
    {'net.weight': 1}
    """
    return {name: value for name, value in state.items() if not name.startswith(OWN)}


def load_source(module: nn.Module, path: str) -> None:
    """Load the weights of an ordinary checkpoint of the same network.

    Args:
        module: holds the network; what it has under ``it3_*`` is left alone.
        path: of a checkpoint of a Trainer, or of a saved ``state_dict``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a checkpoint of another network, or holds more than plain data.
    """
    saved = _read(path)
    state = network_weights(saved.get("state_dict", saved))
    own = network_weights(module.state_dict())
    wrong = _differences(own, state)
    if wrong:
        raise ValueError(
            f"{path!r} is a checkpoint of another network than {type(module).__name__}: "
            f"{'; '.join(wrong[:5])}{'; ...' * (len(wrong) > 5)}. Build the model with the "
            "arguments it was trained with."
        )
    module.load_state_dict(state)


def _read(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path!r}. Give source_checkpoint the path of an ordinary "
            "checkpoint of this network."
        )
    try:
        saved: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path!r} holds objects besides weights, which are not loaded: they could run code. "
            "Save the weights alone, torch.save(model.state_dict(), path), and give that path."
        ) from error
    return saved


def _differences(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Say which entries are missing, which are too many, and which have another shape."""
    shapes = {name: tuple(getattr(value, "shape", ())) for name, value in own.items()}
    return [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unexpected {name}" for name in state if name not in own),
        *(
            f"{name} {tuple(getattr(state[name], 'shape', ()))} instead of {shape}"
            for name, shape in shapes.items()
            if name in state and tuple(getattr(state[name], "shape", ())) != shape
        ),
    ]
