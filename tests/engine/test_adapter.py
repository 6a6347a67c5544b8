"""The engine against the reference: the same numbers for the same settings, and what it costs."""

import copy
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytest
import torch
from helpers.adapters import (
    ONLINE,
    PUBLISHED,
    batch_adapter,
    outputs_of,
    results,
    sample_adapter,
)
from helpers.modules import (
    Conditioned,
    LastOutput,
    Tied,
    drawn,
    images,
    same,
    stream,
    takes_prior,
    toy,
)
from helpers.reference import (
    OPTIMIZERS,
    Record,
    Reset,
    adapt_stream,
    entropy_objective,
    forward_predict,
    softmax_label,
)
from torch import Tensor, nn

from it3_lightning.engine import Adaptation, BatchAdapter, Forward, Settings, adapt, batch_size
from it3_lightning.engine.types import Plain
from it3_lightning.methods import Entropy, Idempotence, Objective, Passes, TestTimeMethod

BATCHES = stream(4)

PLAIN: dict[str, Any] = {
    "steps": 1,
    "distance": "l2",
    "parameters": "all",
    "norm_stats": "source",
    "reliability": None,
    "balance": 0.0,
    "sharpen": 0.0,
    "grad_clip": None,
}
OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "filtered": {"steps": 5, "distance": "js", "norm_stats": "batch", "reliability": 0.45},
    "norm": {"parameters": "norm", "distance": "js", "norm_stats": "batch", "grad_clip": 0.01},
    "sharpened": {"steps": 5, "distance": "js", "reliability": 0.45, "sharpen": 1.0},
    "balanced": {"steps": 5, "parameters": "norm", "reliability": 0.45, "balance": 0.3},
}


def by_reference(net: nn.Module, batches: list[Tensor], **settings: Any) -> list[Record]:
    """Run the reference on the engine's words."""
    given = {**PLAIN, "lr": 0.01, "ema_decay": 0.9, **settings}
    reliability, parameters = given.pop("reliability"), given.pop("parameters")
    if reliability is not None:
        given |= {"filtered": True, "confidence": reliability}
    if parameters == "norm":
        given["parameters"] = lambda name: name.startswith("bn.")
    return adapt_stream(net, batches, predict=forward_predict, to_label=softmax_label, **given)


def by_engine(
    net: nn.Module, batches: list[Tensor], **settings: Any
) -> list[tuple[Adaptation, Tensor, dict[str, Tensor]]]:
    """Adapt to each batch; return what came of it, the body's outputs and the weights' values."""
    given = {**PLAIN, "lr": 0.01, "ema_decay": 0.9, **settings}
    terms = [given.pop(name) for name in ("distance", "reliability", "balance", "sharpen")]
    adapter = BatchAdapter(
        net, takes_prior(net), softmax_label, Settings(objective=Idempotence(*terms), **given)
    )
    results = []
    for x in batches:
        with adapter.adapted(x) as adaptation:
            outputs = net(x)
        weights = {name: value.clone() for name, value in adaptation.weights.items()}
        results.append((adaptation, outputs.detach(), weights))
    return results


