"""Scope `sample`: both backends give what each sample gives alone, in any batch and any mode."""

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.alone_run import DTYPES, STEPS, settings
from helpers.modules import bits, changed, images, same, takes_prior, toy
from helpers.reference import OPTIMIZERS, Record, adapt_stream, forward_predict, softmax_label
from helpers.zoo import KINDS, RESNET, Kind, rows, singles
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, SampleAdapter, Settings
from it3_lightning.integration.batches import normal
from it3_lightning.methods import Entropy, Idempotence, Objective

TESTS = Path(__file__).parents[1]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
BACKENDS = ("vectorised", "loop")


def adapter_of(net: nn.Module, enters: Any = None, **given: Any) -> SampleAdapter:
    published = {"objective": Idempotence("l2", None), "lr": 0.01, "backend": "vectorised"}
    made = Settings(**{"scope": "sample", **published, **given})
    return SampleAdapter(net, takes_prior(net), softmax_label, made, enters=enters or {})


def adapted(adapter: SampleAdapter, inputs: Any) -> Adaptation:
    with adapter.adapted(inputs) as adaptation:
        return adaptation


def backend_of(adapter: SampleAdapter) -> str:
    assert adapter.backend_selection is not None
    return adapter.backend_selection.backend


def assert_close(actual: Tensor | None, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def by_reference(net: nn.Module, inputs: Any, **given: Any) -> list[Record]:
    return adapt_stream(
        net, singles(inputs), predict=forward_predict, to_label=softmax_label, **given
    )


def assert_is_reference(adaptation: Adaptation, records: list[Record], atol: float) -> None:
    for actual, name in (
        (adaptation.outputs, "outputs"),
        (adaptation.source_outputs, "y0"),
        (adaptation.distance_source, "distance_source"),
        (adaptation.distance_adapted, "distance_after"),
    ):
        assert_close(actual, torch.cat([getattr(record, name) for record in records]), atol)
    assert not adaptation.skipped.any()


# Every kind of network: alone in a fresh process, by the plain reference, in a loop, vectorised


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The outputs of every sample adapted to by itself, in a process that saw nothing else."""
    path = tmp_path_factory.mktemp("alone") / "outputs.pt"
    subprocess.run(
        [sys.executable, "-m", "helpers.alone_run", str(path)],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent)))},
        check=True,
        timeout=120,
        capture_output=True,
    )
    found: dict[str, Tensor] = torch.load(path)
    return found


def assert_is_alone(
    kind: Kind, dtype: torch.dtype, steps: int, alone: Tensor, atol: float | None = None
) -> None:
    net, inputs = kind.build(dtype), kind.batch(len(alone), dtype)
    records = by_reference(net, inputs, steps=steps, lr=1e-3, optimizer="adam")
    before = bits(net)
    for backend in BACKENDS:
        adapter = adapter_of(net, kind.enters, **settings(steps), backend=backend)
        adaptation = adapted(adapter, inputs)
        assert backend_of(adapter) == backend
        assert_is_reference(adaptation, records, atol or CLOSE[dtype])
        assert_close(adaptation.outputs, alone, atol or CLOSE[dtype])
        assert adaptation.cache_hits > 0  # of the passes, the part before the prior is known
    assert changed(before, net) == []
    moved = alone - torch.cat([record.y0 for record in records])
    assert moved.abs().max() > 1e-3


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_both_backends_equal_each_sample_alone(
    kind: str, dtype: str, steps: str, alone: dict[str, Tensor]
) -> None:
    expected = alone[f"{kind}, {dtype}, {steps}"]
    assert_is_alone(KINDS[kind], DTYPES[dtype], STEPS[steps], expected)


def test_both_backends_equal_each_sample_alone_on_resnet18(alone: dict[str, Tensor]) -> None:
    """Its outputs are of about 10, so that 1e-5 of them is 1e-4."""
    assert_is_alone(RESNET, torch.float32, 1, alone["resnet"], atol=1e-4)


# Every setting, by the plain reference

SELECTIONS: dict[str, tuple[Any, Callable[[str], bool]]] = {
    "all": ("all", lambda _: True),
    "norm": ("norm", lambda name: name.startswith("bn.")),
    "bias": ("bias", lambda name: name.endswith("bias")),
    "patterns": (["conv.*", "head.w*"], lambda name: name.startswith(("conv", "head.w"))),
}
OTHERS: dict[str, dict[str, Any]] = {
    "clipped": {"grad_clip": 1e-3},
    "filtered": {"reliability": 0.45},
    "sharpened": {"reliability": 0.45, "sharpen": 1.0, "grad_clip": 0.01},
    "other distance": {"distance": "js"},
    **{name: {"selection": name} for name in SELECTIONS if name != "all"},
}


def assert_agrees_with_the_reference(
    anchor: str, steps: int, optimizer: str, **others: Any
) -> Adaptation:
    net, inputs = toy(), images(5)
    adapting, predicate = SELECTIONS[others.pop("selection", "all")]
    common = {"lr": 0.02, "steps": steps, "anchor": anchor, "ema_decay": 0.7}
    clip = others.pop("grad_clip", None)
    terms = {"distance": others.get("distance", "l2"), "sharpen": others.get("sharpen", 0.0)}
    reliability = others.get("reliability")
    filtered = {"filtered": reliability is not None, "confidence": reliability or 0.0}
    expected = {**common, **terms, **filtered, "optimizer": optimizer, "grad_clip": clip}
    records = by_reference(net, inputs, parameters=predicate, **expected)
    given: Any = optimizer
    if optimizer == "momentum":
        given = lambda parameters: OPTIMIZERS["momentum"](parameters, lr=0.02)  # noqa: E731
    for backend in BACKENDS:
        adapter = adapter_of(
            net,
            {"dense": "output"},
            **common,
            optimizer=given,
            grad_clip=clip,
            objective=Idempotence(terms["distance"], reliability, 0.0, terms["sharpen"]),
            parameters=adapting,
            backend=backend,
        )
        adaptation = adapted(adapter, inputs)
        assert backend_of(adapter) == backend
        assert_is_reference(adaptation, records, 1e-10)
    return adaptation


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_both_backends_equal_the_reference(anchor: str, steps: int, optimizer: str) -> None:
    assert_agrees_with_the_reference(anchor, steps, optimizer)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
@pytest.mark.parametrize("others", OTHERS)
def test_both_backends_equal_the_reference_with(anchor: str, steps: int, others: str) -> None:
    adaptation = assert_agrees_with_the_reference(anchor, steps, "adam", **OTHERS[others])
    if "reliability" in OTHERS[others]:
        assert adaptation.reliable is not None
        assert 0 < int(adaptation.reliable.sum()) < 5  # some samples move the weights


@pytest.mark.parametrize("decay", ["weight decay", "averaging"])
def test_weights_without_influence_do_not_decay_in_either_backend(decay: str) -> None:
    net, inputs = toy(), images(3)  # nothing of the first pass depends on `embed`

    def factory(parameters: Any) -> torch.optim.Optimizer:
        if decay == "averaging":
            return torch.optim.ASGD(parameters, lr=0.5, lambd=0.1)
        return torch.optim.SGD(parameters, lr=0.5, weight_decay=0.1)

    def run(backend: str) -> Tensor | None:
        settings = {"anchor": "ema", "ema_decay": 0.0, "steps": 3, "optimizer": factory}
        return adapted(adapter_of(net, backend=backend, **settings), inputs).outputs

    expected = run("loop")
    assert expected is not None
    assert_close(run("vectorised"), expected, 1e-10)


@pytest.mark.parametrize("anchor", ["frozen", "ema"])
def test_samples_that_are_or_become_unreliable_stand_still(anchor: str) -> None:
    def factory(parameters: Any) -> torch.optim.Optimizer:  # moves without a gradient, too
        return torch.optim.SGD(parameters, lr=5.0, momentum=0.9, weight_decay=0.05)

    def run(backend: str, steps: int) -> Tensor:
        adapter = adapter_of(
            toy(),
            objective=Idempotence("l2", 0.45, sharpen=0.0),
            backend=backend,
            steps=steps,
            anchor=anchor,
            optimizer=factory,
        )
        outputs = adapted(adapter, images(12)).outputs
        assert outputs is not None
        assert backend_of(adapter) == backend
        return outputs

    source = forward_predict(toy(), images(12), None)
    once, four, six = (run("loop", steps) for steps in (1, 4, 6))
    for steps, expected in ((1, once), (4, four), (6, six)):
        torch.testing.assert_close(run("vectorised", steps), expected, rtol=1e-9, atol=1e-9)
    unreliable = ((once - source).abs() < 1e-9).all(1)
    halted = ((four - six).abs() < 1e-9).all(1) & ~unreliable
    assert unreliable.any()
    assert halted.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_term_moves_unreliable_samples_too(backend: str) -> None:
    class Sharper:
        """Counts no sample as reliable, and lowers the second moment of the outputs."""

        needs_batch = False

        def __call__(self, y0: Tensor, second: Any) -> Objective:
            nothing = torch.zeros(len(y0), dtype=torch.bool, device=y0.device)
            return Objective(y0[:, 0].square(), nothing, y0.square().sum())

    net, inputs = toy(), images(3)
    objective = Sharper()
    adapter = adapter_of(net, objective=objective, optimizer="sgd", lr=0.1, backend=backend)
    found = adapted(adapter, inputs).outputs
    for index in range(3):
        copied = copy.deepcopy(net)
        torch.autograd.backward(copied(inputs[index : index + 1]).softmax(1).square().sum())
        torch.optim.SGD(copied.parameters(), lr=0.1).step()
        assert found is not None
        expected = copied(inputs[index : index + 1]).detach()
        assert_close(found[index : index + 1], expected, 1e-10)


def test_an_optimizer_may_treat_weights_by_their_shape() -> None:
    def factory(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        matrices = {"params": [p for p in given if p.ndim > 1], "lr": 0.1, "weight_decay": 0.3}
        vectors = {"params": [p for p in given if p.ndim == 1], "lr": 0.001}
        return torch.optim.AdamW([matrices, vectors])

    net, inputs = KINDS["mlp"].build(), images(3)
    found = [
        adapted(adapter_of(net, backend=backend, optimizer=factory, steps=3), inputs).outputs
        for backend in BACKENDS
    ]
    assert found[1] is not None
    assert_close(found[0], found[1], 1e-10)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_gradients_that_share_memory_move_each_weight_once(optimizer: str, steps: int) -> None:
    class Sum(nn.Module):
        """Autograd gives `a` and `b` the same gradient, and `part` a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Parameter(torch.full((1, 2), 0.5))
            self.a, self.b = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(1, 3))

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            last = torch.cat([self.part, torch.zeros_like(self.part[:, :1])], 1)
            out = x.flatten(1)[:, :3] + (self.a + self.b + last)
            return out if prior is None else out + prior

    net, inputs = Sum().double(), images(4)
    given = {"lr": 0.1, "optimizer": optimizer, "steps": steps}
    records = by_reference(net, inputs, **given)
    for backend in BACKENDS:
        adapter = adapter_of(net, **given, backend=backend)
        assert_is_reference(adapted(adapter, inputs), records, 1e-10)
        assert backend_of(adapter) == backend


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_may_lie_in_memory_in_any_way(steps: int) -> None:
    net, inputs = toy(), images(4)
    net.to(memory_format=torch.channels_last)
    net.dense.weight = nn.Parameter(net.dense.weight.detach().T.contiguous().T)
    for optimizer in ("sgd", "adam"):
        records = by_reference(net, inputs, lr=0.02, optimizer=optimizer, steps=steps)
        for backend in BACKENDS:
            adapter = adapter_of(net, lr=0.02, optimizer=optimizer, steps=steps, backend=backend)
            assert_is_reference(adapted(adapter, inputs), records, 1e-10)


