"""Single samples of nested inputs: which tensors hold them, taken out, and put together again.

The rule: the first tensor ``(B, ...)`` in the inputs, the first packed sequence or the first batch
of graphs says how many samples there are, ``B``. Every tensor whose first dimension is ``B`` holds
them, and whatever else there is all of them share. Where that is not so, :func:`laid_out` is told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import (
    register_pytree_node,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

from it3_lightning.utils.graphs import graph_count


class Shared:
    """A tensor that all samples share, whatever its shape.

    Args:
        tensor: as the network takes it.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def clone(self) -> Shared:
        """Return the same with a copy of the tensor."""
        return Shared(self.tensor.clone())


class Along:
    """A tensor whose samples the network expects along another dimension than the first.

    Args:
        tensor: with the samples in front, ``(B, ...)``.
        dim: where the network expects them.
    """

    def __init__(self, tensor: Tensor, dim: int) -> None:
        self.tensor, self.dim = tensor, dim

    def given(self) -> Tensor:
        """Return the tensor as the network takes it.

        >>> Along(torch.zeros(2, 5, 3), 1).given().shape
        torch.Size([5, 2, 3])
        """
        return self.tensor.movedim(0, self.dim)


register_pytree_node(
    Along, lambda value: ([value.tensor], value.dim), lambda held, dim: Along(next(iter(held)), dim)
)


def whole(value: Any) -> bool:
    """Whether a value is taken as one, though torch sees a tuple in it: a packed sequence."""
    return isinstance(value, PackedSequence)


def opened(leaf: Any, function: Callable[[Any], Any]) -> Any:
    """Return a mapping of any type, or a dataclass, with what it holds put through a function.

    Anything else is returned as it is.

    >>> from collections import UserDict
    >>> opened(UserDict(a=1), lambda value: value + 1), opened("a", len)
    ({'a': 2}, 'a')
    """
    if isinstance(leaf, MutableMapping):
        made: Any = copy.copy(leaf)
        for key in list(leaf):
            made[key] = function(leaf[key])
        return made
    if not is_dataclass(leaf) or isinstance(leaf, type):
        return leaf
    made = copy.copy(leaf)
    for field in fields(leaf):
        object.__setattr__(made, field.name, function(getattr(leaf, field.name)))  # frozen, too
    return made


def leaves_of(inputs: Any, is_leaf: Callable[[Any], bool] = whole) -> Iterator[Any]:
    """Yield what inputs hold, in mappings of any type and in dataclasses too.

    >>> from collections import UserDict
    >>> list(leaves_of([1, UserDict(a=2, b=(3, 4))]))
    [1, 2, 3, 4]
    """
    for leaf in tree_leaves(inputs, is_leaf=is_leaf):
        if isinstance(leaf, MutableMapping) or (is_dataclass(leaf) and not isinstance(leaf, type)):
            yield from leaves_of(list(_parts(leaf).values()), is_leaf)
        else:
            yield leaf


def batch_size(inputs: Any) -> int:
    """Return the number of samples: rows of the first tensor, sequences or graphs.

    Raises:
        ValueError: there is no tensor with a dimension in them, no packed sequence, and no batch of
            graphs.

    >>> batch_size({"image": torch.zeros(4, 3)})
    4
    """
    for leaf in leaves_of(inputs):
        size = _size(leaf)
        if size is not None:
            return size
    raise ValueError(
        f"Expected inputs with a tensor (B, ...) in them, got {type(inputs).__name__}."
    )


def _size(leaf: Any) -> int | None:
    if isinstance(leaf, Tensor):
        return leaf.shape[0] if leaf.ndim else None
    if isinstance(leaf, PackedSequence):
        return int(leaf.batch_sizes[0])
    return None if leaf is None else graph_count(leaf)


def batched(leaf: Any, size: int) -> bool:
    """Whether a leaf is a tensor with one entry for each sample."""
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def taken(inputs: Any, indices: Sequence[int]) -> Any:
    """Return the samples at these indices, a batch like the whole one.

    Tensors ``(B, ...)`` and batches of graphs are indexed, everything else is handed on.

    Raises:
        ValueError: a batch of graphs gives no single graphs out.

    >>> taken((torch.arange(3), "mode"), [2])
    (tensor([2]), 'mode')
    """
    size = batch_size(inputs)
    if isinstance(indices, range) and len(indices) == size:
        return inputs

    def of(leaf: Any) -> Any:
        if batched(leaf, size):
            return _rows(leaf, indices)
        if leaf is None or isinstance(leaf, Tensor | Shared):
            return leaf
        if isinstance(leaf, PackedSequence):
            return _sequences(leaf, indices)
        if graph_count(leaf) != size:
            return opened(leaf, lambda value: tree_map(of, value, is_leaf=whole))
        if not hasattr(leaf, "get_example"):
            raise ValueError(
                f"Expected batches whose samples can be told apart: tensors (B, ...), or graphs as "
                f"torch_geometric batches them, with get_example(i), got {type(leaf).__name__}."
            )
        return type(leaf).from_data_list([leaf.get_example(int(i)) for i in indices])

    return tree_map(of, inputs, is_leaf=whole)


