"""Output tree: what a forward returns, taken apart into tensors with samples, and put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_unflatten

Rebuild = Callable[[Sequence[Any]], Any]


_WHOLE = (Tensor, int, float, complex, str, bytes, type(None), Enum, torch.dtype, torch.device)


@dataclass(frozen=True)
class _Place:
    """Where a tensor was."""

    scalar: bool


class _Structure:
    """All of an output but its tensors: equal where those of two samples can be joined.

    Args:
        leaves: what it holds, with a :class:`_Place` for each tensor.
        rebuild: makes it again from its leaves.
        sized: whether the number of samples is known.
    """

    def __init__(self, leaves: list[Any], rebuild: Rebuild, *, sized: bool) -> None:
        self.leaves, self.rebuild, self.sized = leaves, rebuild, sized

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Structure) and not self._differences(other)

    __hash__ = None  # type: ignore[assignment]

    def check(self, other: _Structure) -> None:
        """Refuse what was returned for other samples, but differs where no tensor is.

        Raises:
            ValueError: it does.
        """
        differ = self._differences(other)
        if differ:
            raise ValueError(
                f"forward returned for two samples what differs outside of tensors{differ}. With "
                "scope='sample' only tensors (B, ...) can differ from sample to sample. Return "
                "tensors, or use scope='batch'."
            )

    def _differences(self, other: _Structure) -> str:
        pairs = zip(self.leaves, other.leaves, strict=False)
        differ = [(a, b) for a, b in pairs if a is not b and a != b]
        if differ:
            return f", such as {differ[0][0]!r} and {differ[0][1]!r}"
        return " in number" if len(self.leaves) != len(other.leaves) else ""


class OutputTree:
    """What was returned for some samples, in any structure of containers and dataclasses.

    A node of torch's trees whose leaves are the tensors ``(B, ...)`` in it, so that ``torch.func``
    takes it and samples can be joined.

    Args:
        tensors: each with the samples in its first dimension.
        structure: all else.

    >>> tree = OutputTree.of({"logits": torch.tensor([[1.0, 2.0]]), "loss": torch.tensor(3.0)}, 1)
    >>> tree.tensors  # of one sample, both
    [tensor([[1., 2.]]), tensor([3.])]
    >>> tree.filled([torch.zeros(2, 2), torch.tensor([3.0, 4.0])])
    {'logits': tensor([[0., 0.],
            [0., 0.]]), 'loss': tensor(3.5000)}
    """

    def __init__(self, tensors: list[Any], structure: _Structure) -> None:
        self.tensors, self.structure = tensors, structure

    @classmethod
    def of(cls, value: Any, size: int | None) -> OutputTree:
        """Take apart what was returned.

        Args:
            value: holds tensors ``(B, ...)``, scalar tensors, and what is the same for every
                sample.
            size: ``B``; ``None``: not known, as of graphs, so that nothing is checked.

        Raises:
            TypeError: it holds an object that cannot be taken apart.
            ValueError: a tensor in it does not have the samples in its first dimension.
        """
        leaves, rebuild = taken_apart(value)
        places = [_Place(v.ndim == 0) if isinstance(v, Tensor) else v for v in leaves]
        tensors = [_with_samples(v, size) for v in leaves if isinstance(v, Tensor)]
        return cls(tensors, _Structure(places, rebuild, sized=size is not None))

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """Return the same structure with other tensors; scalars are means over their samples."""
        given = iter(tensors)
        return self.structure.rebuild(
            [
                self._as_it_was(leaf, next(given)) if isinstance(leaf, _Place) else leaf
                for leaf in self.structure.leaves
            ]
        )

    def _as_it_was(self, place: _Place, values: Tensor) -> Tensor:
        if not self.structure.sized or not place.scalar:
            return values
        if bool((values == values[0]).all()):
            return values[0]
        if not values.is_floating_point():
            raise ValueError(
                f"forward returned an integer without a dimension of samples, which differs: "
                f"{values.tolist()}. Return one for each sample, or use scope='batch'."
            )
        return values.mean()


register_pytree_node(
    OutputTree,
    lambda tree: (tree.tensors, tree.structure),
    lambda tensors, structure: OutputTree(list(tensors), structure),
)


def _with_samples(tensor: Tensor, size: int | None) -> Tensor:
    if size is None:
        return tensor
    if tensor.ndim == 0:
        return tensor.expand(size)
    if tensor.shape[0] != size:
        raise ValueError(
            f"forward returned a tensor of shape {tuple(tensor.shape)} for {size} "
            "sample(s). With scope='sample' the first dimension of what it returns has to be "
            "that of the samples. Return it so, or use scope='batch'."
        )
    return tensor


def taken_apart(value: Any) -> tuple[list[Any], Rebuild]:
    """Return what a structure holds, and what makes it again from that.

    Raises:
        TypeError: it holds an object that cannot be taken apart.

    >>> leaves, rebuild = taken_apart({"a": (1, 2)})
    >>> leaves, rebuild([3, 4])
    ([1, 2], {'a': (3, 4)})
    """
    leaves, structure = tree_flatten(value)
    opened = [_opened(leaf) for leaf in leaves]

    def rebuild(flat: Sequence[Any]) -> Any:
        given = iter(flat)
        made = [again(list(islice(given, len(inner)))) for inner, again in opened]
        return tree_unflatten(made, structure)

    return [leaf for inner, _ in opened for leaf in inner], rebuild


DETECTION = (
    "Detection is out: its targets and predictions are lists of boxes, as many as an image has "
    "objects, and a prior is one tensor (B, ...), of the same shape for every sample."
)


def has_boxes(value: Any) -> bool:
    """Whether a value, or the first of several, holds boxes of objects by name.

    >>> has_boxes([{"boxes": torch.zeros(3, 4), "labels": torch.zeros(3)}]), has_boxes([1])
    (True, False)
    """
    first = next(iter(value), None) if isinstance(value, tuple | list) else value
    return isinstance(first, Mapping) and "boxes" in first


PREDICTION_NAMES = ("logits", "out", "prediction")


def prediction_in(returned: Any) -> Tensor:
    """Return the prediction in what a ``forward`` returned: the tensor with a usual name, or alone.

    Args:
        returned: a tensor, or one in a container, a dataclass or another object.

    Raises:
        MisconfigurationException: there is none, or several and nothing tells which; or they are
            boxes of objects.

    >>> prediction_in({"features": torch.zeros(1, 9), "logits": torch.ones(1, 2)})
    tensor([[1., 1.]])
    """
    if isinstance(returned, Tensor):
        return returned
    entries = returned if isinstance(returned, Mapping) else vars_of(returned)
    named = (entries.get(name) for name in PREDICTION_NAMES)
    found = next((value for value in named if isinstance(value, Tensor)), None)
    if found is not None:
        return found
    tensors = [value for value in _leaves(returned) if isinstance(value, Tensor) and value.ndim]
    if len(tensors) == 1:
        return tensors[0]
    if has_boxes(returned):
        raise MisconfigurationException(DETECTION)
    raise MisconfigurationException(
        f"Cannot tell which tensor is the prediction in {described(returned)}. Override\n"
        f"    def it3_outputs(self, returned):\n        return returned{_first_entry(returned)}"
    )


def vars_of(value: Any) -> Mapping[str, Any]:
    """Return the entries of an object by name: fields of a named tuple, or attributes."""
    if hasattr(value, "_asdict"):
        entries: Mapping[str, Any] = value._asdict()
        return entries
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return getattr(value, "__dict__", {})


def with_prediction(returned: Any, prediction: Tensor, other: Tensor) -> Any:
    """Return what a ``forward`` returned with another tensor in the place of its prediction.

    Args:
        returned: in any structure.
        prediction: a tensor in it.
        other: takes its place.

    Raises:
        MisconfigurationException: the prediction is none of the tensors in it.

    >>> logits, rest = torch.zeros(1), torch.ones(1)
    >>> with_prediction((logits, rest), logits, torch.tensor([5.0]))
    (tensor([5.]), tensor([1.]))
    """
    if returned is prediction:
        return other
    leaves, rebuild = taken_apart(returned)
    if not any(leaf is prediction for leaf in leaves):
        raise MisconfigurationException(
            "Expected it3_outputs(returned) to return one of the tensors that forward returned, "
            f"got another, from {described(returned)}. Compute nothing there, or return the "
            "prediction alone from forward."
        )
    return rebuild([other if leaf is prediction else leaf for leaf in leaves])


def described(returned: Any) -> str:
    """Say what was returned.

    >>> described({"a": torch.zeros(1, 2), "b": None})
    "a dict of 'a' (1, 2), 'b' NoneType"
    """
    name = type(returned).__name__
    if isinstance(returned, Tensor):
        return f"a tensor {tuple(returned.shape)}"
    pairs: list[tuple[str, Any]] = []
    if isinstance(returned, Mapping):
        pairs = [(f"{key!r} ", value) for key, value in returned.items()]
    elif isinstance(returned, tuple | list):
        pairs = [("", value) for value in returned]
    elif vars_of(returned):
        pairs = [(f"{key} ", value) for key, value in vars_of(returned).items()]
    return f"a {name}" + f" of {', '.join(k + _kind(v) for k, v in pairs)}" * bool(pairs)


def _kind(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _first_entry(returned: Any) -> str:
    """Return the code that takes the first tensor out of what was returned."""
    if isinstance(returned, tuple | list):
        return "[0]"
    by_key = isinstance(returned, Mapping)
    entries = returned if by_key else vars_of(returned)
    names = [key for key, value in entries.items() if isinstance(value, Tensor)] or ["logits"]
    return f"[{names[0]!r}]" if by_key else f".{names[0]}"


def _leaves(returned: Any) -> list[Any]:
    try:
        return taken_apart(returned)[0]
    except TypeError:  # an object that nothing can put together again, but its attributes tell
        return list(vars_of(returned).values())


def _opened(leaf: Any) -> tuple[list[Any], Rebuild]:
    """Take apart what is no container to torch: dataclasses and mappings of any type."""
    if isinstance(leaf, _WHOLE):
        return [leaf], lambda flat: flat[0]
    if is_dataclass(leaf) and not isinstance(leaf, type):
        names = [field.name for field in fields(leaf)]
        inner, again = taken_apart([getattr(leaf, name) for name in names])
        return inner, lambda flat: _with_fields(leaf, names, again(flat))
    if isinstance(leaf, Mapping):
        inner, again = taken_apart(dict(leaf))
        return inner, lambda flat: _with_items(leaf, again(flat))
    raise TypeError(
        f"forward returned a {type(leaf).__name__}, of which nothing tells how to join samples. "
        "With scope='sample', return tensors (B, ...), in tuples, lists, mappings or dataclasses "
        "where there are several; or use scope='batch'."
    )


def _with_fields(before: Any, names: Sequence[str], values: Sequence[Any]) -> Any:
    made = copy.copy(before)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(made, name, value)  # frozen ones, too
        if isinstance(made, MutableMapping) and name in made:  # a ModelOutput is both
            made[name] = value
    return made


def _with_items(before: Any, values: Mapping[Any, Any]) -> Any:
    made = copy.copy(before)
    for key, value in values.items():
        made[key] = value
    return made