def test_entropy_takes_one_pass_a_step_in_both_backends() -> None:
    net, inputs = toy(), images(4)
    settings = {"objective": Entropy(), "steps": 3}
    loop = adapted(adapter_of(net, backend="loop", **settings), inputs)
    at_once = adapted(adapter_of(net, **settings), inputs)
    assert loop.outputs is not None
    assert_close(at_once.outputs, loop.outputs, 1e-10)
    assert (at_once.forwards, at_once.backwards) == (3 + 1, 3)
    assert (loop.forwards, loop.backwards) == (4 * (3 + 1), 4 * 3)


@pytest.mark.parametrize("measure", [True, False])
def test_passes_are_counted(measure: bool) -> None:
    net, inputs = toy(), images(4)
    for backend, samples in (("loop", 4), ("vectorised", 1)):
        settings = {"steps": 3, "measure": measure, "backend": backend}
        adaptation = adapted(adapter_of(net, **settings), inputs)
        assert adaptation.forwards == samples * (2 * 3 + 1 + measure)
        assert adaptation.backwards == samples * 3


def test_recurrent_layers_of_all_kinds_are_vectorised() -> None:
    class Recurrent(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(3, 3)

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            if isinstance(self.layer, nn.RNNCellBase):
                out: Any = self.layer(x[:, 0, 0])
                out = out[0] if isinstance(out, tuple) else out
            else:
                out = self.layer(x.squeeze(1))[0][:, -1, -3:]
            logits: Tensor = self.head(out)
            return logits if prior is None else logits + prior

    layers = [
        nn.GRU(4, 3, batch_first=True),
        nn.GRU(4, 3, num_layers=2, batch_first=True, bidirectional=True),
        nn.RNN(4, 3, batch_first=True),
        nn.LSTM(4, 5, proj_size=3, batch_first=True),
        nn.LSTMCell(4, 3),
        nn.GRUCell(4, 3),
        nn.RNNCell(4, 3),
    ]
    for layer in layers:
        net, inputs = Recurrent(layer).double().eval(), images(3)
        records = by_reference(net, inputs, lr=0.01, optimizer="adam", steps=2)
        adapter = adapter_of(net, steps=2)
        assert_is_reference(adapted(adapter, inputs), records, 1e-10)
        assert backend_of(adapter) == "vectorised"


@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit"])
def test_no_operation_runs_sample_by_sample(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "filterwarnings", lambda *_, **__: None)  # torch's stay errors
    for dtype in (torch.float32, torch.float64):
        net, inputs = KINDS[kind].build(dtype), KINDS[kind].batch(3, dtype)
        adapter = adapter_of(net, KINDS[kind].enters, steps=2)
        adapted(adapter, inputs)
        assert backend_of(adapter) == "vectorised"


# Whatever comes with a sample


def outputs_of(adapter: SampleAdapter, batches: list[Any]) -> Tensor:
    found = [adapted(adapter, batch).outputs for batch in batches]
    return torch.cat([outputs for outputs in found if outputs is not None])


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("batch norm", "vectorised"),
        ("batch norm", "loop"),
        ("batch norm", "auto"),
        ("lstm", "vectorised"),
        ("graph", "auto"),
    ],
)
def test_a_sample_does_not_depend_on_batch_order_or_chunk(kind: str, backend: str) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(6)
    settings = {"steps": 2, "backend": backend}
    expected = outputs_of(adapter_of(net, **settings), [inputs])
    order = [3, 1, 5, 0, 4, 2]
    parts = [[3, 1], [5], [0, 4, 2]]
    for batches in ([rows(inputs, order)], [rows(inputs, part) for part in parts]):
        found = outputs_of(adapter_of(net, **settings), batches)
        assert_close(found, expected[order], 1e-10)
    for chunk_size in (1, 3, 6):
        adapter = adapter_of(net, chunk_size=chunk_size, **settings)
        assert_close(outputs_of(adapter, [inputs]), expected, 1e-10)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gate", [None, 0.05])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_the_mode(
    mode: Callable[[], Any], gate: float | None, backend: str
) -> None:
    net = toy()
    expected = outputs_of(adapter_of(net, backend=backend, gate=gate), [images()])
    adapter = adapter_of(net, backend=backend, gate=gate)
    with mode():
        inputs = images() * 1  # an inference tensor in inference mode
        found = outputs_of(adapter, [normal(inputs), normal(inputs)])
    assert same([(found[:6], expected), (found[6:], expected)])