def assert_agree(net: nn.Module, batches: list[Tensor], **settings: Any) -> None:
    records = by_reference(net, batches, **settings)
    for record, (adaptation, outputs, weights) in zip(
        records, by_engine(net, batches, **settings), strict=True
    ):
        for actual, expected in (
            (outputs, record.outputs),
            (adaptation.outputs, record.outputs),
            (adaptation.source_outputs, record.y0),
            (adaptation.distance_source, record.distance_source),
            (adaptation.distance_adapted, record.distance_after),
            *((weights[name], record.weights[name]) for name in weights),
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
        assert not adaptation.skipped.any()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
@pytest.mark.parametrize("reset", ["batch", "weights", "never", 2])
@pytest.mark.parametrize("others", OTHERS)
def test_engine_equals_the_reference(
    optimizer: str, anchor: str, reset: Reset, others: str
) -> None:
    settings = {"optimizer": optimizer, "anchor": anchor, "reset": reset, **OTHERS[others]}
    if (reset, anchor) == ("weights", "ema"):
        with pytest.raises(ValueError, match="anchor 'frozen' or 'live' with reset='weights'"):
            Settings(reset="weights", anchor="ema")
        return
    assert_agree(toy(), BATCHES, **settings)


def test_the_grid_has_reliable_and_unreliable_samples_and_moves_the_outputs() -> None:
    results = by_engine(toy(), BATCHES, **OTHERS["filtered"])
    reliable = torch.cat([a.reliable for a, *_ in results if a.reliable is not None])
    assert 3 <= int(reliable.sum()) <= reliable.numel() - 3
    for adaptation, outputs, _ in results:
        assert adaptation.source_outputs is not None
        assert (outputs - adaptation.source_outputs).abs().max() > 1e-3


NETWORKS = {
    "lstm": lambda: LastOutput(nn.LSTM(4, 8, batch_first=True)),
    "gru": lambda: LastOutput(nn.GRU(4, 8, batch_first=True)),
    "layer norm": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.LayerNorm(8)),
    "group norm": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.ReLU(), nn.Linear(16, 8)
    ),
    "tied": Tied,
}


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
@pytest.mark.parametrize("network", NETWORKS)
def test_engine_equals_the_reference_on_other_networks(network: str, anchor: str) -> None:
    net = drawn(Conditioned(NETWORKS[network]()))
    assert_agree(net, BATCHES[:3], steps=3, optimizer="adam", anchor=anchor, reset="never")


