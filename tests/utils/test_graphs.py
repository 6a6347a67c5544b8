"""Batches of graphs as inputs, through the whole library: labels, copies, noise, passes, tests."""

import sys
from typing import Any

import pytest
import torch
from helpers.reference import adapt_stream
from helpers.toy import differing, everything, quiet, seeded
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.loader import DataLoader as GraphLoader

from it3_lightning import (
    DualPass,
    FeatureInjection,
    ForwardArgument,
    Idempotence,
    IT3TestTimeCallback,
    RandomNoise,
    ValuePrior,
)
from it3_lightning.integration.batches import inputs_of, normal, target_of, with_inputs
from it3_lightning.networks import GraphNet
from it3_lightning.tasks import IT3Regressor
from it3_lightning.utils.graphs import chosen_graphs, is_graph, map_nodes

NODES, HIDDEN, KERNELS = 5, 6, 2


def ring(seed: int, nodes: int = NODES) -> Data:
    """A ring of nodes with random features: both directions of each edge, forth first."""
    draw = torch.Generator().manual_seed(seed)
    here, there = torch.arange(nodes), torch.arange(nodes).roll(-1)
    return Data(
        x=torch.randn(nodes, 4, generator=draw),
        edge_index=torch.stack([torch.cat([here, there]), torch.cat([there, here])]),
        edge_attr=torch.randn(2 * nodes, 2, generator=draw),
    )


def rings(count: int = 6, *, labelled: bool = True) -> list[Data]:
    graphs = [ring(i) for i in range(count)]
    for i, graph in enumerate(graphs) if labelled else ():
        graph.y = torch.tensor([[float(i)]])
    return graphs


def batch(count: int = 3, **kwargs: Any) -> Any:
    return Batch.from_data_list(rings(count, **kwargs))


def regressor(**args: Any) -> IT3Regressor:
    given: dict[str, Any] = {
        "prior": ValuePrior(mean=2.0, std=2.0),
        "conditioning": FeatureInjection("network.context", hidden=3),
        **args,
    }
    network = GraphNet(hidden=HIDDEN, depth=2, kernels=KERNELS)
    model: IT3Regressor = seeded(IT3Regressor(network, **given))
    return model


def values(graphs: Any) -> list[tuple[str, Any]]:
    """What a graph holds: names and numbers."""
    return [
        (k, v.tolist() if isinstance(v, Tensor) else v) for s in graphs.stores for k, v in s.items()
    ]


# Batches


def test_a_labelled_batch_of_graphs_is_its_own_input_without_the_label() -> None:
    labelled = batch()
    before = values(labelled)
    inputs = inputs_of(labelled)
    assert "y" not in inputs
    assert values(inputs) == [(k, v) for k, v in before if k != "y"]
    assert inputs.num_graphs == 3
    assert all("y" not in graph for graph in inputs.to_data_list())
    assert target_of(labelled).tolist() == [[0.0], [1.0], [2.0]]
    assert values(labelled) == before


@pytest.mark.parametrize("name", ["y", "target", "label"])
def test_no_graph_keeps_its_label_wherever_it_is(name: str) -> None:
    alone = ring(0)
    alone[name] = torch.ones(1)
    graph = Batch.from_data_list([alone])
    for given in ((graph, 1), {"x": [graph, torch.ones(1)], "y": 1}, graph):
        inputs = inputs_of(given)
        found = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if is_graph(leaf)]
        assert len(found) == 1
        assert name not in found[0]
    assert target_of(graph).tolist() == [1.0]


def test_inputs_without_labels_are_the_given_ones() -> None:
    graphs = batch(labelled=False)
    assert inputs_of((graphs, 1)) is graphs
    assert inputs_of(graphs) is graphs
    with pytest.raises(
        ValueError, match=r"Cannot find the target of a batch of type DataBatch .* no y"
    ):
        target_of(graphs)


def test_other_graphs_are_put_in_beside_the_label() -> None:
    labelled = batch()
    noisy = map_nodes(inputs_of(labelled), lambda x, _: x + 1)
    changed = with_inputs(labelled, noisy)
    assert torch.equal(changed.x, labelled.x + 1)
    assert torch.equal(changed.y, labelled.y)
    assert "y" not in noisy
    assert with_inputs((1, 2), noisy) == (noisy, 2)


