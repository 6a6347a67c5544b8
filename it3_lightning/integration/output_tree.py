"""Output tree: what a forward returns, taken apart into tensors with samples, and put together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from itertools import islice
from typing import Any

import torch
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
    return made


def _with_items(before: Any, values: Mapping[Any, Any]) -> Any:
    made = copy.copy(before)
    for key, value in values.items():
        made[key] = value
    return made