class Shared(nn.Module):
    """Two parameters that enter as a sum, so that autograd gives both the same gradient tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        out = x.flatten(1)[:, :3] * (self.a + self.b)
        return out if prior is None else out + prior


def test_clipping_scales_gradients_that_share_memory_once() -> None:
    assert_agree(drawn(Shared()), BATCHES, optimizer="sgd", lr=1.0, grad_clip=1e-3)


@pytest.mark.parametrize("steps", [1, 2])
def test_clipping_leaves_short_gradients_alone(steps: int) -> None:
    given: dict[str, Any] = {"optimizer": "sgd", "steps": steps}
    ((_, clipped, _),) = by_engine(toy(), BATCHES[:1], grad_clip=1e6, **given)
    ((_, free, _),) = by_engine(toy(), BATCHES[:1], **given)
    assert same([(clipped, free)])


def test_clipping_takes_gradients_that_are_expanded() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6, 3))

        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            return x.flatten(1)[:, :3] + self.shift

    net, sizes = Offset().double(), []

    def distance(p: Tensor, q: Tensor) -> Tensor:
        return p.sum().expand(6)

    settings = Settings(
        objective=Idempotence(distance, None), optimizer="sgd", lr=1.0, grad_clip=1.0
    )
    with BatchAdapter(net, takes_prior(net), lambda y: y, settings).adapted(images()):
        sizes.append(net.shift.norm().item())
    assert sizes == pytest.approx([1.0], abs=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("balance", [0.0, 0.3])
@pytest.mark.parametrize("reliability", [None, 0.6])
def test_entropy_equals_a_plain_loop(
    optimizer: Literal["sgd", "adam"], balance: float, reliability: float | None
) -> None:
    net, x = toy(), images()
    settings = Settings(
        objective=Entropy(reliability, balance), steps=3, lr=0.01, optimizer=optimizer
    )
    copied = copy.deepcopy(net)
    steps = OPTIMIZERS[optimizer](copied.parameters(), lr=0.01)
    for _ in range(3):
        steps.zero_grad()
        torch.autograd.backward(
            entropy_objective(copied(x).softmax(1), reliability, balance),
        )
        steps.step()
    adaptation = adapt(net, x, forward=takes_prior(net), to_label=softmax_label, settings=settings)
    torch.testing.assert_close(adaptation.outputs, copied(x).detach(), rtol=0, atol=1e-9)
    p = copied(x).softmax(1).detach()
    entropy = -(p * p.log()).sum(1)
    torch.testing.assert_close(adaptation.distance_adapted, entropy, rtol=0, atol=1e-9)


def test_a_custom_optimizer_keeps_its_own_learning_rate() -> None:
    def factory(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.01)

    (own,) = by_engine(toy(), BATCHES[:1], optimizer=factory, lr=123.0)
    (named,) = by_engine(toy(), BATCHES[:1], optimizer="sgd")
    assert same([(own[1], named[1])])


@pytest.mark.parametrize("name", ["adamw", "momentum", "rmsprop"])
def test_named_optimizers_have_no_weight_decay(name: str) -> None:
    unused = "embed.weight"  # gets no gradient, so only decay could move it
    net = toy()
    ((_, _, weights),) = by_engine(net, BATCHES[:1], optimizer=name, lr=0.5)
    assert torch.equal(weights[unused], net.embed.weight)
    assert not torch.equal(weights["head.weight"], net.head.weight)


@pytest.mark.parametrize(
    ("settings", "forwards", "backwards"),
    [
        ({"steps": 3}, [8, 8], [3, 3]),  # two a step, two to measure
        ({"steps": 3, "measure": False}, [6, 6], [3, 3]),
        ({"steps": 3, "reset": "never"}, [8, 10], [3, 3]),  # and two for the source
        ({"steps": 3, "reset": "never", "measure": False}, [6, 6], [3, 3]),
        ({"steps": 3, "reset": "weights"}, [8, 8], [3, 3]),  # each batch begins with the source
        ({"steps": 0}, [2, 2], [0, 0]),
        ({"steps": 0, "measure": False}, [0, 0], [0, 0]),
        ({"steps": 3, "objective": Entropy()}, [4, 4], [3, 3]),
        ({"steps": 3, "objective": Idempotence(reliability=1.0)}, [8, 8], [0, 0]),
    ],
)
def test_passes_are_as_many_as_documented(
    settings: dict[str, Any], forwards: list[int], backwards: list[int]
) -> None:
    net, calls = toy(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += 1
        return forward_predict(net, x, prior)

    given = Settings(**{"objective": Idempotence("l2", None), **settings})
    adapter = BatchAdapter(net, forward, softmax_label, given)
    for x, expected, steps in zip(BATCHES, forwards, backwards, strict=False):
        calls[0] = 0
        with adapter.adapted(x) as adaptation:
            pass
        assert (adaptation.forwards, calls[0], adaptation.backwards) == (expected, expected, steps)


def test_without_measuring_the_weights_are_the_same() -> None:
    for reset in ("batch", "never"):
        measured = by_engine(toy(), BATCHES, steps=2, reset=reset)
        unmeasured = by_engine(toy(), BATCHES, steps=2, reset=reset, measure=False)
        for (_, first, _), (adaptation, second, _) in zip(measured, unmeasured, strict=True):
            assert torch.equal(first, second)
            assert adaptation.outputs is None
            assert adaptation.distance_adapted is None


def test_with_the_weights_back_the_optimizer_goes_on_but_for_skipped_batches() -> None:
    given: dict[str, Any] = {"optimizer": "adam", "steps": 2}
    bad = torch.full_like(BATCHES[1], torch.nan)
    kept = by_engine(toy(), [BATCHES[0], bad, BATCHES[2]], reset="weights", **given)
    without = by_engine(toy(), [BATCHES[0], BATCHES[2]], reset="weights", **given)
    fresh = by_engine(toy(), [BATCHES[0], BATCHES[2]], **given)
    assert kept[1][0].skipped.all()
    assert all(torch.equal(kept[2][2][name], value) for name, value in without[1][2].items())
    assert all(torch.equal(without[0][2][name], value) for name, value in fresh[0][2].items())
    assert not torch.equal(without[1][2]["head.weight"], fresh[1][2]["head.weight"])


def test_no_reliable_sample_leaves_weights_and_optimizer_alone() -> None:
    net = toy()
    unmoved: list[bool] = []
    (moved,) = by_engine(net, BATCHES[:1], optimizer="adam", reset="never")

    class Moody(Idempotence):
        def __call__(self, y0: Tensor, second: Any, valid: Any = None) -> Any:
            given = Idempotence("l2", 1.0 if unmoved else None)
            return given(y0, second)

    adapter = BatchAdapter(
        net, takes_prior(net), softmax_label, Settings(objective=Moody(), lr=0.01, reset="never")
    )
    with adapter.adapted(BATCHES[0]):
        pass
    unmoved.append(True)
    with adapter.adapted(BATCHES[1]) as adaptation:
        assert adaptation.reliable is not None
        assert not adaptation.reliable.any()
        assert same((net.get_parameter(name), value) for name, value in moved[2].items())


def test_restart_goes_back_to_the_source_and_counts_anew() -> None:
    net = toy()
    settings = Settings(objective=Idempotence("l2", None), lr=0.01, reset=2)
    adapter = BatchAdapter(net, takes_prior(net), softmax_label, settings)

    def outputs(x: Tensor) -> Tensor:
        with adapter.adapted(x):
            return forward_predict(net, x, None).detach()

    fresh = [outputs(x) for x in BATCHES[:3]]
    adapter.restart()
    again = [outputs(x) for x in BATCHES[:3]]
    assert same(zip(fresh, again, strict=True))


def test_adapt_is_one_episode() -> None:
    net, x = toy(), images()
    settings = Settings(objective=Idempotence("l2", None), lr=0.01, optimizer="sgd")
    adaptation = adapt(net, x, forward=takes_prior(net), to_label=softmax_label, settings=settings)
    (record,) = by_reference(net, [x], optimizer="sgd")
    torch.testing.assert_close(adaptation.outputs, record.outputs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings", [Settings(norm_stats="batch"), Settings(objective=Idempotence(balance=0.1))]
)
def test_adapt_refuses_one_sample_where_several_are_needed(settings: Settings) -> None:
    net = toy()
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        adapt(
            net,
            images(1),
            forward=takes_prior(net),
            to_label=softmax_label,
            settings=settings,
        )


def test_parameters_without_influence_are_refused_by_name() -> None:
    net = toy()
    settings = Settings(objective=Idempotence("l2", None), parameters=["embed.*"])
    adapter = BatchAdapter(net, takes_prior(net), softmax_label, settings)
    with pytest.raises(ValueError, match=r"influences.*embed.weight"), adapter.adapted(images()):
        pass


def test_weights_of_an_episode_last_until_the_next_batch() -> None:
    net = toy()
    settings = Settings(objective=Idempotence("l2", None), lr=0.01)
    adapter = BatchAdapter(net, takes_prior(net), softmax_label, settings)
    with adapter.adapted(BATCHES[0]) as first:
        inside = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert same((first.weights[name], inside[name]) for name in inside)
    source = dict(net.named_parameters())
    assert not torch.equal(inside["head.weight"], source["head.weight"])


@pytest.mark.parametrize("settings", [{}, {"norm_stats": "batch"}])
def test_a_context_that_is_closed_late_touches_no_later_batch(settings: dict[str, Any]) -> None:
    net = toy()
    source = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapter = two_steps(net, **settings)
    left = adapter.adapted(BATCHES[0])
    left.__enter__()  # and cut short as it yields, by what keeps its frame alive
    with adapter.adapted(BATCHES[1]) as later:
        del left
        gc.collect()
        inside = dict(net.named_parameters())
        assert same((later.weights[name], inside[name]) for name in inside)
        assert not torch.equal(inside["head.weight"], source["head.weight"])
    assert same((source[name], p) for name, p in net.named_parameters())


class Graphs:
    """Inputs that are no tensors, as graph libraries batch them: 3 graphs, each of 2 nodes."""

    num_graphs = 3

    def __init__(self, nodes: Tensor) -> None:
        self.nodes = nodes


def test_inputs_may_be_objects() -> None:
    net = drawn(nn.Linear(4, 3))

    def forward(graphs: Graphs, prior: Tensor | None) -> Tensor:
        pooled: Tensor = net(graphs.nodes).unflatten(0, (3, 2)).mean(1)
        return pooled if prior is None else pooled + prior

    nodes = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for measure in (True, False):
        settings = Settings(objective=Idempotence("l2", None), lr=0.01, measure=measure)
        adapter = BatchAdapter(net, forward, softmax_label, settings)
        with adapter.adapted(Graphs(nodes)) as adaptation:
            pass
        assert not torch.equal(adaptation.weights["weight"], net.get_parameter("weight"))
        assert adaptation.skipped.tolist() == [False] * 3
        with adapter.adapted(Graphs(nodes * torch.nan)) as adaptation:
            pass
        assert adaptation.skipped.tolist() == [True] * 3


def test_outputs_that_are_no_tensor_are_refused() -> None:
    net = toy()

    def forward(x: Tensor, prior: Tensor | None) -> Any:
        return {"logits": net(x, prior)}

    adapter = BatchAdapter(net, forward, softmax_label, Settings())
    with (
        pytest.raises(TypeError, match=r"a tensor \(B, ...\), got dict. Override it3_forward"),
        adapter.adapted(images()),
    ):
        pass


def test_batch_size_is_that_of_the_first_tensor() -> None:
    assert batch_size(("a", torch.zeros(()), {"x": torch.zeros(5, 2)})) == 5
    with pytest.raises(ValueError, match=r"tensor \(B, ...\) in them, got str"):
        batch_size("a")


# Whatever the network does, in whatever mode


def two_steps(net: nn.Module, forward: Forward | None = None, **given: Any) -> BatchAdapter:
    return batch_adapter(net, forward, **{"steps": 2, **given})


EVERY: dict[str, dict[str, Any]] = {
    "frozen": {},
    "online": ONLINE,
    "batch statistics": {"norm_stats": "batch"},
    "no step": {"steps": 0},
}


@pytest.mark.parametrize("settings", EVERY)
def test_a_network_that_writes_into_its_inputs_spoils_no_pass(settings: str) -> None:
    def forward_of(net: nn.Module) -> Forward:
        return lambda x, prior: forward_predict(net, x.mul_(1.5), prior)

    net, batches = toy(), stream(2)
    found = results(two_steps(net, forward_of(net), **EVERY[settings]), batches)
    expected = results(two_steps(toy(), **EVERY[settings]), [1.5 * x for x in stream(2)])
    assert same(zip(batches, stream(2), strict=True))
    assert same((a.outputs, b.outputs) for a, b in zip(found, expected, strict=True))
    assert same(
        (a.distance_source, b.distance_source) for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("objective", [PUBLISHED, Idempotence("js", 0.4, 0.3), Entropy()])
def test_no_activation_outlives_its_step(objective: Idempotence | Entropy) -> None:
    net, alive, most = toy(), list[weakref.ref[Tensor]](), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        features = net.dense(net.bn(net.conv(x)).flatten(1))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(features))
        features = features if prior is None else features + net.embed(prior)
        logits: Tensor = net.head(features)
        return logits

    gc.collect()
    gc.disable()
    try:
        adapter = two_steps(net, forward, steps=4, objective=objective, **ONLINE)
        kept = results(adapter, stream(2))
        assert len(alive) >= 11
        assert [ref() for ref in alive] == [None] * len(alive)
        assert most == [int(not isinstance(objective, Entropy))]  # y0, while y1 is made of it
    finally:
        gc.enable()
    fields = [value for adaptation in kept for value in vars(adaptation).values()]
    tensors = [value for value in fields if isinstance(value, Tensor)]
    tensors += [value for adaptation in kept for value in adaptation.weights.values()]
    assert not any(tensor.requires_grad or tensor.grad_fn for tensor in tensors)


@pytest.mark.parametrize("measure", [True, False])
def test_no_step_with_batch_statistics_is_that_baseline(measure: bool) -> None:
    net, x = toy(), images()
    conv = net.conv(x)
    mean, var = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = net.bn.weight.reshape(1, 2, 1, 1), net.bn.bias.reshape(1, 2, 1, 1)
    normed = (conv - mean) / (var + net.bn.eps).sqrt() * scale + shift
    expected = net.head(net.dense(normed.relu().flatten(1)).relu())
    with two_steps(net, steps=0, norm_stats="batch", measure=measure).adapted(x):
        torch.testing.assert_close(forward_predict(net, x, None), expected)
    assert not torch.allclose(forward_predict(net, x, None), expected)


class Sees(TestTimeMethod):
    """Notes what it is shown of source data, and which parameters need gradients then."""

    needs_batch = True

    def __init__(self) -> None:
        self.seen: list[tuple[int, set[str], bool]] = []
        self.net = toy()

    def loss(self, passes: Passes) -> Objective:
        return PUBLISHED(passes.y0, passes.second)

    def fit_source(self, passes: Passes) -> None:
        assert passes.y0.requires_grad  # as a Fisher matrix needs it
        named = dict(self.net.named_parameters())
        needing = {name for name, p in named.items() if p.requires_grad}
        self.seen.append((len(passes.y0), needing, any(p.grad is not None for p in named.values())))


def test_two_samples_are_several() -> None:
    method = Sees()
    for parameter in method.net.parameters():
        parameter.grad = torch.ones_like(parameter)
    adapter = batch_adapter(method.net, objective=method, parameters=["head.*"])
    for size, skipped in ((1, [True]), (2, [False, False])):
        adapter.fit_source(images(size))
        (adaptation,) = results(adapter, [images(size)])
        assert adaptation.skipped.tolist() == skipped
    assert method.seen == [(2, {"head.weight", "head.bias"}, False)]
    assert all(p.requires_grad and p.grad is not None for p in method.net.parameters())


class Counts(nn.Module):
    """Counts its passes, in a buffer and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = toy(), list[int]()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        self.seen.append(len(x))
        assert isinstance(self.passes, Tensor)
        self.passes.add_(1)
        return forward_predict(self.net, x, prior)