def test_graphs_of_several_kinds_of_nodes_lose_their_label_too() -> None:
    graph = HeteroData()
    graph["wing"].x, graph["wing"].y = torch.zeros(3, 2), torch.ones(3)
    graph["wing", "to", "wing"].edge_index = torch.tensor([[0, 1], [1, 2]])
    both = Batch.from_data_list([graph, graph])
    assert "y" not in inputs_of(both)["wing"]
    assert target_of(both).tolist() == [1.0] * 6
    moved = map_nodes(inputs_of(both), lambda x, of: x + of[:, None])
    assert moved["wing"].x[:, 0].tolist() == [0.0] * 3 + [1.0] * 3


# Copies and perturbations


def test_copies_of_graphs_can_take_part_in_a_backward_pass() -> None:
    with torch.inference_mode():
        graphs = batch()
        copied = normal((graphs, torch.ones(2)))
    tensors = [v for v in copied[0].to_dict().values() if isinstance(v, Tensor)]
    assert [t.is_inference() for t in tensors] == [False] * len(tensors)
    assert graphs.x.is_inference()
    assert copied[0].x.data_ptr() != graphs.x.data_ptr()
    assert torch.equal(copied[0].x, graphs.x)
    assert not copied[1].is_inference()


def test_noise_on_graphs_has_one_random_size_a_graph_and_leaves_edges_alone() -> None:
    torch.manual_seed(0)
    graphs = Batch.from_data_list([ring(0, nodes=200) for _ in range(100)])
    graphs.y, before = torch.zeros(100), graphs.x.clone()
    noisy = RandomNoise(2.0)(graphs)
    sizes = (noisy.x - before).reshape(100, -1).std(1)
    assert sizes.mean().item() == pytest.approx(1.0, abs=0.15)  # of U(0, 2)
    assert sizes.max().item() < 2.0 * 1.2
    assert sizes.min().item() < 0.2
    assert torch.equal(noisy.edge_attr, graphs.edge_attr)
    assert not noisy.y.any()
    assert torch.equal(graphs.x, before)
    assert RandomNoise(5.0, low=0.0, high=1.0)(graphs).x.aminmax() == (0.0, 1.0)


def test_graphs_are_chosen_one_by_one() -> None:
    plain = batch(labelled=False)
    other = map_nodes(plain, lambda x, _: x + 1)
    mixed = chosen_graphs(torch.tensor([True, False, True]), other, plain)
    difference = (mixed.x - plain.x).reshape(3, -1).mean(1)
    assert difference.tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert torch.equal(mixed.edge_index, plain.edge_index)


# Conditioning


