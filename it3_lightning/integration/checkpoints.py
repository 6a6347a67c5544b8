"""Checkpoint content: parts as plain data, the plain checkpoint of a network, foreign weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from it3_lightning.conditioning import Conditioning
from it3_lightning.engine.selection import OWN
from it3_lightning.methods.auxiliary import Auxiliary
from it3_lightning.priors import Prior
from it3_lightning.utils.files import load_plain, write
from it3_lightning.utils.specs import spec

KEPT = "it3"  # what this library keeps in a checkpoint beside weights and hyperparameters


def plain(value: Any) -> Any:
    """Return a prior, a conditioning or a head as what would make it again; all else stays.

    So checkpoints hold plain data and load with ``weights_only=True``.

    >>> from it3_lightning.priors import ClassPrior
    >>> plain(ClassPrior(3))["class_path"], plain(3)
    ('it3_lightning.priors.ClassPrior', 3)
    """
    return spec(value) if isinstance(value, Prior | Conditioning | Auxiliary) else value


def plain_data(**arguments: Any) -> dict[str, Any]:
    """Return arguments as plain data, less those that are none: the checkpoint must load.

    >>> plain_data(train="joint", prior=None, other=object)
    {'train': 'joint', 'prior': None}
    """
    made = {name: plain(value) for name, value in arguments.items()}
    return {name: value for name, value in made.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return type(value) is dict and all(map(_is_plain, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool, Tensor)


def network_weights(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a state that are the network's own, and none of this library.

    >>> network_weights({"net.weight": 1, "it3_prior.mean": 2})
    {'net.weight': 1}
    """
    return {name: value for name, value in state.items() if not name.startswith(OWN)}


# Out: the checkpoint of the network as it was before it was mixed

_ARGUMENTS = (
    *("prior", "conditioning", "train", "source_checkpoint", "dual_pass", "conditioning_optimizer"),
    *("auxiliary", "auxiliary_weight"),
    "_class_path",  # of the class with priors, which LightningCLI notes
)
_OF_THE_RUN = ("optimizer_states", "lr_schedulers", "callbacks", "current_model_state", "loops")


def exported(checkpoint: Any) -> dict[str, Any]:
    """Return the plain checkpoint in one of a module with priors: weights and hyperparameters.

    The user's own class reads it, ``LitNet.load_from_checkpoint(path)``, and finds there what its
    ``on_save_checkpoint`` has added. Optimizers and callbacks, which are those of training on
    priors, are left out.

    Raises:
        ValueError: a Trainer did not write it, or the network's weights were not in place.
    """
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(
            "Expected a checkpoint that a Trainer wrote, got a file without state_dict. Weights "
            "alone are loaded into the module: model.load_state_dict(weights)."
        )
    beside = checkpoint.get(KEPT, {})
    if isinstance(beside, Mapping) and beside.get("source_in_place") is False:
        raise ValueError(
            "Expected the weights of a network, got a checkpoint written before its "
            "source_checkpoint was loaded. The source is what you are looking for."
        )
    dropped = (KEPT, "it3_source", *_OF_THE_RUN)
    found = {name: value for name, value in checkpoint.items() if name not in dropped}
    found["state_dict"] = network_weights(state)
    hparams = checkpoint.get("hyper_parameters")
    if isinstance(hparams, Mapping):
        found["hyper_parameters"] = {k: v for k, v in hparams.items() if k not in _ARGUMENTS}
    return found