@pytest.mark.parametrize("measure", [True, False])
def test_a_skipped_batch_leaves_no_trace_either(measure: bool) -> None:
    net = Counts()
    adapter = batch_adapter(net, measure=measure)
    bad = images() * torch.nan
    with adapter.adapted(bad) as found:
        assert net.seen == []
    with adapter.adapted(bad, lambda x: (net(x), None)) as answered:
        assert net.seen == []
    assert found.skipped.all()
    assert answered.skipped.all()
    assert answered.outputs is not None
    assert answered.outputs.isnan().all()
    assert net.get_buffer("passes") == 0


def test_steps_take_some_of_the_time() -> None:
    for adapter in (
        batch_adapter(toy()),
        sample_adapter(toy()),
        sample_adapter(toy(), backend="loop"),
    ):
        started = time.perf_counter()
        seconds = results(adapter, [images()])[0].seconds
        assert 0 < seconds < time.perf_counter() - started


def test_one_sample_where_several_are_needed_gets_source_statistics() -> None:
    net, x = toy(), images(1)
    with two_steps(net, norm_stats="batch").adapted(x) as adaptation:
        inside = forward_predict(net, x, None)
    expected = forward_predict(net, x, None)
    assert same([(inside, expected), (adaptation.outputs, expected)])
    assert adaptation.reason == "batch statistics and batch terms need at least two samples"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", [{}, ONLINE])