@pytest.mark.parametrize("given", [None, torch.tensor([[1.0], [2.0], [3.0]])])
def test_a_forward_that_takes_the_prior_gets_one_row_a_graph(given: Tensor | None) -> None:
    class Net(nn.Module):
        def forward(self, graphs: Any, prior: Tensor | None = None) -> Tensor | None:
            return prior

    net, argument = Net(), ForwardArgument()
    argument.attach(net, ValuePrior(mean=0.0, std=1.0))
    with argument.given(given):
        prior = net(batch())
    expected = [[0.0, 0.0]] * 3 if given is None else [[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]
    assert prior.tolist() == expected


def test_a_forward_called_with_one_graph_says_what_is_expected() -> None:
    net, argument = nn.Identity(), ForwardArgument()
    argument.attach(net, ValuePrior(mean=0.0, std=1.0))
    with pytest.raises(ValueError, match=r"a tensor \(B, \.\.\.\) or a batch of graphs, got Data"):
        net(ring(0))


# Against the same network written out with plain functions


class ByHand(nn.Module):
    """The network of :func:`regressor` on rings ``(B, nodes, 4)`` and edges ``(B, 2 nodes, 2)``."""

    def __init__(self, model: LightningModule) -> None:
        super().__init__()
        names = dict(model.named_parameters())
        own = {k: v for k, v in names.items() if k.startswith("network")}
        self.weights = nn.ParameterDict(
            {k.replace(".", "-"): v.detach().clone() for k, v in own.items()}
        )
        embedder = "it3_conditioning.embedders.network-context"
        self.embedder = {
            k[len(embedder) + 1 :]: v.detach().clone() for k, v in names.items() if embedder in k
        }

    def linear(self, name: str, x: Tensor) -> Tensor:
        weight, bias = (self.weights[f"network-{name}-{part}"] for part in ("weight", "bias"))
        outputs: Tensor = x @ weight.T + bias
        return outputs

    def embedded(self, prior: Tensor) -> Tensor:
        hidden = (prior @ self.embedder["first.weight"].T + self.embedder["first.bias"]).relu()
        return hidden @ self.embedder["last.weight"].T + self.embedder["last.bias"]

    def conv(self, index: int, h: Tensor, edges: Tensor) -> Tensor:
        """The mean over both neighbours of a mixture of Gaussians, and the node's own term."""
        g, mu, sigma, bias = (
            self.weights[f"network-convs-{index}-{part}"] for part in ("g", "mu", "sigma", "bias")
        )
        forth, back = edges[:, :NODES], edges[:, NODES:]
        sums: Tensor = h @ self.weights[f"network-convs-{index}-root-weight"].T + bias
        for k in range(KERNELS):
            theta = g[:, k * HIDDEN : (k + 1) * HIDDEN]
            for way, neighbour in ((forth.roll(1, 1), h.roll(1, 1)), (back, h.roll(-1, 1))):
                gauss = (-0.5 * ((way - mu[k]) / sigma[k]).square().sum(-1, keepdim=True)).exp()
                sums = sums + gauss * (neighbour @ theta) / 2
        return sums

    def forward(self, x: Tensor, edges: Tensor, prior: Tensor | None) -> Tensor:
        h = self.linear("embed", x)
        if prior is not None:
            h = h + self.embedded(prior)[:, None]
        h = h.relu()
        for index in range(2):
            h = self.conv(index, h, edges).relu()
        return self.linear("head", self.linear("dense", h.mean(1)).relu())


def dense(graphs: Any) -> tuple[Tensor, Tensor]:
    """The node features and the edges of a batch of rings, one row a ring."""
    return graphs.x.reshape(-1, NODES, 4), graphs.edge_attr.reshape(-1, 2 * NODES, 2)


def label(outputs: Tensor) -> Tensor:
    return (outputs - 2.0) / 2.0


def adapting(**settings: Any) -> IT3TestTimeCallback:
    given = {"objective": Idempotence("l1"), "optimizer": "sgd", "lr": 0.02, "steps": 2, **settings}
    return IT3TestTimeCallback(**given)


def loaders(*, labelled: bool = True) -> Any:
    if labelled:
        return GraphLoader(rings(), batch_size=3)
    pairs = [(graph, torch.tensor([float(i)])) for i, graph in enumerate(rings(labelled=False))]
    return GraphLoader(pairs, batch_size=3)


@pytest.mark.parametrize("prior", [None, torch.tensor([[0.5], [-1.0], [2.0]])])
def test_network_and_injected_prior_are_what_they_are_by_hand(prior: Tensor | None) -> None:
    model, graphs = regressor(), batch()
    flagged = None if prior is None else prior
    with torch.no_grad():
        actual = model.predict_with(graphs, prior)
        expected = ByHand(model)(*dense(graphs), flagged)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("reset", ["batch", "never"])
def test_adapted_predictions_are_those_of_plain_torch(labelled: bool, reset: Any) -> None:
    model = regressor()
    plain = ByHand(model)

    def predict(net: nn.Module, graphs: Any, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net(*dense(graphs), prior)
        return outputs

    batches: Any = [Batch.from_data_list(rings()[i : i + 3]) for i in (0, 3)]
    records = adapt_stream(
        plain,
        batches,
        predict=predict,
        to_label=label,
        lr=0.02,
        steps=2,
        distance="l1",
        reset=reset,
    )
    source: Any = quiet().predict(model, loaders(labelled=labelled))
    before = everything(model)
    trainer = quiet(callbacks=[adapting(reset=reset)])
    adapted: Any = trainer.predict(model, loaders(labelled=labelled))
    assert differing(before, everything(model)) == []
    for still, moved, record in zip(source, adapted, records, strict=True):
        torch.testing.assert_close(still, record.y0)
        torch.testing.assert_close(moved, record.outputs, rtol=1e-4, atol=1e-5)
        assert (moved - still).abs().max() > 1e-3


# Laws


def test_labels_of_graphs_never_reach_adaptation() -> None:
    class Watched(IT3Regressor):
        def it3_forward(self, inputs: Any) -> Tensor:
            assert "y" not in inputs
            return super().it3_forward(inputs)

    def run(shift: float) -> Tensor:
        graphs = rings()
        for graph in graphs:
            graph.y = graph.y + shift
        model = seeded(
            Watched(
                GraphNet(hidden=HIDDEN, depth=2, kernels=KERNELS),
                prior=ValuePrior(mean=2.0, std=2.0),
                conditioning=FeatureInjection("network.context", hidden=3),
            )
        )
        loader = GraphLoader(graphs, batch_size=3)
        return torch.cat(quiet(callbacks=[adapting()]).predict(model, loader))  # type: ignore[arg-type]

    assert torch.equal(run(0.0), run(100.0))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_test_run_logs_the_error_of_the_adapted_predictions(labelled: bool) -> None:
    model = regressor()
    predictions: Any = quiet(callbacks=[adapting()]).predict(model, loaders())
    error = (torch.cat(predictions)[:, 0] - torch.arange(6.0)).abs().mean()
    before = everything(model)
    (logged,) = quiet(callbacks=[adapting()]).test(model, loaders(labelled=labelled), verbose=False)
    assert logged["test_mae"] == pytest.approx(error.item(), rel=1e-5)
    assert logged["it3/distance_adapted"] < logged["it3/distance_source"]
    assert differing(before, everything(model)) == []


def test_neutral_pass_is_the_plain_network_bit_for_bit() -> None:
    model, graphs = regressor(), batch()
    plain = GraphNet(hidden=HIDDEN, depth=2, kernels=KERNELS)
    plain.load_state_dict(model.network.state_dict())
    assert torch.equal(model.predict_with(graphs, None), plain(graphs))


# Training


def fit(model: LightningModule, graphs: Any) -> None:
    quiet(max_epochs=2).fit(model, graphs, graphs)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("passes", ["dual", "single"])
def test_joint_training_on_graphs_moves_network_and_conditioning(
    labelled: bool, passes: Any
) -> None:
    torch.manual_seed(0)
    settings = DualPass(passes=passes, perturb_inputs=RandomNoise(0.1), own_share=0.5)
    model = regressor(prior=ValuePrior(), dual_pass=settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, loaders(labelled=labelled))
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert still == []
    assert model.it3_prior is not None
    assert model.it3_prior.get_buffer("mean").item() == pytest.approx(2.5)  # of 0, 1, ..., 5


def test_joint_loss_is_that_of_both_passes_by_hand() -> None:
    model = regressor(dual_pass=DualPass(perturb_prior=False))
    graphs = batch()
    loss = model.it3_loss(graphs, lambda y, target: (y - target).square().mean())
    plain = ByHand(model)
    outputs = [plain(*dense(graphs), prior) for prior in (None, label(graphs.y))]
    expected = sum((y - graphs.y).square().mean() for y in outputs)
    torch.testing.assert_close(loss, expected)


def test_post_hoc_training_leaves_the_network_as_it_is() -> None:
    model = regressor(train="conditioning")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit(model, loaders())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.partition(".")[0] for name in moved} == {"it3_conditioning"}


# The network


def relabelled(graph: Data, order: Tensor) -> Data:
    """The same graph with its nodes in another order, and its edges shuffled."""
    place = order.argsort()
    edges = torch.randperm(graph.edge_index.shape[1], generator=torch.Generator().manual_seed(1))
    return Data(
        x=graph.x[order],
        edge_index=place[graph.edge_index][:, edges],
        edge_attr=graph.edge_attr[edges],
    )


def test_order_of_nodes_and_edges_does_not_matter() -> None:
    net, graph = regressor().network.double(), ring(0, nodes=9)
    graph.x, graph.edge_attr = graph.x.double(), graph.edge_attr.double()
    other = relabelled(graph, torch.randperm(9, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(graph.x, other.x)
    torch.testing.assert_close(net(graph), net(other), rtol=1e-12, atol=1e-12)


def test_a_batch_of_graphs_is_the_graphs_one_by_one() -> None:
    net, graphs = regressor().network.double(), [ring(i, nodes=4 + i) for i in range(4)]
    for graph in graphs:
        graph.x, graph.edge_attr = graph.x.double(), graph.edge_attr.double()
    together = net(Batch.from_data_list(graphs))
    torch.testing.assert_close(together, torch.cat([net(graph) for graph in graphs]))
    assert together.shape == (4, 1)


def test_network_refuses_numbers_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"at least 1, got \(4, 1, 2, 32, 0, 4\)"):
        GraphNet(depth=0)


def test_without_the_library_the_network_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[graphs\]'"):
        GraphNet()
