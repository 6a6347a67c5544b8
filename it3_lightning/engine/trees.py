"""Single samples of nested inputs: taken out, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from it3_lightning.utils.graphs import graph_count


def batch_size(inputs: Any) -> int:
    """Return the size of dimension 0 of the first tensor in the inputs, or the number of graphs.

    Raises:
        ValueError: there is no tensor with a dimension in them, and no batch of graphs.

    >>> batch_size({"image": torch.zeros(4, 3)})
    4
    """
    for leaf in tree_flatten(inputs)[0]:
        size = leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else graph_count(leaf)
        if isinstance(size, int):
            return size
    raise ValueError(
        f"Expected inputs with a tensor (B, ...) in them, got {type(inputs).__name__}."
    )


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
    run = isinstance(indices, range) and indices.step == 1

    def of(leaf: Any) -> Any:
        if batched(leaf, size):
            return leaf[indices[0] : indices[-1] + 1] if run else leaf[list(indices)]
        if leaf is None or isinstance(leaf, Tensor) or graph_count(leaf) != size:
            return leaf
        if not hasattr(leaf, "get_example"):
            raise ValueError(
                f"Expected batches whose samples can be told apart: tensors (B, ...), or graphs as "
                f"torch_geometric batches them, with get_example(i), got {type(leaf).__name__}."
            )
        return type(leaf).from_data_list([leaf.get_example(int(i)) for i in indices])

    return tree_map(of, inputs)


def divisible(inputs: Any) -> bool:
    """Whether single samples can be taken out.

    >>> divisible(torch.zeros(2, 3))
    True
    """
    leaves = tree_flatten(inputs)[0]
    return all(
        isinstance(v, Tensor) or not graph_count(v) or hasattr(v, "get_example") for v in leaves
    )


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
