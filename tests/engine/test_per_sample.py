"""Scope `sample`: both backends give what each sample gives alone, in any batch and any mode."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import (
    BACKENDS,
    PUBLISHED,
    adapted,
    assert_close,
    assert_is_reference,
    backend_of,
    by_reference,
    sample_adapter,
)
from helpers.alone_run import DTYPES, STEPS, settings
from helpers.fast import needs_fast_paths, taken
from helpers.modules import bits, changed, images, same, takes_prior, toy
from helpers.reference import OPTIMIZERS, adapt_stream, forward_predict, softmax_label
from helpers.zoo import KINDS, RESNET, Kind
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, BatchAdapter, Forward, SampleAdapter, Settings, fast
from it3_lightning.engine.restore import Snapshot
from it3_lightning.integration.batches import normal
from it3_lightning.methods import Entropy, Idempotence, Objective

TESTS = Path(__file__).parents[1]
CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
both_backends = pytest.mark.parametrize("backend", BACKENDS)


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
        adapter = sample_adapter(net, enters=kind.enters, **settings(steps), backend=backend)
        adaptation = adapted(adapter, inputs)
        assert backend_of(adapter) == taken(backend)
        assert_is_reference(adaptation, records, atol or CLOSE[dtype])
        assert_close(adaptation.outputs, alone, atol or CLOSE[dtype])
        assert (adaptation.cache_hits > 0) == fast.enabled()  # the part before the prior is known
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
    common: dict[str, Any] = {"lr": 0.02, "steps": steps, "anchor": anchor, "ema_decay": 0.7}
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
        adapter = sample_adapter(
            net,
            enters={"dense": "output"},
            **common,
            optimizer=given,
            grad_clip=clip,
            objective=Idempotence(terms["distance"], reliability, 0.0, terms["sharpen"]),
            parameters=adapting,
            backend=backend,
        )
        adaptation = adapted(adapter, inputs)
        assert backend_of(adapter) == taken(backend)
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
        settings: dict[str, Any] = {
            "anchor": "ema",
            "ema_decay": 0.0,
            "steps": 3,
            "optimizer": factory,
        }
        return adapted(sample_adapter(net, backend=backend, **settings), inputs).outputs

    expected = run("loop")
    assert expected is not None
    assert_close(run("vectorised"), expected, 1e-10)


@pytest.mark.parametrize("anchor", ["frozen", "ema"])
def test_samples_that_are_or_become_unreliable_stand_still(anchor: str) -> None:
    def factory(parameters: Any) -> torch.optim.Optimizer:  # moves without a gradient, too
        return torch.optim.SGD(parameters, lr=5.0, momentum=0.9, weight_decay=0.05)

    def run(backend: str, steps: int) -> Tensor:
        adapter = sample_adapter(
            toy(),
            objective=Idempotence("l2", 0.45, sharpen=0.0),
            backend=backend,
            steps=steps,
            anchor=anchor,
            optimizer=factory,
        )
        outputs = adapted(adapter, images(12)).outputs
        assert outputs is not None
        assert backend_of(adapter) == taken(backend)
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
    adapter = sample_adapter(net, objective=objective, optimizer="sgd", lr=0.1, backend=backend)
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
        adapted(sample_adapter(net, backend=backend, optimizer=factory, steps=3), inputs).outputs
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
    given: dict[str, Any] = {"lr": 0.1, "optimizer": optimizer, "steps": steps}
    records = by_reference(net, inputs, **given)
    for backend in BACKENDS:
        adapter = sample_adapter(net, **given, backend=backend)
        assert_is_reference(adapted(adapter, inputs), records, 1e-10)
        assert backend_of(adapter) == taken(backend)


@pytest.mark.parametrize("steps", [1, 3])
def test_gradients_may_lie_in_memory_in_any_way(steps: int) -> None:
    net, inputs = toy(), images(4)
    net.to(memory_format=torch.channels_last)
    net.dense.weight = nn.Parameter(net.dense.weight.detach().T.contiguous().T)
    for optimizer in ("sgd", "adam"):
        records = by_reference(net, inputs, lr=0.02, optimizer=optimizer, steps=steps)
        for backend in BACKENDS:
            adapter = sample_adapter(
                net, lr=0.02, optimizer=optimizer, steps=steps, backend=backend
            )
            assert_is_reference(adapted(adapter, inputs), records, 1e-10)


@needs_fast_paths
def test_entropy_takes_one_pass_a_step_in_both_backends() -> None:
    net, inputs = toy(), images(4)
    settings: dict[str, Any] = {"objective": Entropy(), "steps": 3}
    loop = adapted(sample_adapter(net, backend="loop", **settings), inputs)
    at_once = adapted(sample_adapter(net, **settings), inputs)
    assert loop.outputs is not None
    assert_close(at_once.outputs, loop.outputs, 1e-10)
    assert (at_once.forwards, at_once.backwards) == (3 + 1, 3)
    assert (loop.forwards, loop.backwards) == (4 * (3 + 1), 4 * 3)


@needs_fast_paths
@pytest.mark.parametrize("measure", [True, False])
def test_passes_are_counted(measure: bool) -> None:
    net, inputs = toy(), images(4)
    for backend, samples in (("loop", 4), ("vectorised", 1)):
        settings: dict[str, Any] = {"steps": 3, "measure": measure, "backend": backend}
        adaptation = adapted(sample_adapter(net, **settings), inputs)
        assert adaptation.forwards == samples * (2 * 3 + 1 + measure)
        assert adaptation.backwards == samples * 3


# Whatever comes with a sample


def outputs_of(adapter: SampleAdapter, batches: list[Any]) -> Tensor:
    found = [adapted(adapter, batch).outputs for batch in batches]
    return torch.cat([outputs for outputs in found if outputs is not None])


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("gate", [None, 0.05])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_does_not_depend_on_the_mode(
    mode: Callable[[], Any], gate: float | None, backend: str
) -> None:
    net = toy()
    expected = outputs_of(sample_adapter(net, backend=backend, gate=gate), [images()])
    adapter = sample_adapter(net, backend=backend, gate=gate)
    with mode():
        inputs = images() * 1  # an inference tensor in inference mode
        found = outputs_of(adapter, [normal(inputs), normal(inputs)])
    assert same([(found[:6], expected), (found[6:], expected)])


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [0, 1])
@both_backends
def test_results_are_ordinary_tensors_in_any_mode(
    backend: str, steps: int, mode: Callable[[], Any]
) -> None:
    adapter = sample_adapter(toy(), backend=backend, steps=steps)
    with mode():
        for inputs in (images(), images(seed=1)):
            with adapter.adapted(inputs) as found:
                pass
    tensors = [value for value in vars(found).values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert not any(tensor.is_inference() for tensor in tensors)


@pytest.mark.parametrize("steps", [0, 1])
def test_what_is_interrupted_as_it_is_put_back_is_put_back_at_once(
    steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, own, tried = toy(), Snapshot.restore, []
    before = bits(net)

    def restore(snapshot: Snapshot) -> None:
        tried.append(1)
        if len(tried) == 1:
            raise KeyboardInterrupt
        own(snapshot)

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        if prior is not None:
            raise KeyboardInterrupt
        outputs: Tensor = net(x)
        return outputs

    monkeypatch.setattr(Snapshot, "restore", restore)
    adapter = sample_adapter(net, forward, backend="loop", steps=steps)
    with pytest.raises(KeyboardInterrupt):
        adapted(adapter, images(2))
    assert len(tried) > 1
    assert changed(before, net) == []


class Biased(nn.Module):
    """Adds a table ``(B, 3)`` to its logits: of each sample, or of all."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.net, self.shared = toy(), shared

    def forward(self, inputs: Any, prior: Tensor | None = None) -> Tensor:
        table: Tensor = inputs["table"].sum(0) if self.shared else inputs["table"]
        return table + forward_predict(self.net, inputs["x"], prior)


