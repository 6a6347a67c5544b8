"""Batches of graphs of torch_geometric: told apart, counted, without labels, mapped by their nodes.

torch_geometric is not imported here: where nobody has imported it, there are no such graphs.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

LABELS = ("y", "target", "targets", "label", "labels")


def is_graph(value: Any) -> bool:
    """Whether a value is a graph of torch_geometric, or a batch of them.

    >>> is_graph(torch.zeros(2))
    False
    """
    library = sys.modules.get("torch_geometric.data.data")
    return library is not None and isinstance(value, library.BaseData)


def graph_count(value: Any) -> int | None:
    """Return the number of graphs in a batch, by the names that graph libraries use."""
    count = getattr(value, "num_graphs", None) or getattr(value, "batch_size", None)
    return count if isinstance(count, int) else None


def first_floats(graph: Any) -> Tensor | None:
    """Return the first floating-point tensor of a graph, which tells its device and data type."""
    values = (value for store in graph.stores for value in store.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def label_of(graph: Any) -> Any:
    """Return the target of a graph, or of a batch of graphs; ``None`` where there is none."""
    return next((store[k] for store in graph.stores for k in LABELS if k in store), None)


def unlabelled(inputs: Any) -> Any:
    """Return inputs in which no graph has a target; what is given is not changed.

    >>> unlabelled((1, 2))
    (1, 2)
    """
    graphs = [leaf for leaf in tree_leaves(inputs) if is_graph(leaf)]
    labelled = any(label_of(graph) is not None for graph in graphs)
    return tree_map(_without_labels, inputs) if labelled else inputs


def relabelled(graph: Any, labels: Any) -> Any:
    """Return a copy of a graph with the target of another one of the same kind."""
    changed = copy.copy(graph)
    for store, theirs in zip(changed.stores, labels.stores, strict=True):
        store.update({name: theirs[name] for name in LABELS if name in theirs})
    return changed


def map_nodes(graph: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return a copy of a graph with other floating-point node features; edges stay as they are.

    Args:
        graph: or a batch of graphs.
        function: takes features ``(nodes, ...)`` and each node's graph ``(nodes,)``, an index.
    """
    changed = copy.copy(graph)
    for store in changed.stores:
        for name, value in list(store.items()):
            floats = isinstance(value, Tensor) and value.is_floating_point()
            if floats and name not in LABELS and _of_nodes(store, name):
                graphs = store.get("batch", value.new_zeros(len(value), dtype=torch.long))
                store[name] = function(value, graphs)
    return changed


def chosen_graphs(present: Tensor, first: Any, second: Any) -> Any:
    """Return a batch of graphs: the first batch's where ``present`` ``(B,)``, else the second's."""
    pairs = zip(present.tolist(), first.to_data_list(), second.to_data_list(), strict=True)
    batch = sys.modules["torch_geometric.data"].Batch
    return batch.from_data_list([a if here else b for here, a, b in pairs])


def _of_nodes(store: Any, name: str) -> bool:
    return hasattr(store, "is_node_attr") and bool(store.is_node_attr(name))


def _without_labels(leaf: Any) -> Any:
    if not is_graph(leaf):
        return leaf
    changed = copy.copy(leaf)
    for store in changed.stores:
        for name in [name for name in LABELS if name in store]:
            del store[name]
    return changed
