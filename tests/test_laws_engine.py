"""The laws that the engine itself must keep, to the last bit."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import pytest
import torch
from helpers.modules import (
    Conditioned,
    LastOutput,
    Tied,
    bits,
    changed,
    drawn,
    images,
    same,
    stream,
    takes_prior,
    toy,
)
from helpers.reference import forward_predict, softmax_label
from torch import Tensor, nn
from torch.func import functional_call

from it3_lightning.engine import Adaptation, BatchAdapter, Forward, Settings
from it3_lightning.methods import Entropy, Idempotence

PUBLISHED = Idempotence("l2", None)
ONLINE: dict[str, Any] = {"reset": "never", "anchor": "ema", "ema_decay": 0.9}


def adapter_of(net: nn.Module, forward: Forward | None = None, **settings: Any) -> BatchAdapter:
    given = Settings(**{"objective": PUBLISHED, "lr": 0.01, "steps": 2, **settings})
    return BatchAdapter(net, forward or takes_prior(net), softmax_label, given)


def results(adapter: BatchAdapter, batches: list[Tensor]) -> list[Adaptation]:
    kept = []
    for x in batches:
        with adapter.adapted(x) as adaptation:
            kept.append(adaptation)
    return kept


def outputs(adapter: BatchAdapter, batches: list[Tensor]) -> list[Tensor | None]:
    return [adaptation.outputs for adaptation in results(adapter, batches)]


# Law 2: nothing is left behind


class Restless(nn.Module):
    """Does in its forward all that a network may leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()
        self.dropout = nn.Dropout(0.5).train()
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.register_buffer("empty", None)
        self.seen: Tensor | None = None
        self.gone = "to be removed"

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        assert isinstance(self.calls, Tensor)
        self.calls += 1
        self.last = torch.rand(1)
        self.empty = torch.ones(1)
        self.register_buffer("late", torch.ones(1))
        logits: Tensor = self.net(x, prior)
        self.seen = logits
        self.extra = [logits]
        self.dropout.training = not self.dropout.training
        if hasattr(self, "gone"):
            del self.gone
        return logits


def restless() -> Restless:
    """With gradients of former training, and parameters that need none."""
    net = Restless()
    for index, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
        parameter.requires_grad_(index % 3 > 0)
    return net


EVERY = {
    "frozen": {},
    "online": ONLINE,
    "batch statistics": {"norm_stats": "batch"},
    "no step": {"steps": 0},
    "by name": {"parameters": ["net.conv.*", "net.bn.*"]},
}


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", EVERY)
def test_adaptation_leaves_nothing_behind(settings: str, mode: Callable[[], Any]) -> None:
    net, batches = restless(), stream(2)
    before = bits(net)
    with mode():
        for adaptation in results(adapter_of(net, **EVERY[settings]), batches):
            assert adaptation.reason is None
    assert changed(before, net) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("settings", EVERY)
def test_an_error_in_the_body_leaves_nothing_behind(
    settings: str, error: type[BaseException]
) -> None:
    net, x = restless(), images()
    before = bits(net)
    with pytest.raises(error), adapter_of(net, **EVERY[settings]).adapted(x):
        raise error
    assert changed(before, net) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 6])
