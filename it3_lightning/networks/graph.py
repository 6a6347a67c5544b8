"""A graph network for contours and meshes, with a layer where a prior reaches every node."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class GraphContext(nn.Module):
    """Zeros ``(B, C)``, one row for each graph of a batch: a place for a prior to enter.

    Args:
        out_features: ``C``.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, nodes: Tensor, graphs: int) -> Tensor:
        """Return the rows, on the device of the nodes and of their data type."""
        return nodes.new_zeros(graphs, self.out_features)


class GraphNet(nn.Module):
    r"""Gaussian mixture convolutions over a graph, the mean over its nodes, and a dense head.

    .. math::
        h_i = \mathrm{relu}(W x_i + c_{g(i)}), \quad
        h \leftarrow \mathrm{relu}(\mathrm{GMMConv}(h, e)), \quad
        \hat y = \mathrm{head}(\mathrm{relu}(\mathrm{dense}(\mathrm{mean}_i h_i)))

    The row :math:`c_{g(i)}` of the node's graph is zero. It is the output of the layer ``context``,
    one row for each graph, so ``FeatureInjection("network.context")`` adds an embedded prior to
    every node: the same as an embedded prior among the features of every node, as published. The
    network without a prior is bit for bit the one that its neutral pass computes.

    Args:
        in_features: of each node, in ``x``.
        out_features: outputs ``C``.
        edge_features: pseudo-coordinates of each edge, in ``edge_attr``.
        hidden: width of every layer.
        depth: number of convolutions.
        kernels: Gaussians of each convolution.

    Shapes:
        a ``torch_geometric.data.Batch`` of ``B`` graphs, or one graph as a batch of one,
        ``-> (B, C)``.

    Raises:
        ImportError: torch_geometric is not installed.
        ValueError: a number is not positive.

    Source: F. Monti et al., "Geometric deep learning on graphs and manifolds using mixture model
    CNNs" (CVPR 2017), for the convolution; N. Durasov et al., IT3 (ICML 2025), for its use on wing
    profiles.

    >>> import torch
    >>> from torch_geometric.data import Batch, Data
    >>> edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> triangle = Data(x=torch.zeros(3, 4), edge_index=edges, edge_attr=torch.ones(3, 2))
    >>> GraphNet(hidden=8)(Batch.from_data_list([triangle, triangle])).shape
    torch.Size([2, 1])
    """

    def __init__(
        self,
        in_features: int = 4,
        out_features: int = 1,
        *,
        edge_features: int = 2,
        hidden: int = 32,
        depth: int = 3,
        kernels: int = 4,
    ) -> None:
        super().__init__()
        try:
            from torch_geometric.nn import GMMConv, MeanAggregation
        except ImportError as error:
            raise ImportError(
                "Expected torch_geometric, which convolves over graphs, but it cannot be imported. "
                "Install it with: pip install 'it3_lightning[graphs]'"
            ) from error
        sizes = (in_features, out_features, edge_features, hidden, depth, kernels)
        if min(sizes) < 1:
            raise ValueError(f"Expected numbers of at least 1, got {sizes}.")
        self.embed = nn.Linear(in_features, hidden)
        self.context = GraphContext(hidden)
        self.convs = nn.ModuleList(
            GMMConv(hidden, hidden, dim=edge_features, kernel_size=kernels) for _ in range(depth)
        )
        self.pool = MeanAggregation()
        self.dense = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, out_features)

    def forward(self, graphs: Any) -> Tensor:
        """Return the outputs of each graph."""
        of_node = graphs.batch
        if of_node is None:  # a graph by itself
            of_node = graphs.edge_index.new_zeros(len(graphs.x))
        count = getattr(graphs, "num_graphs", 1)
        context: Tensor = self.context(graphs.x, count)
        nodes = (self.embed(graphs.x) + context[of_node]).relu()
        for conv in self.convs:
            nodes = conv(nodes, graphs.edge_index, graphs.edge_attr).relu()
        pooled: Tensor = self.pool(nodes, of_node, dim_size=count)
        outputs: Tensor = self.head(self.dense(pooled).relu())
        return outputs