@both_backends
def test_of_two_tensors_that_may_hold_samples_both_are_checked(backend: str) -> None:
    table = torch.arange(18.0, dtype=torch.float64).view(6, 3)
    inputs = {"x": images(), "table": table}
    net = Biased(shared=False)
    assert_close(
        adapted(sample_adapter(net, backend=backend, steps=0), inputs).outputs,
        forward_predict(net.net, images(), None).detach() + table,
        1e-12,
    )
    one = {"x": images(1), "table": table[:1]}
    for each in (inputs, one):
        assert not adapted(sample_adapter(net, backend=backend), each).skipped.any()
    bad = {"x": images().index_fill(0, torch.tensor(0), torch.nan), "table": table}
    skipped = adapted(sample_adapter(net, backend=backend), bad).skipped
    assert skipped.tolist() == [True, *5 * [False]]
    shared = sample_adapter(Biased(shared=True), backend=backend)
    with pytest.raises(ValueError, match=r"\(6, 1, 4, 4\), \(6, 3\). Say what holds them"):
        adapted(shared, inputs)


# Batches of graphs


@needs_fast_paths
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
    adapter = sample_adapter(net, steps=2)
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

    adapter = sample_adapter(nn.Linear(1, 1), backend="loop")
    with (
        pytest.raises(ValueError, match=r"samples can be told apart.*get_example.*got Whole"),
        adapter.adapted(Whole()),
    ):
        pass


