"""Where a batch keeps inputs and target: in tuples, mappings, dataclasses, objects and graphs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map

from it3_lightning.engine.trees import opened
from it3_lightning.utils import TARGET_NAMES
from it3_lightning.utils.graphs import is_graph, label_of, relabelled, unlabelled

TRANSFORMERS = (
    *("pixel_values", "input_ids", "inputs_embeds", "input_values", "input_features"),
    *("attention_mask", "token_type_ids", "position_ids", "pixel_mask"),
)  # arguments of models of transformers; those of the second line come beside others
INPUT_NAMES = (
    *("input", "inputs", "image", "images", "x", "features", "data"),
    *TRANSFORMERS[:5],
)
MASKS = ("attention_mask", "pixel_mask")  # of these: 1 where there is something, 0 for padding


def inputs_of(batch: Any) -> Any:
    """Return the inputs of a batch: the first entry, or the one with a usual name.

    A batch of graphs is its own input, and so is any graph in the inputs, without its target. In a
    mapping for a model of transformers all its arguments are, such as ``attention_mask``.

    Raises:
        ValueError: there is none.

    >>> inputs_of({"image": 1, "label": 2})
    1
    >>> inputs_of({"input_ids": 1, "attention_mask": 2, "labels": 3})
    {'input_ids': 1, 'attention_mask': 2}
    """
    if isinstance(batch, Tensor):
        return batch
    pair = isinstance(batch, tuple | list) and not hasattr(batch, "_fields")
    graph = not pair and is_graph(batch)
    several = _arguments(batch)
    inputs = several or (batch if graph else _entry(batch, "inputs", INPUT_NAMES, 0))
    return inputs if isinstance(inputs, Tensor) else unlabelled(inputs)


def target_of(batch: Any) -> Any:
    """Return the target of a batch: the second entry, or the one with a usual name.

    Raises:
        ValueError: there is none.

    >>> target_of((1, 2))
    2
    """
    if not isinstance(batch, tuple | list) and is_graph(batch):
        return _label(batch)
    return _entry(batch, "target", TARGET_NAMES, 1)


def with_inputs(batch: Any, inputs: Any) -> Any:
    """Return a copy of the batch with other inputs; the given one is not changed.

    Raises:
        ValueError: the batch has no inputs.

    >>> with_inputs([1, 2], 5)
    [5, 2]
    """
    if isinstance(batch, Tensor):
        return inputs
    if is_graph(batch):
        return relabelled(inputs, batch)
    if hasattr(batch, "_replace"):  # a named tuple
        return batch._replace(**{_field(batch, "inputs", INPUT_NAMES, 0): inputs})
    if isinstance(batch, tuple | list):
        _at(batch, "inputs", 0)
        return type(batch)([inputs, *batch[1:]])
    changed: Any = copy.copy(batch)
    if _arguments(batch) and isinstance(inputs, Mapping):
        for name, value in inputs.items():
            changed[name] = value
        return changed
    if isinstance(batch, Mapping):
        changed[_name(batch, "inputs", INPUT_NAMES, list(batch))] = inputs
        return changed
    name = _field(batch, "inputs", INPUT_NAMES, 0)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{name: inputs})
    setattr(changed, name, inputs)
    return changed


def valid_in(inputs: Any) -> Tensor | None:
    """Return which positions a mask of ``transformers`` says are there, booleans; ``None``: none.

    >>> valid_in({"input_ids": 5, "attention_mask": torch.tensor([[1, 1, 0]])})
    tensor([[ True,  True, False]])
    """
    masks = [inputs.get(name) for name in MASKS] if isinstance(inputs, Mapping) else []
    return next((mask != 0 for mask in masks if isinstance(mask, Tensor)), None)


def called_on(module: nn.Module, inputs: Any) -> Any:
    """Return what a module returns for inputs, which may be several arguments.

    A tuple or a list is spread; so is, by name, a mapping of names of transformers that ``forward``
    takes.

    >>> called_on(nn.Bilinear(2, 3, 4), (torch.zeros(1, 2), torch.zeros(1, 3))).shape
    torch.Size([1, 4])
    """
    if isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence):
        return module(*inputs)
    if isinstance(inputs, Mapping) and set(inputs) <= {*TRANSFORMERS}:
        try:
            inspect.signature(module.forward).bind(**inputs)
        except TypeError:  # it takes them as one
            return module(inputs)
        return module(**inputs)
    return module(inputs)


def _arguments(batch: Any) -> dict[str, Any]:
    """Return the arguments of a model of transformers in a mapping, where they are several."""
    if not isinstance(batch, Mapping):
        return {}
    found = {name: batch[name] for name in TRANSFORMERS if name in batch}
    usual = next((name for name in INPUT_NAMES if name in batch), None)
    return found if len(found) > 1 and usual in found else {}


def _label(graph: Any) -> Any:
    label = label_of(graph)
    if label is None:
        raise ValueError(_missing(graph, "target", "no y"))
    return label


def _entry(batch: Any, kind: str, names: tuple[str, ...], position: int) -> Any:
    if isinstance(batch, Mapping):
        return batch[_name(batch, kind, names, list(batch))]
    if isinstance(batch, tuple | list) and not hasattr(batch, "_fields"):
        return _at(batch, kind, position)
    return getattr(batch, _field(batch, kind, names, position))


def _at(batch: Sequence[Any], kind: str, position: int) -> Any:
    if len(batch) > position:
        return batch[position]
    raise ValueError(_missing(batch, kind, f"{len(batch)} entries"))


def _field(batch: Any, kind: str, names: tuple[str, ...], position: int) -> str:
    """Return the name of an attribute; a named tuple without a usual name goes by position."""
    if hasattr(batch, "_fields"):
        fields = list(batch._fields)
        usual = any(name in (*INPUT_NAMES, *TARGET_NAMES) for name in fields)
        return _name(batch, kind, names, fields) if usual else str(_at(fields, kind, position))
    if dataclasses.is_dataclass(batch):
        return _name(batch, kind, names, [field.name for field in dataclasses.fields(batch)])
    usual_names = (*INPUT_NAMES, *TARGET_NAMES)
    present = [name for name in usual_names if getattr(batch, name, None) is not None]
    return _name(batch, kind, names, present)


def _name(batch: Any, kind: str, names: tuple[str, ...], present: list[Any]) -> str:
    for name in names:
        if name in present:
            return name
    raise ValueError(_missing(batch, kind, ", ".join(map(str, present)) or "no fields"))


def _missing(batch: Any, kind: str, got: str) -> str:
    return (
        f"Cannot find the {kind} of a batch of type {type(batch).__name__} with {got}. Expected "
        f"(inputs, target), or one of the names {', '.join(INPUT_NAMES)} and "
        f"{', '.join(TARGET_NAMES)}. Override it3_inputs(batch) and it3_target(batch) otherwise, "
        "and where inputs are perturbed it3_with_inputs(batch, inputs)."
    )


def normal(inputs: Any) -> Any:
    """Return copies of inputs that can take part in a backward pass, as inference tensors cannot.

    Always copies, so that a network that writes into its inputs spoils no batch. What else can
    clone itself, as batches of graphs can, is cloned too, and so is what mappings of any type and
    dataclasses hold.
    """
    with torch.inference_mode(False), torch.no_grad():
        return tree_map(_clone, inputs)


def _clone(leaf: Any) -> Any:
    """Return a copy of a tensor, or of another object that has a ``clone`` method."""
    clone = getattr(leaf, "clone", None)
    if callable(clone) and not isinstance(leaf, type):
        return clone()
    opens = isinstance(leaf, MutableMapping) or dataclasses.is_dataclass(leaf)
    return opened(leaf, normal) if opens else leaf
