"""The engine against the reference: the same numbers for the same settings, and what it costs."""

import copy
from typing import Any, Literal

import pytest
import torch
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

from it3_lightning.engine import Adaptation, BatchAdapter, Settings, adapt, batch_size
from it3_lightning.methods import Entropy, Idempotence

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
@pytest.mark.parametrize("reset", ["batch", "never", 2])
@pytest.mark.parametrize("others", OTHERS)
def test_engine_equals_the_reference(
    optimizer: str, anchor: str, reset: Reset, others: str
) -> None:
    settings = {"optimizer": optimizer, "anchor": anchor, "reset": reset, **OTHERS[others]}
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


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
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


def test_no_reliable_sample_leaves_weights_and_optimizer_alone() -> None:
    net = toy()
    unmoved: list[bool] = []
    (moved,) = by_engine(net, BATCHES[:1], optimizer="adam", reset="never")

    class Moody(Idempotence):
        def __call__(self, y0: Tensor, second: Any) -> Any:
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps >= 0, got -1"),
        ({"lr": -0.1}, "lr >= 0, got -0.1"),
        ({"lr": float("nan")}, "finite lr >= 0, got nan"),
        ({"optimizer": "adan"}, "Unknown optimizer 'adan'. Did you mean 'adam'"),
        ({"reset": 0}, "'batch', 'never' or N >= 1, got 0"),
        ({"reset": True}, "'batch', 'never' or N >= 1, got True"),
        ({"anchor": "teacher"}, "anchor in frozen, ema, live, got 'teacher'"),
        ({"norm_stats": "test"}, "norm_stats in source, batch, got 'test'"),
        ({"ema_decay": 1.1}, r"ema_decay in \[0, 1\], got 1.1"),
        ({"grad_clip": 0}, "grad_clip > 0 or None, got 0"),
    ],
)
def test_settings_refuse_what_is_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_an_objective_that_does_not_say_whether_it_needs_a_batch_is_refused() -> None:
    def mine(y0: Tensor, second: Any) -> Any:
        raise AssertionError("it was evaluated")

    with pytest.raises(TypeError, match=r"needs_batch, .* got function without"):
        Settings(objective=mine)  # type: ignore[arg-type]
    mine.needs_batch = False  # type: ignore[attr-defined]
    assert Settings(objective=mine).moves == ("polyak", 0.5)  # type: ignore[arg-type]


def test_one_batch_is_an_episode() -> None:
    assert Settings(reset=1).episodic
    assert not Settings(reset=2).episodic