# What is done with the source, and what is returned


def two_steps(net: nn.Module, forward: Forward | None = None, **given: Any) -> SampleAdapter:
    return sample_adapter(net, forward, **{"steps": 2, **given})


@both_backends
def test_source_weights_are_in_place_in_the_body(backend: str) -> None:
    net, inputs = toy(), images()
    expected = forward_predict(net, inputs, None)
    with two_steps(net, backend=backend).adapted(inputs) as adaptation:
        assert torch.equal(forward_predict(net, inputs, None), expected)
    assert adaptation.outputs is not None
    assert not torch.allclose(adaptation.outputs, expected)
    assert adaptation.weights == {}


@both_backends
def test_results_carry_no_graph(backend: str) -> None:
    adaptation = adapted(two_steps(toy(), backend=backend), images())
    tensors = [value for value in vars(adaptation).values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("gate", [None, 0.0])
def test_a_network_that_writes_into_its_inputs_spoils_no_pass(
    gate: float | None, backend: str
) -> None:
    net, inputs = toy(), images(4)

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return forward_predict(net, x.mul_(1.5), prior)

    adapter = two_steps(net, forward, backend=backend, gate=gate)
    found = adapted(adapter, inputs)
    assert torch.equal(inputs, images(4))
    if backend != "auto":
        assert backend_of(adapter) == taken(backend)
    expected = adapted(two_steps(toy()), 1.5 * inputs)
    for name in ("outputs", "source_outputs", "distance_source", "distance_adapted"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_parameters_without_influence_are_refused_by_name() -> None:
    net = toy()
    adapter = two_steps(net, parameters=["embed.*"])
    with pytest.raises(ValueError, match=r"influences.*embed.weight"):
        adapted(adapter, images(2))


# What an answer is


def test_an_answer_is_made_with_the_weights_of_each_sample() -> None:
    net, inputs = toy(), images()

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        logits = forward_predict(net, x, None)
        flipped = forward_predict(net, x.flip(-1), None)
        return logits, {"pair": (logits, flipped), "name": logits.argmax(1)}

    for backend in BACKENDS:
        adaptation = adapted(two_steps(net, backend=backend), inputs, answer)
        logits, flipped = adaptation.answers["pair"]
        assert torch.equal(adaptation.answers["name"], logits.argmax(1))
        assert same([(adaptation.outputs, logits)])
        for index in range(6):
            alone = Settings(objective=PUBLISHED, lr=0.01, steps=2)
            adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
            with adapter.adapted(inputs[index : index + 1]):
                expected = forward_predict(net, inputs[index : index + 1].flip(-1), None).detach()
            torch.testing.assert_close(flipped[index : index + 1], expected, rtol=0, atol=1e-10)


@both_backends
def test_an_answer_on_other_inputs_is_not_taken_from_the_cache(backend: str) -> None:
    net, inputs = KINDS["mlp"].build(), images(4)
    settings: Any = {"parameters": ["head.*"], "backend": backend, "measure": False}

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        return forward_predict(net, -x, None), None

    found = adapted(two_steps(net, **settings), inputs, answer).outputs
    for index in range(4):
        alone = Settings(objective=PUBLISHED, lr=0.01, steps=2, parameters=["head.*"])
        adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
        with adapter.adapted(inputs[index : index + 1]):
            expected = forward_predict(net, -inputs[index : index + 1], None).detach()
        assert found is not None
        torch.testing.assert_close(found[index : index + 1], expected, rtol=0, atol=1e-10)


# Precision


def runs_in_bfloat16(net: Any, inputs: Tensor) -> bool:
    """Whether torch itself can run a network so, which depends on the processor."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            net(inputs[:1])
    except RuntimeError as error:
        return "primitive" not in str(error)  # torch's own words, and no error of ours
    return True


@pytest.mark.parametrize("kind", ["mlp", "batch norm", "lstm", "vit"])
def test_autocast_gives_the_networks_own_data_type_in_both_backends(kind: str) -> None:
    net, inputs = KINDS[kind].build(torch.float32), KINDS[kind].batch(4, torch.float32)
    if kind == "lstm" and not runs_in_bfloat16(net, inputs):
        pytest.skip("torch has no LSTM in bfloat16 for this processor")

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        outputs = forward_predict(net, x, None)
        return outputs, {"logits": outputs, "probabilities": outputs.float().softmax(1)}

    full = adapted(two_steps(net, lr=1e-3), inputs, answer)
    assert full.outputs is not None
    with torch.autocast("cpu", torch.bfloat16):
        for backend in BACKENDS:
            adapter = two_steps(net, lr=1e-3, backend=backend)
            found = adapted(adapter, inputs, answer)
            adapted(adapter, inputs, lambda x: (forward_predict(net, x, None), None))
            assert backend_of(adapter) == taken(backend)
            assert found.outputs is not None
            assert found.source_outputs is not None
            assert found.outputs.dtype == found.source_outputs.dtype == torch.bfloat16
            assert found.answers["logits"].dtype == torch.bfloat16
            assert found.answers["probabilities"].dtype == torch.float32
            difference = (found.outputs - full.outputs).abs().max()
            assert 0 < difference < 0.05 * full.outputs.abs().max()  # by bfloat16's rounding


@both_backends
def test_half_precision_moves_through_float32_masters(backend: str) -> None:
    net, inputs = toy().to(torch.bfloat16), images(4).to(torch.bfloat16)
    given: dict[str, Any] = {"steps": 20, "lr": 1e-4, "grad_clip": 1.0, "anchor": "ema"}
    found = adapted(two_steps(net, backend=backend, **given), inputs)
    for index in range(4):
        alone = Settings(objective=PUBLISHED, **given)
        adapter = BatchAdapter(net, takes_prior(net), softmax_label, alone)
        with adapter.adapted(inputs[index : index + 1]) as expected:
            pass
        assert found.outputs is not None
        assert expected.outputs is not None
        difference = found.outputs[index : index + 1] - expected.outputs
        assert difference.abs().max() < 0.02  # units in the last place of outputs about 1


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_batch_of_bad_samples_gets_the_source(steps: int, size: int) -> None:
    net, inputs = toy(), images(size) * torch.nan
    adapter = two_steps(net, steps=steps)
    adaptation = adapted(adapter, inputs)
    assert adaptation.skipped.tolist() == [True] * size
    assert adaptation.reason == "non-finite output"
    assert adaptation.outputs is not None
    assert adaptation.outputs.isnan().all()
    if steps:  # what was tried on such samples alone is not trusted
        later = adapted(adapter, images(size))
        expected = adapted(two_steps(toy()), images(size))
        torch.testing.assert_close(later.outputs, expected.outputs)
        assert backend_of(adapter) == taken("vectorised")


@pytest.mark.parametrize("steps", [1, 2])
@both_backends
def test_weights_are_finite_though_their_sum_is_not(backend: str, steps: int) -> None:
    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.large = toy().float(), nn.Parameter(torch.full((4,), 3e38))

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            return forward_predict(self.net, x, prior) + 0 * self.large[0]

    adapter = sample_adapter(Large(), backend=backend, steps=steps, optimizer="sgd")
    found = adapted(adapter, images(3).float())
    expected = adapted(
        sample_adapter(toy().float(), backend="loop", steps=steps, optimizer="sgd"),
        images(3).float(),
    )
    assert backend_of(adapter) == taken(backend)
    assert found.reason is None
    torch.testing.assert_close(found.outputs, expected.outputs)


@pytest.mark.parametrize("measure", [True, False])
def test_without_a_step_a_bad_sample_is_reported_alone(measure: bool) -> None:
    net, inputs = toy(), images()
    with torch.no_grad():
        inputs[1] = torch.nan
        plain = forward_predict(net, inputs, None)
    adaptation = adapted(two_steps(net, steps=0, measure=measure), inputs)
    torch.testing.assert_close(adaptation.outputs, plain, rtol=0, atol=0, equal_nan=True)
    assert adaptation.skipped.tolist() == [False, True, False, False, False, False]
    if measure:
        assert adaptation.distance_source is not None
        assert adaptation.distance_source.isnan().tolist() == adaptation.skipped.tolist()