@pytest.mark.parametrize("settings", ["frozen", "online", "batch statistics"])
def test_an_error_in_a_forward_leaves_nothing_behind(
    settings: str, fails_at: int, error: type[BaseException]
) -> None:
    net, calls = restless(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += 1
        output = forward_predict(net, x, prior)
        if calls[0] == fails_at:
            raise error
        return output

    before = bits(net)
    adapter = adapter_of(net, forward, **EVERY[settings])
    with pytest.raises(error), adapter.adapted(images()):
        pass
    assert changed(before, net) == []


def test_a_skipped_batch_leaves_nothing_behind() -> None:
    net = restless()
    before = bits(net)
    (adaptation,) = results(adapter_of(net, norm_stats="batch"), [images() * torch.nan])
    assert adaptation.reason == "non-finite output"
    assert changed(before, net) == []


def test_what_the_body_counts_is_counted_once() -> None:
    net = Restless()
    assert isinstance(net.calls, Tensor)
    with adapter_of(net).adapted(images()):
        assert net.calls.item() == 0
        net(images())
    assert net.calls.item() == 1


@pytest.mark.parametrize("settings", EVERY)
def test_a_network_that_writes_into_its_inputs_spoils_no_pass(settings: str) -> None:
    def forward_of(net: nn.Module) -> Forward:
        return lambda x, prior: forward_predict(net, x.mul_(1.5), prior)

    settings_of = {**EVERY[settings], "parameters": "all"}
    net, batches = toy(), stream(2)
    found = results(adapter_of(net, forward_of(net), **settings_of), batches)
    expected = results(adapter_of(toy(), **settings_of), [1.5 * x for x in stream(2)])
    assert same(zip(batches, stream(2), strict=True))
    assert same((a.outputs, b.outputs) for a, b in zip(found, expected, strict=True))
    assert same(
        (a.distance_source, b.distance_source) for a, b in zip(found, expected, strict=True)
    )


def test_lstm_leaves_nothing_behind() -> None:
    net = drawn(Conditioned(LastOutput(nn.LSTM(4, 8, batch_first=True))))
    before = bits(net)
    results(adapter_of(net), stream(2))
    assert changed(before, net) == []


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
        adapter = adapter_of(net, forward, steps=4, objective=objective, **ONLINE)
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


# Law 3: off is off


@pytest.mark.parametrize("settings", [{}, ONLINE, {"anchor": "live"}, {"measure": False}])
def test_no_step_changes_no_bit(settings: dict[str, Any]) -> None:
    net, batches = toy(), stream(2)
    plain = [forward_predict(net, x, None) for x in batches]
    adapter = adapter_of(net, steps=0, **settings)
    for x, expected in zip(batches, plain, strict=True):
        with adapter.adapted(x) as adaptation:
            assert torch.equal(forward_predict(net, x, None), expected)
        if adaptation.outputs is not None:
            assert torch.equal(adaptation.outputs, expected)


@pytest.mark.parametrize("measure", [True, False])
def test_no_step_with_batch_statistics_is_that_baseline(measure: bool) -> None:
    net, x = toy(), images()
    conv = net.conv(x)
    mean, var = conv.mean((0, 2, 3), keepdim=True), conv.var((0, 2, 3), correction=0, keepdim=True)
    scale, shift = net.bn.weight.reshape(1, 2, 1, 1), net.bn.bias.reshape(1, 2, 1, 1)
    normed = (conv - mean) / (var + net.bn.eps).sqrt() * scale + shift
    expected = net.head(net.dense(normed.relu().flatten(1)).relu())
    with adapter_of(net, steps=0, norm_stats="batch", measure=measure).adapted(x):
        torch.testing.assert_close(forward_predict(net, x, None), expected)
    assert not torch.allclose(forward_predict(net, x, None), expected)


# Law 5: an episode does not depend on other batches


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
def test_an_episode_does_not_depend_on_other_batches(norm_stats: str) -> None:
    batches = stream(3)
    together = outputs(adapter_of(toy(), norm_stats=norm_stats), batches)
    backwards = outputs(adapter_of(toy(), norm_stats=norm_stats), batches[::-1])[::-1]
    alone = [outputs(adapter_of(toy(), norm_stats=norm_stats), [x])[0] for x in batches]
    assert same(zip(together, alone, strict=True))
    assert same(zip(backwards, alone, strict=True))


# Law 6: the prediction is after the last step


def test_prediction_comes_from_the_weights_after_the_last_step() -> None:
    net, x, first = toy(), images(), []

    def forward(inputs: Tensor, prior: Tensor | None) -> Tensor:
        logits = forward_predict(net, inputs, prior)
        if prior is None:
            first.append(logits.detach())
        return logits

    with adapter_of(net, forward, steps=3).adapted(x) as adaptation:
        inside = forward_predict(net, x, None).detach()
    assert adaptation.outputs is not None
    assert not adaptation.outputs.requires_grad
    expected = functional_call(net, adaptation.weights, (x,))
    assert same([(adaptation.outputs, expected), (inside, expected), (first[-1], expected)])
    assert len({tuple(logits.flatten().tolist()) for logits in first}) == 4  # each step moves


# Law 7: the second pass is an anchor


class Scale(nn.Module):
    """``w x + v p``: with the anchor at (W, V) the distance is ``(w x - W x - V w x)^2``."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        out: Tensor = self.w * x
        return out if prior is None else out + self.v * prior


@pytest.mark.parametrize(
    ("anchor", "gradient"),
    [
        ("frozen", (-5.0, 0.0)),  # 2 (w - W - V w)(1 - V) x^2: -10 if y1 were detached
        ("live", (5.0, 20.0)),  # of (v w x)^2
    ],
)
def test_gradients_flow_through_the_anchor_and_move_none_of_its_weights(
    anchor: str, gradient: tuple[float, float]
) -> None:
    net, x = Scale(), torch.tensor([[1.0], [3.0]])
    settings = Settings(objective=PUBLISHED, optimizer="sgd", lr=0.1, anchor=anchor)  # type: ignore[arg-type]
    adapter = BatchAdapter(net, takes_prior(net), lambda y: y, settings)
    ((adaptation),) = results(adapter, [x])
    moved = (2.0 - adaptation.weights["w"].item(), 0.5 - adaptation.weights["v"].item())
    assert moved == pytest.approx((0.1 * gradient[0], 0.1 * gradient[1]), abs=1e-6)


def weights_by_pass(
    net: nn.Module, name: str, **settings: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return a weight's values in the first and in the second passes of two batches."""
    first: list[Tensor] = []
    second: list[Tensor] = []

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        *path, last = name.split(".")
        weight = getattr(net.get_submodule(".".join(path)), last)
        (first if prior is None else second).append(weight.detach().clone())
        return forward_predict(net, x, prior)

    results(adapter_of(net, forward, steps=3, **settings), stream(2))
    return first, second


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_frozen_anchor_is_the_source_to_the_last_bit(reset: str) -> None:
    net = toy()
    first, second = weights_by_pass(net, "head.weight", reset=reset)
    assert same((weight, net.head.weight) for weight in second)
    assert sum(torch.equal(weight, net.head.weight) for weight in first) == 2


def test_ema_anchor_lags_behind_the_weights() -> None:
    first, second = weights_by_pass(toy(), "head.weight", ema_decay=0.75, anchor="ema")
    expected = first[0]
    for weight, anchor in zip(first[1:4], second[1:4], strict=True):
        expected = 0.75 * expected + 0.25 * weight
        torch.testing.assert_close(anchor, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["body.first.weight", "body.second.weight"])
def test_tied_weights_stay_tied_in_both_passes(name: str) -> None:
    net = drawn(Conditioned(Tied()))
    first, second = weights_by_pass(net, name)
    source = net.get_submodule("body.first").get_parameter("weight")
    assert same((weight, source) for weight in second)
    assert not torch.equal(first[-1], source)
    other = weights_by_pass(net, name.replace("second", "first"))
    assert same(zip(first, other[0], strict=True))


# Law 8: a bad batch harms no other


class Fault:
    """Makes one batch, marked by its size, go wrong in a given way."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.net = toy()
        self.passes = 0

    def batch(self) -> Tensor:
        x = images(5, seed=9)
        return x * torch.nan if self.kind == "input" else x

    def forward(self, x: Tensor, prior: Tensor | None) -> Tensor:
        logits = forward_predict(self.net, x, prior)
        if len(x) != 5:
            return logits
        self.passes += 1
        if self.kind == "output after a step" and self.passes == 5:
            return logits / torch.zeros_like(logits)
        if self.kind == "second pass" and prior is not None:
            return logits / torch.zeros_like(logits)
        return logits

    def distance(self, p: Tensor, q: Tensor) -> Tensor:
        measure = (p - q).square().sum(1)
        if len(p) != 5:
            return measure
        if self.kind == "loss":
            return measure + torch.inf
        if self.kind == "gradient":
            return measure + (p - p.detach()).sum(1).sqrt()  # 0, with an infinite slope
        return measure


FAULTS = {
    "input": "non-finite output",
    "output after a step": "non-finite output",
    "second pass": "non-finite loss",
    "loss": "non-finite loss",
    "gradient": "non-finite gradient or weights",
}
STREAMS: dict[str, dict[str, Any]] = {
    "episodic": {},
    "online": ONLINE,
    "every second": {**ONLINE, "reset": 2},
    "momentum": {**ONLINE, "optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)},
}


@pytest.mark.parametrize("settings", STREAMS)
@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_batch_gets_the_source_and_does_not_touch_the_next(
    kind: str, settings: str, position: int
) -> None:
    def run(batches: list[Tensor]) -> list[Adaptation]:
        fault = Fault(kind)
        objective = Idempotence(fault.distance, None)
        return results(
            adapter_of(fault.net, fault.forward, objective=objective, **STREAMS[settings]), batches
        )

    fault, good = Fault(kind), stream(4)
    with_bad = run([*good[:position], fault.batch(), *good[position:]])
    bad = with_bad.pop(position)
    assert bad.reason == FAULTS[kind]
    assert bad.skipped.tolist() == [True] * 5
    source = forward_predict(fault.net, fault.batch(), None)
    torch.testing.assert_close(bad.outputs, source.detach(), rtol=0, atol=0, equal_nan=True)
    for met, missed in zip(with_bad, run(good), strict=True):
        assert same([(met.outputs, missed.outputs)])
        assert same([(met.distance_adapted, missed.distance_adapted)])


def test_a_learning_rate_that_explodes_gets_the_source() -> None:
    for lr, reason in ((1e200, "non-finite output"), (1e308, "non-finite gradient or weights")):
        net, x = toy(), images()
        objective = Idempotence(lambda p, q: 1e3 * (p - q).square().sum(1), None)
        adapter = adapter_of(net, objective=objective, optimizer="sgd", lr=lr, steps=1)
        with adapter.adapted(x) as adaptation:
            assert same([(forward_predict(net, x, None), adaptation.source_outputs)])
        assert adaptation.reason == reason
        assert adaptation.weights == {}


def test_one_sample_where_several_are_needed_gets_source_statistics() -> None:
    net, x = toy(), images(1)
    with adapter_of(net, norm_stats="batch").adapted(x) as adaptation:
        inside = forward_predict(net, x, None)
    expected = forward_predict(net, x, None)
    assert same([(inside, expected), (adaptation.outputs, expected)])
    assert adaptation.reason == "batch statistics and batch terms need at least two samples"


@pytest.mark.parametrize("fails_at", [1, 3, 4, 7])
def test_an_interrupted_batch_does_not_touch_the_next(fails_at: int) -> None:
    good, net, calls = stream(3), toy(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += len(x) == 5
        if calls[0] == fails_at:
            calls[0] += 1
            raise KeyboardInterrupt
        return forward_predict(net, x, prior)

    adapter = adapter_of(net, forward, **ONLINE)
    met = outputs(adapter, good[:1])
    with pytest.raises(KeyboardInterrupt), adapter.adapted(images(5)):
        pass
    met += outputs(adapter, good[1:])
    assert same(zip(met, outputs(adapter_of(toy(), **ONLINE), good), strict=True))


# Law 10: same seed, same result; the global random state is not disturbed


def test_random_networks_draw_apart_from_the_global_generator() -> None:
    net = toy()
    noise = nn.Dropout(0.5).train()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return forward_predict(net, noise(x), prior)

    def run(seed: int) -> tuple[list[Tensor | None], Tensor]:
        torch.manual_seed(seed)
        found = outputs(adapter_of(net, forward, **ONLINE), stream(2))
        return found, torch.rand(3)

    (first, next_draw), (second, _), (third, _) = run(7), run(7), run(8)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), next_draw)
    assert same(zip(first, second, strict=True))
    assert not same(zip(first, third, strict=True))


# Modes, precision


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", [{}, ONLINE])
def test_results_are_the_same_where_gradients_are_off(
    settings: dict[str, Any], mode: Callable[[], Any]
) -> None:
    net, batches = toy(), stream(3)
    expected = outputs(adapter_of(toy(), **settings), batches)
    with mode():
        adapter = adapter_of(net, **settings)
        found = []
        for x in batches:
            with adapter.adapted(x):
                found.append(forward_predict(net, x, None))
    assert same(zip(found, expected, strict=True))
    loss = forward_predict(net, images(), None).sum()
    torch.autograd.backward(loss)  # and the network trains afterwards
    assert net.head.bias.grad is not None
    assert net.head.bias.grad.tolist() == [6.0] * 3


class Half(nn.Module):
    """``w x`` in half precision, with an anchor that halves."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=dtype))

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return self.w * x if prior is None else prior / 2


def half_loop(source: Tensor, batches: list[Tensor], steps: int, lr: float) -> Tensor:
    """Descend on ``mean (w x / 2)^2`` with a float32 master behind rounded weights."""
    master = source.float()
    optimizer = torch.optim.Adam([master], lr=lr)
    for x in batches:
        for _ in range(steps):
            w = master.detach().to(source.dtype).requires_grad_()
            y0 = w * x
            loss = (y0 - y0 / 2).square().sum(1).mean()
            master.grad = torch.autograd.grad(loss, w)[0].float()
            optimizer.step()
    return master.detach().to(source.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves_through_float32_masters(dtype: torch.dtype) -> None:
    net, batches = Half(dtype), [torch.ones(4, 2, dtype=dtype)] * 3
    lr = 1e-4  # below half a unit in the last place, so that no single step is seen
    settings = Settings(objective=PUBLISHED, steps=40, lr=lr, reset="never", measure=False)
    adapter = BatchAdapter(net, takes_prior(net), lambda y: y, settings)
    for count in (1, 2, 3):
        with adapter.adapted(batches[0]):
            found = net.w.detach().clone()
        assert torch.equal(found, half_loop(net.w.detach(), batches[:count], 40, lr))
    assert not torch.equal(found, net.w)


def test_masters_survive_a_bad_batch() -> None:
    net, good = Half(torch.bfloat16), torch.ones(4, 2, dtype=torch.bfloat16)
    settings = Settings(objective=PUBLISHED, steps=15, lr=1e-4, reset="never", anchor="ema")

    def run(batches: list[Tensor]) -> Tensor:
        def distance(p: Tensor, q: Tensor) -> Tensor:
            return (p - q).square().sum(1) * (torch.inf if len(p) == 3 else 1)

        given = Settings(**{**vars(settings), "objective": Idempotence(distance, None)})
        adapter = BatchAdapter(net, takes_prior(net), lambda y: y, given)
        return results(adapter, batches)[-1].weights["w"].clone()

    assert torch.equal(run([good, good[:3], good, good[:3], good]), run([good, good, good]))


def test_ema_anchor_of_half_precision_moves_in_float32() -> None:
    net, anchors = Scale().to(torch.bfloat16), []

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        if prior is not None:
            anchors.append(net.w.item())
        return forward_predict(net, x, prior)

    settings = Settings(
        objective=PUBLISHED, steps=300, lr=1e-3, anchor="ema", ema_decay=0.999, measure=False
    )
    x = torch.ones(2, 1, dtype=torch.bfloat16)
    results(BatchAdapter(net, forward, lambda y: y, settings), [x])
    assert anchors[0] == 2.0
    assert anchors[-1] > 2.01


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

        adapter = adapter_of(net, forward, steps=3, lr=0.05, **settings)
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
    with adapter_of(net, norm_stats="batch").adapted(images()):
        forward_predict(net, images(), None)
        assert torch.equal(net.bn.running_mean, before)
    assert torch.equal(net.bn.running_mean, before)


Anchors = Literal["frozen", "ema", "live"]


@pytest.mark.parametrize("anchor", ["frozen", "ema", "live"])
def test_the_source_is_measured_with_the_source_in_both_passes(anchor: Anchors) -> None:
    net, batches = toy(), stream(3)
    for x, adaptation in zip(
        batches, results(adapter_of(net, anchor=anchor, reset="never"), batches), strict=True
    ):
        p0 = softmax_label(forward_predict(net, x, None))
        p1 = softmax_label(forward_predict(net, x, p0))
        expected = (p0 - p1).square().sum(1)
        torch.testing.assert_close(adaptation.distance_source, expected, rtol=0, atol=1e-12)