def test_results_are_the_same_where_gradients_are_off(
    settings: dict[str, Any], mode: Callable[[], Any]
) -> None:
    net, batches = toy(), stream(3)
    expected = outputs_of(two_steps(toy(), **settings), batches)
    with mode():
        adapter = two_steps(net, **settings)
        found = []
        for x in batches:
            with adapter.adapted(x):
                found.append(forward_predict(net, x, None))
    assert same(zip(found, expected, strict=True))
    loss = forward_predict(net, images(), None).sum()
    torch.autograd.backward(loss)  # and the network trains afterwards
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.tolist() == [6.0] * 3


@contextmanager
def bfloat16() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@pytest.mark.parametrize("settings", [{}, ONLINE])
def test_autocast_never_sees_stale_weights(settings: dict[str, Any]) -> None:
    def run(between: bool) -> list[Tensor]:
        net = toy().float()
        first: list[Tensor] = []

        def forward(x: Tensor, prior: Tensor | None) -> Tensor:
            logits = forward_predict(net, x, prior)
            if prior is None:
                first.append(logits.detach().clone())
            return logits

        adapter = two_steps(net, forward, steps=3, lr=0.05, **settings)
        with bfloat16():
            for x in (images().float(), images(seed=1).float()):
                if between:
                    forward_predict(net, x, None)  # caches the source's casts
                with adapter.adapted(x):
                    first.append(forward_predict(net, x, None).detach())
                source = forward_predict(net, x, None).detach()
                torch.clear_autocast_cache()
                assert torch.equal(source, forward_predict(net, x, None))
        return first

    moving = run(between=False)
    steps = moving[:4]
    assert len({tuple(logits.flatten().tolist()) for logits in steps}) == 4
    assert torch.equal(moving[3], moving[4])  # measured after the last step, and in the body
    assert same(zip(moving, run(between=True), strict=True))