def _rows(tensor: Tensor, indices: Sequence[int]) -> Tensor:
    """Return rows of a tensor; views of it, where they lie together."""
    if tensor.layout == torch.strided:
        run = isinstance(indices, range) and indices.step == 1 and len(indices) > 0
        return tensor[indices[0] : indices[-1] + 1] if run else tensor[list(indices)]
    index = torch.tensor(list(indices), dtype=torch.long, device=tensor.device)
    if tensor.layout == torch.sparse_coo:
        return tensor.index_select(0, index)
    rows: Tensor = tensor.to_sparse().index_select(0, index).to_sparse(layout=tensor.layout)
    return rows


def _sequences(packed: PackedSequence, indices: Sequence[int]) -> PackedSequence:
    """Return some of the sequences, packed."""
    padded, lengths = pad_packed_sequence(packed, batch_first=True)
    rows = list(indices)
    return pack_padded_sequence(padded[rows], lengths[rows], batch_first=True, enforce_sorted=False)


def sequence_first(network: nn.Module) -> bool:
    """Whether layers of a network expect the samples along the second dimension, ``(T, B, ...)``.

    >>> sequence_first(nn.LSTM(1, 1)), sequence_first(nn.LSTM(1, 1, batch_first=True))
    (True, False)
    """
    return any(getattr(layer, "batch_first", True) is False for layer in network.modules())


def divisible(inputs: Any, size: int, network: nn.Module) -> bool:
    """Whether single samples can be taken out, and there is no doubt which tensors hold them.

    Args:
        inputs: of a network.
        size: the number of samples that its outputs have.
        network: itself.

    >>> x, t = torch.zeros(2, 3), torch.zeros(2)
    >>> divisible(x, 2, nn.Identity()), divisible([x, t], 2, nn.Identity())
    (True, False)
    """
    if sequence_first(network):
        return False
    sizes = [_size(leaf) for leaf in leaves_of(inputs)]
    whole_ones = all(
        isinstance(leaf, Tensor | PackedSequence) or not _size(leaf) or hasattr(leaf, "get_example")
        for leaf in leaves_of(inputs)
    )
    return whole_ones and sizes.count(size) == 1 and batch_size(inputs) == size


def candidates(inputs: Any, size: int) -> list[Tensor]:
    """Return the different tensors in the inputs that hold samples by the rule.

    >>> x = torch.zeros(2, 3)
    >>> len(candidates([x, x.clone(), torch.zeros(2), torch.zeros(5)], 2))
    2
    """
    found: list[Tensor] = []
    for leaf in leaves_of(inputs):
        if batched(leaf, size) and not any(_equal(leaf, other) for other in found):
            found.append(leaf)
    return found


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    strided = a.layout == b.layout == torch.strided
    alike = strided and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    return alike and torch.equal(a, b)


def laid_out(inputs: Any, dims: Any) -> Any:
    """Return inputs whose samples lie in front, and whose other tensors are marked as shared.

    Args:
        inputs: as the network takes them; :meth:`Along.given` is what it gets in the end.
        dims: for each tensor the dimension of its samples, ``None`` where all samples share it, in
            the structure of the inputs; one value for all that a container holds; a mapping may
            leave out what has the samples in front. ``None`` in place of it all: the rule.

    Raises:
        ValueError: the structures or the numbers of samples differ, or a dimension does not exist.

    >>> batch_size(laid_out({"x": torch.zeros(5, 2, 3), "t": torch.zeros(2)}, {"x": 1, "t": None}))
    2
    """
    if dims is None:
        return inputs
    sizes: dict[int, str] = {}
    made = _laid_out(inputs, dims, "inputs", sizes)
    if len(sizes) > 1:
        told = ", ".join(f"{size} in {name}" for size, name in sizes.items())
        raise ValueError(
            f"Expected as many samples in every tensor, got {told}. Let it3_sample_dims(inputs) "
            "return the dimension of the samples for each tensor, None where all samples share it."
        )
    return made


def dims_by(function: Callable[[Any], int | None], inputs: Any) -> Any:
    """Return what a function says of each leaf, in lists and dicts in the structure of the inputs.

    >>> dims_by(lambda leaf: leaf.ndim, [torch.zeros(2), {"a": torch.zeros(2, 3)}])
    [1, {'a': 2}]
    """
    below = {} if whole(inputs) else _parts(inputs)
    made = {key: dims_by(function, part) for key, part in below.items()}
    if not made:
        return function(inputs)
    return list(made.values()) if isinstance(inputs, tuple | list) else made


def told_dims(inputs: Any, dims: Any) -> list[tuple[Tensor, int | None]]:
    """Return the tensors in the inputs with the dimension of their samples, as these tell it.

    >>> told_dims({"x": torch.zeros(2)}, 0)
    [(tensor([0., 0.]), 0)]
    """
    made = leaves_of(laid_out(inputs, dims), lambda v: isinstance(v, Along | PackedSequence))
    return [_told(leaf) for leaf in made if isinstance(leaf, Tensor | Along | Shared)]