def save_plain(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint whole, or not at all."""
    write(Path(path), lambda stream: torch.save(dict(checkpoint), stream))


# In: the weights of a network that was trained without priors


def load_source(module: nn.Module, path: str) -> None:
    """Load the weights of an ordinary checkpoint of the same network.

    Args:
        module: holds the network; what it has under ``it3_*`` is left alone.
        path: of a checkpoint of a Trainer, or of a saved ``state_dict``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, a checkpoint of another network, or holds more than plain data.
    """
    saved = _read(path)
    state = network_weights(saved.get("state_dict", saved))
    own = network_weights(module.state_dict())
    wrong = _differences(own, state)
    if wrong:
        raise ValueError(_unlike(type(module).__name__, path, own, saved, wrong))
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path!r} does not fit {type(module).__name__}: {error}") from error


def _read(path: str) -> Mapping[str, Any]:
    """Return what a file holds: a checkpoint, or a state by itself."""
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"There is no checkpoint at {path!r}. Give source_checkpoint the path of an ordinary "
            "checkpoint of this network."
        )
    saved = load_plain(path)
    state = saved.get("state_dict", saved) if isinstance(saved, Mapping) else saved
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"Expected a checkpoint, or a saved state_dict, got a file of other content: {path}. "
            "Give source_checkpoint the path of an ordinary checkpoint of this network."
        )
    return saved if isinstance(saved, Mapping) else state


def _differences(own: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Say which entries are missing, which are too many, and which have another shape."""
    both = {n: (_shape(v), _shape(state[n])) for n, v in own.items() if n in state}
    return [
        *(f"missing {name}" for name in own if name not in state),
        *(f"unexpected {name}" for name in state if name not in own),
        *(f"{name} {its} instead of {mine}" for name, (mine, its) in both.items() if mine != its),
    ]


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


_OTHER_NAMES = """{path!r} holds the weights of {name} by other names.
    found:    {found}{under}
    expected: {expected}
Write them by the names of the module, and give that file:
    {lines}
    torch.save({saved}, "weights.pt")"""


def _unlike(
    name: str, path: str, own: Mapping[str, Any], saved: Mapping[str, Any], wrong: list[str]
) -> str:
    """Say how a file differs from the weights of a module, and how to bring it where it is known.

    Args:
        name: of the module.
        path: of the file.
        own: weights of the module.
        saved: what the file holds.
        wrong: the differences.
    """
    nested = {key: value for key, value in saved.items() if _is_state(value)}
    candidates: list[tuple[str | None, Mapping[str, Any]]] = [(None, saved), *nested.items()]
    for key, state in candidates:
        lines = _lines(name, path, key, own, state)
        if lines is not None:
            under = "" if key is None else f", under {key!r}"
            saving = "model.state_dict()" if lines.startswith("model") else "weights"
            return _OTHER_NAMES.format(
                **{"path": path, "name": name, "found": _some(state), "under": under},
                **{"expected": _some(own), "lines": lines, "saved": saving},
            )
    hint = f" It holds states of other names under {', '.join(nested)}." if nested else ""
    return (
        f"{path!r} is a checkpoint of another network than {name}: "
        f"{'; '.join(wrong[:5])}{'; ...' * (len(wrong) > 5)}. Found {_some(saved)}; expected "
        f"{_some(own)}.{hint} Build the model with the arguments it was trained with."
    )


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(leaf, Tensor) for leaf in value.values())


def _some(state: Mapping[str, Any]) -> str:
    names = list(map(str, state))
    return f"{', '.join(names[:3])}{', ...' * (len(names) > 3)}"


def _lines(
    name: str, path: str, key: str | None, own: Mapping[str, Any], state: Mapping[str, Any]
) -> str | None:
    """Return the code that gives the entries of a state the names of a module's, if any does."""
    read = f"torch.load({path!r}, weights_only=True){'' if key is None else f'[{key!r}]'}"
    mine = {entry: _shape(value) for entry, value in own.items()}
    theirs = {entry: _shape(value) for entry, value in state.items()}
    if not theirs or not all(isinstance(entry, str) for entry in theirs):
        return None
    if theirs == mine:
        return f"weights = {read}"
    for part in _prefixes(mine):  # the weights of a submodule
        if {part + entry: shape for entry, shape in theirs.items()}.items() <= mine.items():
            return f"model = {name}(...)\n    model.{part[:-1]}.load_state_dict({read})"
    for before, after in product(_common(theirs), ["", *_common(mine)]):  # one of a wrapper
        if {after + n.removeprefix(before): shape for n, shape in theirs.items()} == mine:
            new = f"{after!r} + " * bool(after) + f"name.removeprefix({before!r})"
            return f"state = {read}\n    weights = {{{new}: state[name] for name in state}}"
    return None


def _prefixes(names: Iterable[str]) -> list[str]:
    """Return what comes before the dots of some names, from the shortest on.

    >>> _prefixes(["net.head.bias"])
    ['net.', 'net.head.']
    """
    parts = [name.split(".") for name in names]
    found = {".".join(part[:n]) + "." for part in parts for n in range(1, len(part))}
    return sorted(found, key=lambda prefix: (prefix.count("."), prefix))


def _common(names: Iterable[str]) -> list[str]:
    """Return those with which each of the names begins."""
    every = list(names)
    return [prefix for prefix in _prefixes(every[:1]) if all(n.startswith(prefix) for n in every)]
