"""Contours as graphs: nodes along the contour, edges between neighbours, handed over in batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from it3_lightning.data.naca import normals

NODE_FEATURES = 4
EDGE_FEATURES = 2


class ContourGraphs(Dataset[tuple[Any, Tensor]]):
    """Closed contours as graphs of torch_geometric, and a target for each.

    Each node has the features x, y and the two parts of its outward normal; each edge, one in each
    direction between neighbours, the way from its first node to its second in mean steps of the
    contour. A sample is ``(graph, target)``; graphs themselves hold no target.

    Args:
        contours: ``(N, nodes, 2)``, in chords.
        targets: ``(N, 1)``.

    Raises:
        ImportError: torch_geometric is not installed.

    Example:
        >>> square = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]])
        >>> graph, target = ContourGraphs(square, torch.tensor([[7.0]]))[0]
        >>> graph.edge_attr[:2].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, contours: Tensor, targets: Tensor) -> None:
        try:
            from torch_geometric.data import Batch, Data
        except ImportError as error:
            raise ImportError(
                "Expected torch_geometric, which holds the graphs, but it cannot be imported. "
                "Install it with: pip install 'it3_lightning[graphs]', or take "
                "representation='contour'."
            ) from error
        edges = ring(contours.shape[1])
        nodes = torch.cat([contours, normals(contours)], dim=2).float()
        ways = steps(contours, edges).float()
        self.graphs = [
            Data(x=x, edge_index=edges, edge_attr=way) for x, way in zip(nodes, ways, strict=True)
        ]
        self.targets = targets.float()
        self._batch = Batch

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.graphs[index].clone(), self.targets[index].clone()

    def __getitems__(self, indices: list[int]) -> tuple[Any, Tensor]:
        """Return a whole batch: a ``Batch`` of graphs and ``(B, 1)`` targets."""
        chosen = [self.graphs[index] for index in indices]
        return self._batch.from_data_list(chosen), self.targets[torch.as_tensor(indices)]


def ring(nodes: int) -> Tensor:
    """Return the edges of a closed contour, ``(2, 2 * nodes)``: forth, then back.

    >>> ring(3)
    tensor([[0, 1, 2, 1, 2, 0],
            [1, 2, 0, 0, 1, 2]])
    """
    here = torch.arange(nodes)
    there = here.roll(-1)
    return torch.stack([torch.cat([here, there]), torch.cat([there, here])])


def steps(contours: Tensor, edges: Tensor) -> Tensor:
    """Return each edge's way from its first to its second node, in mean steps, ``(N, edges, 2)``.

    >>> square = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]])
    >>> steps(square, ring(4))[0, 0]
    tensor([1., 0.])
    """
    forth = contours.roll(-1, dims=1) - contours
    mean = forth.norm(dim=2).mean(dim=1)[:, None, None]
    ways: Tensor = (contours[:, edges[1]] - contours[:, edges[0]]) / mean
    return ways