def _told(leaf: Tensor | Along | Shared) -> tuple[Tensor, int | None]:
    if isinstance(leaf, Along):
        return leaf.given(), leaf.dim
    return (leaf.tensor, None) if isinstance(leaf, Shared) else (leaf, 0)


def sealed(inputs: Any) -> Any:
    """Return inputs in which tensors that hold no samples are marked as shared.

    Otherwise parts of the batch, of as many samples as they have rows, would take them for theirs.

    >>> x, t = torch.zeros(4, 3), torch.zeros(2)
    >>> [type(leaf).__name__ for leaf in taken(sealed([x, t]), [0, 1])]
    ['Tensor', 'Shared']
    """
    if isinstance(inputs, Tensor):
        return inputs
    size = batch_size(inputs)

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if batched(leaf, size) or not leaf.ndim else Shared(leaf)
        return opened(leaf, lambda value: tree_map(of, value, is_leaf=whole))

    return tree_map(of, inputs, is_leaf=whole)


def _laid_out(value: Any, dims: Any, name: str, sizes: dict[int, str]) -> Any:
    if isinstance(value, Tensor):
        return _marked(value, dims, name, sizes)
    if isinstance(value, PackedSequence):
        sizes.setdefault(int(value.batch_sizes[0]), name)
        return value
    below = _parts(value)
    if not below:
        return value
    if not (dims is None or isinstance(dims, int)):
        theirs = _parts(dims)
        if not set(theirs) <= set(below) or not (isinstance(dims, Mapping) or len(theirs)):
            raise ValueError(
                f"Expected the dimensions of the samples in the structure of {name}, a "
                f"{type(value).__name__} with {', '.join(map(str, below))}, got {dims!r}."
            )
    else:
        theirs = dict.fromkeys(below, dims)
    made = {
        key: _laid_out(part, theirs.get(key, 0), f"{name}[{key!r}]", sizes)
        for key, part in below.items()
    }
    if isinstance(value, tuple | list):
        parts = list(made.values())
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    keys = iter(below)
    return opened(value, lambda _: made[next(keys)])


def _parts(value: Any) -> dict[Any, Any]:
    """Return what a container holds, by key, name or number; of anything else nothing."""
    if isinstance(value, MutableMapping):
        return dict(value)
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _marked(tensor: Tensor, dim: Any, name: str, sizes: dict[int, str]) -> Any:
    if dim is None or tensor.ndim == 0:
        return Shared(tensor)
    if not isinstance(dim, int) or not -tensor.ndim <= dim < tensor.ndim:
        raise ValueError(
            f"Expected the dimension of the samples of {name}, of shape {tuple(tensor.shape)}, or "
            f"None where all samples share it, got {dim!r}."
        )
    dim %= tensor.ndim
    sizes.setdefault(tensor.shape[dim], name)
    return Along(tensor.movedim(dim, 0), dim) if dim else tensor


def joined(parts: Sequence[Any]) -> Any:
    """Return the batch of which these are the parts, in order.

    >>> joined([{"y": torch.zeros(1)}, {"y": torch.ones(2)}])
    {'y': tensor([0., 1., 1.])}
    """
    flat = [tree_flatten(part) for part in parts]
    for _, structure in flat[1:]:
        if structure != flat[0][1] and hasattr(structure.context, "check"):
            structure.context.check(flat[0][1].context)  # says what differs
    leaves = [
        torch.cat(same) if all(isinstance(leaf, Tensor) and leaf.ndim for leaf in same) else same[0]
        for same in zip(*(leaves for leaves, _ in flat), strict=True)
    ]
    return tree_unflatten(leaves, flat[0][1])


def written(whole: Any, part: Any, indices: Sequence[int]) -> Any:
    """Return a batch with other samples at these indices.

    >>> written(torch.zeros(3), torch.ones(1), [1])
    tensor([0., 1., 0.])
    """
    size = len(indices)

    def into(old: Any, new: Any) -> Any:
        if not (batched(new, size) and isinstance(old, Tensor)):
            return old
        result = old.clone()
        result[list(indices)] = new.to(old.dtype)
        return result

    return tree_map(into, whole, part)


def cast_like(values: Any, model: Any) -> Any:
    """Return the values in the data types of a model, if it has the same structure.

    >>> cast_like(torch.ones(1), torch.ones(5, dtype=torch.float64)).dtype
    torch.float64
    """
    leaves, structure = tree_flatten(values)
    like, other = tree_flatten(model)
    if structure != other:
        return values
    both = zip(leaves, like, strict=True)
    return tree_unflatten([_cast(leaf, of) for leaf, of in both], structure)


def _cast(leaf: Any, like: Any) -> Any:
    tensors = isinstance(leaf, Tensor) and isinstance(like, Tensor)
    return leaf.to(like.dtype) if tensors else leaf
