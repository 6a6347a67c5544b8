"""The gate: samples within it do not move the weights, and the others do as if they came alone."""

import copy
from typing import Any

import pytest
import torch
from helpers.modules import bits, changed, images, same, stream, takes_prior, toy
from helpers.reference import Record, _source, adapt_stream, forward_predict, softmax_label
from torch import Tensor, nn
from torch.func import functional_call

from it3_lightning.engine import Adaptation, BatchAdapter, SampleAdapter, Settings
from it3_lightning.methods import Idempotence

PUBLISHED = Idempotence("l2", None)
EVERYTHING, NOTHING = float("inf"), -1.0
BACKENDS = ("vectorised", "loop")


def distances(net: nn.Module, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """Measure with the source in the second pass, by hand."""
    y0 = functional_call(net, weights or {}, (x,)).softmax(1)
    measure: Tensor = (y0 - net(x, y0).softmax(1)).square().sum(1)
    return measure.detach()


GATE = float(distances(toy(), images()).sort().values[2:4].mean())  # three of six are within


def batch_adapter(net: nn.Module, forward: Any = None, **given: Any) -> BatchAdapter:
    made = Settings(**{"objective": PUBLISHED, "lr": 0.05, **given})
    enters: Any = {"dense": "output"} if isinstance(net, type(toy())) else {}
    return BatchAdapter(net, forward or takes_prior(net), softmax_label, made, enters=enters)


def sample_adapter(net: nn.Module, **given: Any) -> SampleAdapter:
    made = Settings(**{"scope": "sample", "objective": PUBLISHED, "lr": 0.05, **given})
    enters: Any = {"dense": "output"}
    return SampleAdapter(net, takes_prior(net), softmax_label, made, enters=enters)


def adapted(adapter: BatchAdapter | SampleAdapter, inputs: Any) -> tuple[Adaptation, Any]:
    with adapter.adapted(inputs) as adaptation:
        return adaptation, {k: v.clone() for k, v in adaptation.weights.items()}


def by_reference(net: nn.Module, batches: list[Tensor], **given: Any) -> list[Record]:
    return adapt_stream(
        net, batches, predict=forward_predict, to_label=softmax_label, **{"lr": 0.05, **given}
    )


def assert_close(actual: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [batch_adapter, sample_adapter])
def test_a_sample_whose_distance_is_the_gate_is_within(make: Any) -> None:
    net, x = toy(), images()
    measured, _ = adapted(make(net, steps=0), x)
    assert measured.distance_source is not None
    gate = float(measured.distance_source.median())
    found, _ = adapted(make(net, gate=gate), x)
    assert found.gated is not None
    assert torch.equal(found.gated, measured.distance_source <= gate)
    assert 0 < int((measured.distance_source < gate).sum()) < int(found.gated.sum()) < 6


# Scope batch


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_a_batch_adapts_to_the_samples_beyond_the_gate(anchor: str, steps: int) -> None:
    net, x = toy(), images()
    within = distances(net, x) <= GATE
    assert within.sum() == 3
    given = {"anchor": anchor, "steps": steps, "ema_decay": 0.5, "optimizer": "adam"}
    (record,) = by_reference(net, [x[~within]], **given)
    before = bits(net)
    adaptation, weights = adapted(batch_adapter(net, gate=GATE, **given), x)
    assert changed(before, net) == []
    assert adaptation.gated is not None
    assert torch.equal(adaptation.gated, within)
    assert adaptation.reliable is not None
    assert torch.equal(adaptation.reliable, ~within)
    for name, value in weights.items():
        assert_close(value, record.weights[name])
    assert_close(adaptation.outputs, functional_call(net, record.weights, (x,)).detach())
    assert_close(adaptation.source_outputs, net(x).detach())
    assert_close(adaptation.distance_source, distances(net, x))
    y0 = functional_call(net, record.weights, (x,)).softmax(1)
    y1 = functional_call(net, record.anchor, (x, y0)).softmax(1)
    assert_close(adaptation.distance_adapted, (y0 - y1).square().sum(1).detach())
    assert not adaptation.skipped.any()


def test_samples_beyond_the_gate_may_be_unreliable() -> None:
    net, x = toy(), images()
    objective = Idempotence("l2", 0.45, sharpen=0.0)
    expected, _ = adapted(batch_adapter(net, objective=objective), x)
    adaptation, weights = adapted(batch_adapter(net, objective=objective, gate=GATE), x)
    assert expected.reliable is not None
    beyond = distances(net, x) > GATE
    moves = expected.reliable & beyond
    assert moves.any()
    assert not torch.equal(moves, beyond)
    assert adaptation.reliable is not None
    assert torch.equal(adaptation.reliable, moves)
    (record,) = by_reference(net, [x[moves]], optimizer="adam")
    for name, value in weights.items():
        assert_close(value, record.weights[name])


def test_with_batch_statistics_all_samples_are_seen_but_only_those_beyond_move() -> None:
    net, x = toy(), images()
    whole = _source(net, "batch")
    adapting = copy.deepcopy(whole).requires_grad_(True)
    y0 = adapting(x).softmax(1)
    measure = (y0 - whole(x, y0).softmax(1)).square().sum(1)
    gate = float(measure.detach().median())
    torch.autograd.backward(measure[measure > gate].mean())
    torch.optim.SGD(adapting.parameters(), lr=0.05).step()
    given = {"norm_stats": "batch", "optimizer": "sgd", "gate": gate}
    adaptation, _ = adapted(batch_adapter(net, **given), x)
    assert_close(adaptation.outputs, adapting(x).detach())
    assert_close(adaptation.distance_source, measure.detach())
    assert adaptation.gated is not None
    assert torch.equal(adaptation.gated, measure <= gate)


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
@pytest.mark.parametrize("measure", [True, False])
def test_a_closed_gate_is_the_source(measure: bool, norm_stats: str) -> None:
    net, x = toy(), images()
    given = {"gate": EVERYTHING, "measure": measure, "norm_stats": norm_stats, "steps": 3}
    adapter = batch_adapter(net, **given)
    with adapter.adapted(x) as adaptation:
        inside = net(x)
    expected, _ = adapted(batch_adapter(net, steps=0, norm_stats=norm_stats), x)
    assert same([(inside, expected.outputs)])
    assert adaptation.gated is not None
    assert adaptation.gated.all()
    assert adaptation.reliable is not None
    assert not adaptation.reliable.any()
    assert adaptation.backwards == 0
    assert same((value, net.get_parameter(name)) for name, value in adaptation.weights.items())


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
def test_an_open_gate_changes_nothing(norm_stats: str) -> None:
    given = {"norm_stats": norm_stats, "steps": 2, "anchor": "ema"}
    for x in stream(2):
        expected, _ = adapted(batch_adapter(toy(), **given), x)
        adaptation, _ = adapted(batch_adapter(toy(), gate=NOTHING, **given), x)
        for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
            assert same([(getattr(adaptation, name), getattr(expected, name))])
        assert adaptation.gated is not None
        assert not adaptation.gated.any()


def test_online_weights_are_gated_by_their_own_distance() -> None:
    net, batches = toy(), stream(4)
    adapter = batch_adapter(net, gate=GATE, reset="never", optimizer="sgd")
    carried: dict[str, Tensor] = {}
    moved, found = [], []
    for x in batches:
        within = distances(net, x, carried) <= GATE
        adaptation, carried = adapted(adapter, x)
        assert adaptation.gated is not None
        assert torch.equal(adaptation.gated, within)
        assert_close(adaptation.distance_source, distances(net, x))
        if not within.all():
            moved.append(x[~within])
            found.append(carried)
    assert 0 < sum(len(x) for x in moved) < 24
    records = by_reference(net, moved, optimizer="sgd", reset="never")
    for weights, record in zip(found, records, strict=True):
        for name, value in weights.items():
            assert_close(value, record.weights[name])


def test_a_batch_with_a_sample_that_is_not_finite_is_skipped() -> None:
    net, x = toy(), images()
    x[0] = torch.nan
    adaptation, _ = adapted(batch_adapter(net, gate=GATE), x)
    assert adaptation.reason == "non-finite output"
    assert adaptation.skipped.all()


def test_batches_that_cannot_be_taken_apart_are_gated_all_the_same() -> None:
    class Graphs:
        num_graphs = 6

        def __init__(self, nodes: Tensor) -> None:
            self.nodes = nodes

    net, x = toy(), images()

    def forward(graphs: Graphs, prior: Tensor | None) -> Tensor:
        return forward_predict(net, graphs.nodes, prior)

    adaptation, weights = adapted(batch_adapter(net, forward, gate=GATE, steps=2), Graphs(x))
    expected, others = adapted(batch_adapter(net, gate=GATE, steps=2), x)
    assert_close(adaptation.outputs, expected.outputs)  # type: ignore[arg-type]
    for name, value in weights.items():
        assert_close(value, others[name])


def test_samples_beyond_the_gate_are_taken_out_where_it_is_told_what_holds_them() -> None:
    net, x, sizes = toy(), images(), list[int]()
    shared = torch.ones(6, dtype=torch.float64)  # as long as the batch

    def forward(inputs: Any, prior: Tensor | None) -> Tensor:
        sizes.append(len(inputs["x"]))
        assert len(inputs["shared"]) == 6
        return forward_predict(net, inputs["x"], prior)

    made = Settings(objective=PUBLISHED, lr=0.05, gate=GATE)
    found = []
    for dims in ({"shared": None}, None):
        told: Any = {} if dims is None else {"sample_dims": lambda _, dims=dims: dims}
        adapter = BatchAdapter(net, forward, softmax_label, made, **told)
        sizes.clear()
        found.append(adapted(adapter, {"x": x, "shared": shared})[0])
        assert sizes == [6, 6, *([6, 6] if dims is None else [3, 3]), 6, 6]
    (record,) = by_reference(net, [x[distances(net, x) > GATE]], optimizer="adam")
    for each in found:
        assert_close(each.outputs, functional_call(net, record.weights, (x,)).detach())


@pytest.mark.parametrize("answers", [True, False])
def test_a_closed_gate_answers_with_the_source_in_as_few_passes(answers: bool) -> None:
    net, x = toy(), images()
    adapter = batch_adapter(net, gate=EVERYTHING)
    answer: Any = (lambda inputs: (net(inputs), {"twice": 2 * net(inputs)})) if answers else None
    with adapter.adapted(x, answer) as adaptation:
        pass
    assert_close(adaptation.outputs, net(x).detach())
    if answers:
        assert_close(adaptation.answers["twice"], 2 * net(x).detach())
    else:
        assert adaptation.answers is None
        assert adaptation.forwards == 2  # the gate's own


# Scope sample


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("measure", [True, False])
def test_samples_within_the_gate_keep_the_source_prediction(measure: bool, backend: str) -> None:
    net, x = toy(), images()
    within = distances(net, x) <= GATE
    given = {"steps": 2, "backend": backend, "measure": measure}
    all_adapted, _ = adapted(sample_adapter(net, **given), x)
    adaptation, _ = adapted(sample_adapter(net, gate=GATE, **given), x)
    source = forward_predict(net, x, None).detach()
    assert adaptation.outputs is not None
    assert torch.equal(adaptation.outputs[within], source[within])
    assert all_adapted.outputs is not None
    assert_close(adaptation.outputs[~within], all_adapted.outputs[~within])
    assert adaptation.gated is not None
    assert torch.equal(adaptation.gated, within)
    assert adaptation.reliable is not None
    assert torch.equal(adaptation.reliable, ~within)
    assert_close(adaptation.distance_source, distances(net, x))
    if measure:
        expected = torch.where(within, distances(net, x), all_adapted.distance_adapted)  # type: ignore[arg-type]
        assert_close(adaptation.distance_adapted, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [EVERYTHING, NOTHING, GATE])
def test_a_bad_sample_does_not_open_the_gate_for_others(gate: float, backend: str) -> None:
    net, x = toy(), images()
    good, _ = adapted(sample_adapter(net, gate=gate, backend=backend), x)
    x[2] = torch.nan
    bad, _ = adapted(sample_adapter(net, gate=gate, backend=backend), x)
    others = [0, 1, 3, 4, 5]
    for name in ("outputs", "distance_source", "distance_adapted", "gated", "reliable"):
        torch.testing.assert_close(getattr(bad, name)[others], getattr(good, name)[others])
    assert bad.skipped.tolist() == [index == 2 for index in range(6)]
    assert bad.reason == "non-finite output"
    assert bad.gated is not None
    assert not bad.gated[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sample_is_gated_as_if_alone(backend: str) -> None:
    net, x = toy(), images()
    whole, _ = adapted(sample_adapter(net, gate=GATE, backend=backend), x)
    for index in range(6):
        alone, _ = adapted(sample_adapter(net, gate=GATE, backend=backend), x[index : index + 1])
        assert whole.outputs is not None
        assert_close(alone.outputs, whole.outputs[index : index + 1])
        assert alone.gated is not None
        assert whole.gated is not None
        assert alone.gated[0] == whole.gated[index]