def test_batch_statistics_write_no_running_statistics() -> None:
    net = toy()
    assert net.bn.running_mean is not None
    before = net.bn.running_mean.clone()
    with two_steps(net, norm_stats="batch").adapted(images()):
        forward_predict(net, images(), None)
        assert torch.equal(net.bn.running_mean, before)
    assert torch.equal(net.bn.running_mean, before)


Anchors = Literal["frozen", "ema", "live"]


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_the_source_is_measured_with_the_source_in_both_passes(anchor: Anchors) -> None:
    net, batches = toy(), stream(3)
    for x, adaptation in zip(
        batches, results(two_steps(net, anchor=anchor, reset="never"), batches), strict=True
    ):
        p0 = softmax_label(forward_predict(net, x, None))
        p1 = softmax_label(forward_predict(net, x, p0))
        expected = (p0 - p1).square().sum(1)
        torch.testing.assert_close(adaptation.distance_source, expected, rtol=0, atol=1e-12)


def test_a_learning_rate_that_explodes_gets_the_source() -> None:
    for lr, reason in ((1e200, "non-finite output"), (1e308, "non-finite gradient or weights")):
        net, x = toy(), images()
        objective = Idempotence(lambda p, q: 1e3 * (p - q).square().sum(1), None)
        adapter = two_steps(net, objective=objective, optimizer="sgd", lr=lr, steps=1)
        with adapter.adapted(x) as adaptation:
            assert same([(forward_predict(net, x, None), adaptation.source_outputs)])
        assert adaptation.reason == reason
        assert adaptation.weights == {}