# Batches of graphs


def test_batches_of_graphs_go_through_the_loop() -> None:
    data = pytest.importorskip("torch_geometric.data")
    graph_nn = pytest.importorskip("torch_geometric.nn")

    class Graphs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = graph_nn.GCNConv(4, 8)
            self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 3)

        def forward(self, graphs: Any, prior: Tensor | None = None) -> Tensor:
            nodes = self.conv(graphs.x, graphs.edge_index).tanh()
            pooled = graph_nn.global_mean_pool(nodes, graphs.batch)
            pooled = pooled if prior is None else pooled + self.embed(prior)
            logits: Tensor = self.head(pooled)
            return logits

    torch.manual_seed(0)
    net = Graphs().double().eval()
    edges = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = [data.Data(x=torch.randn(3 + i, 4).double(), edge_index=edges) for i in range(3)]
    whole = data.Batch.from_data_list(graphs)
    adapter = adapter_of(net, steps=2)
    with pytest.warns(UserWarning, match=r"torch.func takes tensors, not batches of graphs"):
        adaptation = adapted(adapter, whole)
    records = adapt_stream(
        net,
        [data.Batch.from_data_list([graph]) for graph in graphs],
        predict=forward_predict,
        to_label=softmax_label,
        lr=0.01,
        optimizer="adam",
        steps=2,
    )
    assert backend_of(adapter) == "loop"
    assert_is_reference(adaptation, records, 1e-10)


def test_batches_that_cannot_be_taken_apart_are_refused() -> None:
    class Whole:
        num_graphs = 2

    adapter = adapter_of(nn.Linear(1, 1), backend="loop")
    with (
        pytest.raises(ValueError, match=r"samples can be told apart.*get_example.*got Whole"),
        adapter.adapted(Whole()),
    ):
        pass