class Asks(TestTimeMethod):
    """Lowers the mean square of what a layer puts out."""

    def __init__(self, layer: str) -> None:
        self.layers = (layer,)
        self.seen: list[Tensor] = []

    def loss(self, passes: Passes) -> Objective:
        features = passes.features(self.layers[0])
        self.seen.append(features.detach().clone())
        measure = features.square().flatten(1).mean(1)
        return Objective(measure, torch.ones_like(measure, dtype=torch.bool))


def test_features_are_those_of_the_weights_that_are_measured() -> None:
    net, x, method = toy(), images(4), Asks("dense")
    adapter = batch_adapter(net, objective=method, lr=0.1, optimizer="sgd")
    with adapter.adapted(x, Plain(lambda inputs, _: net(inputs))) as adaptation:
        measured = net.dense(net.bn(net.conv(x)).relu().flatten(1))
    assert adaptation.distance_adapted is not None
    assert len(method.seen) == 2
    assert not torch.equal(method.seen[0], method.seen[1])
    assert measured.shape == method.seen[1].shape


def test_features_of_a_layer_that_never_ran_are_told() -> None:
    net = toy()
    net.add_module("idle", nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match=r"Expected the layer 'idle' to run.*torch.compile"):
        outputs_of(batch_adapter(net, objective=Asks("idle"), lr=0.1), [images(4)])
