"""The laws of the design, each once: in every scope, by every backend, under a Trainer and without.

What is a law of one part alone stands with that part: neutral passes with the conditionings, a
frozen network with post-hoc training, processes in ``test_distributed.py``, baselines of the tables
with the benchmark, and what fast paths do not trust with each of them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import (
    BACKENDS,
    ONLINE,
    PUBLISHED,
    WAYS,
    adapted,
    any_adapter,
    assert_close,
    backend_of,
    batch_adapter,
    going,
    outputs_of,
    results,
    sample_adapter,
)
from helpers.fast import needs_fast_paths, taken
from helpers.faults import BATCH_FAULTS, SAMPLE_FAULTS, BadBatch, BadSample
from helpers.modules import (
    Conditioned,
    Restless,
    Scale,
    Tied,
    bits,
    changed,
    drawn,
    images,
    in_use,
    restless,
    same,
    stream,
    takes_prior,
    toy,
)
from helpers.reference import Record, Reset, adapt_stream, forward_predict, softmax_label
from helpers.times import Times
from helpers.toy import (
    Batch,
    Draws,
    IT3Net,
    LitNet,
    Marked,
    Raises,
    adapting,
    differing,
    doubles,
    ending,
    everything,
    loader,
    net,
    parts,
    quiet,
    samples,
    seeded,
)
from helpers.zoo import KINDS, rows
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from it3_lightning import DualPass, Idempotence, IT3TestTimeCallback
from it3_lightning.engine import (
    Adaptation,
    BatchAdapter,
    Forward,
    SampleAdapter,
    Settings,
    fast,
    per_sample,
)

every_way = pytest.mark.parametrize("way", WAYS)
both_backends = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def callback_of(way: str, **settings: Any) -> IT3TestTimeCallback:
    return adapting(**{**going(way), **settings})


def predictions(model: LightningModule, data: Any, *callbacks: Callback) -> list[Any]:
    predicted: Any = quiet(callbacks=list(callbacks)).predict(model, data)
    return list(predicted)


def predicted(model: LightningModule, *callbacks: Callback, data: Any = None) -> Tensor:
    return torch.cat(predictions(model, loader() if data is None else data, *callbacks))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def expected(model: nn.Module, data: Any, **settings: Any) -> list[Record]:
    """Adapt to the same stream in plain torch."""

    def predict(net: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with(x, prior)
        return outputs

    return adapt_stream(
        model,
        [batch[0] for batch in data],
        predict=predict,
        to_label=lambda y: y.softmax(1),
        parameters=lambda name: not name.startswith("it3_"),
        **{"lr": 0.05, **settings},
    )


def batch_steps(net: nn.Module, forward: Forward | None = None, **given: Any) -> BatchAdapter:
    return batch_adapter(net, forward, **{"steps": 2, **given})


def sample_steps(net: nn.Module, forward: Forward | None = None, **given: Any) -> SampleAdapter:
    return sample_adapter(net, forward, **{"steps": 2, **given})


# 1. Labels never reach adaptation


@every_way
def test_scrambled_labels_leave_every_prediction_unchanged(way: str) -> None:
    class Keeps(IT3Net):
        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            seen.append(self(batch[0]))

    (images, labels), runs = samples(), []
    for target in (labels, labels.roll(1), torch.full_like(labels, 2)):
        seen: list[Tensor] = []
        data: Any = DataLoader(TensorDataset(images, target), batch_size=4)
        quiet(callbacks=[callback_of(way)]).test(net(Keeps), data, verbose=False)
        runs.append((torch.cat(seen), predicted(net(), callback_of(way), data=data)))
    for other in runs[1:]:
        assert torch.equal(runs[0][0], other[0])
        assert torch.equal(runs[0][1], other[1])


# 2. Nothing is left behind

ENDS: dict[str, BaseException | None] = {
    "well": None,
    "step": ValueError("step"),
    "ctrl-c": KeyboardInterrupt(),
    "engine": ValueError("engine"),
}


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("way", ["batch", "never", "loop", "vectorised"])
def test_nothing_is_left_behind(stage: Any, end: str, way: str) -> None:
    model: Any = net(Marked).eval()
    quiet().predict(model, loader())  # Lightning leaves attributes of its own
    model.fails = None if end == "engine" else ENDS[end]
    model.calls.zero_()
    Raises.batches = 0
    kind = Raises if end == "engine" else Idempotence
    given: dict[str, Any] = {"objective": kind(reliability=None), "stages": [stage]}
    batchwise = way in ("batch", "never")
    given |= {"norm_stats": "batch", "reset": way} if batchwise else going(way)
    before = everything(model)
    trainer = quiet(callbacks=[adapting(**given)])
    with ending(ENDS[end]):
        getattr(trainer, stage)(model, loader())
    # the step's own doing; the engine fails at the second batch, or at a sample of the first; of a
    # batch that is interrupted nothing is left
    model.calls.sub_({"well": 3, "step": 2, "ctrl-c": 1, "engine": int(batchwise)}[end])
    assert differing(before, everything(model)) == []
    assert trainer.global_step == 0


@every_way
def test_training_goes_on_as_if_nothing_had_been_adapted(way: str) -> None:
    exact = DualPass(perturb_prior=False)
    models = [net(dual_pass=exact), net(dual_pass=exact)]
    for model, tested in zip(models, (True, False), strict=True):
        quiet().fit(model, loader())
        if tested:
            callback = callback_of(way, steps=2)
            quiet(callbacks=[callback]).test(model, loader(seed=1), verbose=False)
        quiet().fit(model, loader())
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_checkpoint_written_during_test_holds_the_source_weights(tmp_path: Path) -> None:
    class Writes(Callback):
        def on_test_batch_end(
            self,
            trainer: Trainer,
            pl_module: LightningModule,
            outputs: Any,
            batch: Any,
            index: int,
            *_: Any,
        ) -> None:
            trainer.save_checkpoint(tmp_path / f"{index}.ckpt")

    class InTheStep(IT3Net):
        def test_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            inside.append(self.net.head.weight.detach().clone())
            self(batch[0])

    inside: list[Tensor] = []
    model = seeded(InTheStep(**parts()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapts = IT3TestTimeCallback(objective=Idempotence(reliability=None), lr=0.1, reset="never")
    quiet(callbacks=[adapts, Writes()]).test(model, loader(), verbose=False)
    assert not any(torch.equal(weight, before["net.head.weight"]) for weight in inside)
    for index in range(3):
        state = torch.load(tmp_path / f"{index}.ckpt", weights_only=True)["state_dict"]
        assert [name for name, value in before.items() if not torch.equal(state[name], value)] == []


def test_checkpoint_written_in_a_step_of_single_samples_holds_the_source_weights(
    tmp_path: Path,
) -> None:
    class Saves(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            outputs = self(batch[0])
            self.trainer.save_checkpoint(tmp_path / "between.ckpt")
            return outputs

    model = net(Saves)
    source = {name: value.clone() for name, value in model.state_dict().items()}
    predicted(model, callback_of("vectorised"))
    kept = torch.load(tmp_path / "between.ckpt", weights_only=True)["state_dict"]
    assert kept.keys() == source.keys()
    assert all(torch.equal(kept[name], value) for name, value in source.items())


EVERY: dict[str, tuple[str, dict[str, Any]]] = {
    "batch": ("batch", {}),
    "batch, online": ("batch", ONLINE),
    "batch statistics": ("batch", {"norm_stats": "batch"}),
    "batch, no step": ("batch", {"steps": 0}),
    "batch, by name": ("batch", {"parameters": ["net.conv.*", "net.bn.*"]}),
    "vectorised": ("vectorised", {}),
    "loop": ("loop", {}),
    "several chunks": ("vectorised", {"chunk_size": 4}),
    "gated": ("vectorised", {"gate": 0.02}),
    "samples, no step": ("vectorised", {"steps": 0}),
    "samples, by name": ("vectorised", {"parameters": ["conv.*", "bn.*"]}),
}
BATCHES = [name for name, (way, _) in EVERY.items() if way == "batch"]


def every(settings: str, forward: Any = None) -> tuple[nn.Module, Any]:
    """Return a network with all that may be left behind, and what adapts it."""
    way, given = EVERY[settings]
    net = restless() if way == "batch" else in_use(toy())  # the former cannot be vectorised
    calls = None if forward is None else forward(net)
    return net, any_adapter(net, way, calls, **{"steps": 2, **given})


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("settings", EVERY)
def test_adaptation_leaves_nothing_behind(settings: str, mode: Callable[[], Any]) -> None:
    net, adapter = every(settings)
    before, state, batches = bits(net), torch.get_rng_state(), stream(2)
    with mode():
        for adaptation in results(adapter, batches):
            assert adaptation.reason is None
    assert changed(before, net) == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("settings", [*BATCHES, "vectorised", "loop"])
def test_an_error_in_the_body_leaves_nothing_behind(
    settings: str, error: type[BaseException]
) -> None:
    net, adapter = every(settings)
    before = bits(net)
    with pytest.raises(error), adapter.adapted(images(3)):
        raise error
    assert changed(before, net) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("settings", "fails_at"),
    [
        *((name, at) for name in BATCHES[:3] for at in (1, 2, 3, 6)),
        *((name, at) for name in ("vectorised", "loop") for at in (1, 2, 5, 8, 11, 14)),
    ],
)
def test_an_error_in_a_forward_leaves_nothing_behind(
    settings: str, fails_at: int, error: type[BaseException]
) -> None:
    calls = [0]

    def failing(net: nn.Module) -> Forward:
        def forward(x: Tensor, prior: Tensor | None) -> Tensor:
            calls[0] += 1
            output = forward_predict(net, x, prior)
            if calls[0] == fails_at:
                raise error
            return output

        return forward

    net, adapter = every(settings, failing)
    before = bits(net)
    expected: Any = pytest.raises(error) if settings in BATCHES else suppress(error)
    with warnings.catch_warnings(), expected:
        if settings not in BATCHES:  # an error inside torch.func is looped over, with a warning
            warnings.simplefilter("ignore", UserWarning)
        adapted(adapter, images(3))
    assert calls[0] >= fails_at
    assert changed(before, net) == []


def test_a_skipped_batch_leaves_nothing_behind() -> None:
    net = restless()
    before = bits(net)
    (adaptation,) = results(batch_steps(net, norm_stats="batch"), [images() * torch.nan])
    assert adaptation.reason == "non-finite output"
    assert changed(before, net) == []


def test_what_the_body_counts_is_counted_once() -> None:
    net = Restless()
    assert isinstance(net.calls, Tensor)
    with batch_steps(net).adapted(images()):
        assert net.calls.item() == 0
        net(images())
    assert net.calls.item() == 1


@pytest.mark.parametrize("way", ["batch", "vectorised"])
@pytest.mark.parametrize("kind", ["lstm", "transformer", "vit", "graph"])
def test_no_kind_of_network_keeps_anything(kind: str, way: str) -> None:
    net = in_use(KINDS[kind].build())
    before = bits(net)
    adapter = any_adapter(net, way, steps=2)
    results(adapter, [KINDS[kind].batch(3)] * 2)
    assert changed(before, net) == []
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
    assert torch._C._get_mkldnn_enabled()


def test_a_restless_network_is_left_as_it_was() -> None:
    net = restless()  # writes buffers and attributes, draws, switches modes
    before = bits(net)
    adapter = sample_steps(net)
    told: Any = pytest.warns(UserWarning, match="cannot be vectorised")
    with told if fast.enabled() else nullcontext():
        adapted(adapter, images(3))
    adapted(adapter, images(3))
    assert changed(before, net) == []


# 3. Off is off


def test_second_prediction_draws_no_random_numbers_of_its_own() -> None:
    states = []
    for callbacks in ([], [adapting(steps=0, prediction="second")]):
        torch.manual_seed(0)
        predictions(net(Draws), loader(), *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("way", ["batch", "loop"])
@pytest.mark.parametrize("kind", [IT3Net, Draws])
@pytest.mark.parametrize("measure", [True, False])
def test_no_steps_are_no_callback(kind: type[IT3Net], measure: bool, way: str) -> None:
    model, runs = net(kind), []
    for callbacks in ([], [callback_of(way, steps=0, measure=measure)]):
        torch.manual_seed(0)
        runs.append((predicted(model, *callbacks), torch.get_rng_state()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_changes_no_bit_of_any_network(kind: str, way: str) -> None:
    net, inputs = KINDS[kind].build(), KINDS[kind].batch(4)
    with torch.no_grad():
        plain = forward_predict(net, inputs, None)
    adaptation = adapted(any_adapter(net, way, steps=0), inputs)
    assert same([(adaptation.outputs, plain), (adaptation.source_outputs, plain)])
    assert (adaptation.forwards, adaptation.backwards) == (2, 0)


@pytest.mark.parametrize("settings", [{}, ONLINE, {"anchor": "live"}, {"measure": False}])
def test_no_step_changes_no_bit(settings: dict[str, Any]) -> None:
    net, batches = toy(), stream(2)
    plain = [forward_predict(net, x, None) for x in batches]
    adapter = batch_steps(net, steps=0, **settings)
    for x, expected in zip(batches, plain, strict=True):
        with adapter.adapted(x) as adaptation:
            assert torch.equal(forward_predict(net, x, None), expected)
        if adaptation.outputs is not None:
            assert torch.equal(adaptation.outputs, expected)


# 4. The neutral pass is the network


def test_module_with_priors_predicts_as_the_plain_one() -> None:
    plain, model = seeded(LitNet()), net()
    model.load_state_dict(plain.state_dict())
    ours, theirs = predicted(model), predicted(plain)
    assert torch.equal(ours, theirs)


# 5. Episodic is independent


def test_episodic_predictions_depend_on_their_own_batch_alone() -> None:
    model = net()
    images, labels = samples()
    together = torch.cat(predictions(model, loader(), adapting(optimizer="adam")))
    back: Any = DataLoader(TensorDataset(images[8:], labels[8:]), batch_size=4)
    alone = torch.cat(predictions(model, back, adapting(optimizer="adam")))
    assert torch.equal(together[8:], alone)


@both_backends
def test_predictions_depend_neither_on_batch_size_nor_on_order(backend: str) -> None:
    expected = predicted(net(), callback_of(backend, steps=2, optimizer="adam", lr=0.01))
    for size in (1, 3, 5, 12):
        callback = callback_of(backend, steps=2, optimizer="adam", lr=0.01)
        close(predicted(net(), callback, data=loader(batch=size)), expected)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).tolist()
    shuffled: Any = DataLoader(Subset(loader().dataset, order), batch_size=4)
    callback = callback_of(backend, steps=2, optimizer="adam", lr=0.01)
    close(predicted(net(), callback, data=shuffled), expected[order])


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
def test_an_episode_does_not_depend_on_other_batches(norm_stats: str) -> None:
    batches = stream(3)
    together = outputs_of(batch_steps(toy(), norm_stats=norm_stats), batches)
    backwards = outputs_of(batch_steps(toy(), norm_stats=norm_stats), batches[::-1])[::-1]
    alone = [outputs_of(batch_steps(toy(), norm_stats=norm_stats), [x])[0] for x in batches]
    assert same(zip(together, alone, strict=True))
    assert same(zip(backwards, alone, strict=True))


def joined(adapter: SampleAdapter, batches: list[Any]) -> Tensor:
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
    settings: dict[str, Any] = {"steps": 2, "backend": backend}
    expected = joined(sample_adapter(net, **settings), [inputs])
    order = [3, 1, 5, 0, 4, 2]
    parts = [[3, 1], [5], [0, 4, 2]]
    for batches in ([rows(inputs, order)], [rows(inputs, part) for part in parts]):
        found = joined(sample_adapter(net, **settings), batches)
        assert_close(found, expected[order], 1e-10)
    for chunk_size in (1, 3, 6):
        adapter = sample_adapter(net, chunk_size=chunk_size, **settings)
        assert_close(joined(adapter, [inputs]), expected, 1e-10)


# 6. The prediction is after the last step, in the user's own structure and order


STREAMS: list[dict[str, Any]] = [
    {},
    {"steps": 3, "optimizer": "adam", "lr": 0.01},
    {"reset": "never"},
    {"reset": 2, "optimizer": "adam", "lr": 0.01},
    {"reset": "never", "anchor": "ema", "ema_decay": 0.8, "steps": 2},
    {"anchor": "live"},
    {"norm_stats": "batch", "reset": "never"},
    {"grad_clip": 0.01},
]


@pytest.mark.parametrize("settings", STREAMS, ids=lambda s: " ".join(map(str, s.values())) or "-")
def test_predictions_and_logs_are_those_of_the_method_in_plain_torch(
    settings: dict[str, Any],
) -> None:
    model = net()
    records = expected(model, loader(), **settings)
    predicted = torch.cat(predictions(model, loader(), adapting(**settings)))
    outputs = torch.cat([record.outputs for record in records])
    assert (outputs - torch.cat([record.y0 for record in records])).abs().max() > 1e-3
    torch.testing.assert_close(predicted, outputs, rtol=0, atol=1e-6)
    trainer = quiet(callbacks=[adapting(**settings)])
    (logged,) = trainer.test(model, loader(), verbose=False)
    losses = F.cross_entropy(outputs, samples()[1])
    assert logged["test_loss"] == pytest.approx(losses.item(), abs=1e-6)
    source = torch.cat([record.distance_source for record in records]).mean()
    assert logged["it3/distance_source"] == pytest.approx(source.item(), abs=1e-6)
    after = torch.cat([record.distance_after for record in records]).mean()
    assert logged["it3/distance_adapted"] == pytest.approx(after.item(), abs=1e-6)


@pytest.mark.parametrize("objective", [Idempotence(), Idempotence("js", reliability=0.4)])
def test_reliability_filter_is_that_of_the_method(objective: Idempotence) -> None:
    model, confidence = net(), objective.reliability
    settings = {"distance": objective.distance, "filtered": True, "confidence": confidence}
    settings |= {"sharpen": objective.sharpen}
    records = expected(model, loader(), **settings)
    predicted = torch.cat(predictions(model, loader(), adapting(objective=objective)))
    outputs = torch.cat([record.outputs for record in records])
    torch.testing.assert_close(predicted, outputs, rtol=0, atol=1e-6)


def test_structure_and_order_of_predictions_are_the_users() -> None:
    class Nested(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            logits = self(batch[0])
            return {"index": batch_idx, "pair": (logits, [logits.argmax(1)]), "same": batch[1]}

    model = net(Nested)
    outputs = [record.outputs for record in expected(model, loader())]
    predicted = predictions(model, loader(), adapting())
    assert [p["index"] for p in predicted] == [0, 1, 2]
    for each, output, batch in zip(predicted, outputs, loader(), strict=True):
        torch.testing.assert_close(each["pair"][0], output, rtol=0, atol=1e-6)
        assert torch.equal(each["pair"][1][0], output.argmax(1))
        assert torch.equal(each["same"], batch[1])
        assert not each["pair"][0].requires_grad


def test_prediction_comes_from_the_weights_after_the_last_step() -> None:
    net, x, first = toy(), images(), []

    def forward(inputs: Tensor, prior: Tensor | None) -> Tensor:
        logits = forward_predict(net, inputs, prior)
        if prior is None:
            first.append(logits.detach())
        return logits

    with batch_steps(net, forward, steps=3).adapted(x) as adaptation:
        inside = forward_predict(net, x, None).detach()
    assert adaptation.outputs is not None
    assert not adaptation.outputs.requires_grad
    expected = functional_call(net, adaptation.weights, (x,))
    assert same([(adaptation.outputs, expected), (inside, expected), (first[-1], expected)])
    assert len({tuple(logits.flatten().tolist()) for logits in first}) == 4  # each step moves


# 7. The second pass is an anchor


@every_way
@pytest.mark.parametrize(
    ("anchor", "gradient"),
    [
        ("frozen", (-1.0, 0.0)),  # 2 (w - W - V w)(1 - V) x^2 of x = 1: -2 if y1 were detached
        ("live", (1.0, 4.0)),  # of (v w x)^2
    ],
)
def test_gradients_flow_through_the_anchor_and_move_none_of_its_weights(
    anchor: str, gradient: tuple[float, float], way: str
) -> None:
    net, inputs = Scale(), torch.tensor([[1.0], [3.0]])

    def answer(x: Tensor) -> tuple[Tensor, Any]:
        outputs = forward_predict(net, x, None)
        return outputs, {"w": outputs / x, "v": forward_predict(net, 0 * x, torch.ones_like(x))}

    given: dict[str, Any] = {"anchor": anchor, "optimizer": "sgd", "lr": 0.1}
    adapter = any_adapter(net, way, to_label=lambda y: y, **given)
    if way == "batch":
        squares, found = (inputs**2).mean(), dict(adapted(adapter, inputs).weights)
    else:
        squares, found = inputs**2, adapted(adapter, inputs, answer).answers
    for name, source, slope in (("w", 2.0, gradient[0]), ("v", 0.5, gradient[1])):
        torch.testing.assert_close(found[name].detach(), source - 0.1 * slope * squares)


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

    results(batch_steps(net, forward, steps=3, **settings), stream(2))
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


# 8. A bad sample harms no other


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_bad_batch_gets_the_source_prediction_and_harms_no_other(reset: Reset) -> None:
    model = net()
    images, labels = samples()
    bad = images.clone()
    bad[5] = float("nan")
    good: Any = DataLoader(TensorDataset(images[[0, 1, 2, 3, 8, 9, 10, 11]]), batch_size=4)
    stream: Any = DataLoader(TensorDataset(bad, labels), batch_size=4)
    callback = adapting(reset=reset, optimizer="adam")
    with pytest.warns(UserWarning, match="IT3 keeps the source prediction of a batch: non-finite"):
        predicted = predictions(model, stream, callback)
    assert (callback.summary.skipped, callback.summary.samples) == (4, 12)
    outputs = [record.outputs for record in expected(model, good, reset=reset, optimizer="adam")]
    torch.testing.assert_close(predicted[0], outputs[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(predicted[2], outputs[1], rtol=0, atol=1e-6)
    source = predictions(model, stream)[1]
    torch.testing.assert_close(predicted[1], source, rtol=0, atol=0, equal_nan=True)
    assert predicted[1].isfinite().all(1).tolist() == [True, False, True, True]


def test_skips_are_logged_and_distances_are_means_over_the_others() -> None:
    model = net()
    images, labels = samples()
    records = expected(model, loader())
    images[5] = float("inf")
    data: Any = DataLoader(TensorDataset(images, labels), batch_size=4)
    trainer = quiet(callbacks=[adapting()])
    with pytest.warns(UserWarning, match="non-finite output"):
        (logged,) = trainer.test(model, data, verbose=False)
    assert logged["it3/skipped"] == 4
    kept = torch.cat([records[0].distance_source, records[2].distance_source]).mean()
    assert logged["it3/distance_source"] == pytest.approx(kept.item(), abs=1e-9)
    assert logged["it3/moved"] == pytest.approx(8 / 12)


@both_backends
@pytest.mark.parametrize("steps", [1, 2])
def test_bad_sample_alone_is_skipped_counted_and_logged(backend: str, steps: int) -> None:
    class Keeps(IT3Net):
        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            outputs.append(self(batch[0]))

    outputs: list[Tensor] = []
    images, labels = samples()
    images[5] = float("nan")
    callback = callback_of(backend, steps=steps)
    data: Any = DataLoader(TensorDataset(images, labels), batch_size=4)
    trainer = quiet(callbacks=[callback])
    with pytest.warns(UserWarning, match="keeps the source prediction of a sample: non-finite"):
        (logged,) = trainer.test(net(Keeps), data, verbose=False)
    good = [index for index in range(12) if index != 5]
    expected = predicted(net(), callback_of("loop", steps=steps))
    close(torch.cat(outputs)[good], expected[good])
    assert torch.cat(outputs)[5].isnan().all()
    assert (logged["it3/skipped"], callback.summary.skipped, callback.summary.samples) == (1, 1, 12)
    assert callback.summary.reasons == {"non-finite output": 1}
    (distances,) = callback.summary.distances
    assert distances.isnan().nonzero().tolist() == [[5]]
    known = distances[good].mean().item()
    assert logged["it3/distance_source"] == pytest.approx(known)
    assert logged["it3/moved"] == pytest.approx(11 / 12)


CARRIED: dict[str, dict[str, Any]] = {
    "episodic": {},
    "online": ONLINE,
    "every second": {**ONLINE, "reset": 2},
    "momentum": {**ONLINE, "optimizer": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)},
}


@pytest.mark.parametrize("settings", CARRIED)
@pytest.mark.parametrize("kind", BATCH_FAULTS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_bad_batch_gets_the_source_and_does_not_touch_the_next(
    kind: str, settings: str, position: int
) -> None:
    def run(batches: list[Tensor]) -> list[Adaptation]:
        fault = BadBatch(kind)
        objective = Idempotence(fault.distance, None)
        return results(
            batch_steps(fault.net, fault.forward, objective=objective, **CARRIED[settings]), batches
        )

    fault, good = BadBatch(kind), stream(4)
    with_bad = run([*good[:position], fault.batch(), *good[position:]])
    bad = with_bad.pop(position)
    assert bad.reason == BATCH_FAULTS[kind]
    assert bad.skipped.tolist() == [True] * 5
    source = forward_predict(fault.net, fault.batch(), None)
    torch.testing.assert_close(bad.outputs, source.detach(), rtol=0, atol=0, equal_nan=True)
    for met, missed in zip(with_bad, run(good), strict=True):
        assert same([(met.outputs, missed.outputs)])
        assert same([(met.distance_adapted, missed.distance_adapted)])


@pytest.mark.parametrize("fails_at", [1, 3, 4, 7])
def test_an_interrupted_batch_does_not_touch_the_next(fails_at: int) -> None:
    good, net, calls = stream(3), toy(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += len(x) == 5
        if calls[0] == fails_at:
            calls[0] += 1
            raise KeyboardInterrupt
        return forward_predict(net, x, prior)

    adapter = batch_steps(net, forward, **ONLINE)
    met = outputs_of(adapter, good[:1])
    with pytest.raises(KeyboardInterrupt), adapter.adapted(images(5)):
        pass
    met += outputs_of(adapter, good[1:])
    assert same(zip(met, outputs_of(batch_steps(toy(), **ONLINE), good), strict=True))


@both_backends
@pytest.mark.parametrize("gate", [None, 0.0])
@pytest.mark.parametrize("kind", SAMPLE_FAULTS)
def test_a_bad_sample_gets_the_source_and_does_not_touch_the_others(
    kind: str, gate: float | None, backend: str
) -> None:
    def run(bad: int | None) -> Adaptation:
        fault = BadSample(kind)
        adapter = sample_steps(fault.net, fault.forward, backend=backend, gate=gate, steps=1)
        adaptation = adapted(adapter, fault.batch(bad))
        assert backend_of(adapter) == taken(backend)
        return adaptation

    bad, good = run(2), run(None)
    assert bad.reason == SAMPLE_FAULTS[kind]
    assert bad.skipped.tolist() == [index == 2 for index in range(6)]
    assert good.reason is None
    fault, others = BadSample(kind), [0, 1, 3, 4, 5]
    source = fault.forward(fault.batch(2), None)[2:3].detach()
    assert bad.outputs is not None
    torch.testing.assert_close(bad.outputs[2:3], source, rtol=0, atol=1e-12, equal_nan=True)
    for name in ("outputs", "source_outputs", "distance_source", "distance_adapted", "reliable"):
        met, missed = getattr(bad, name), getattr(good, name)
        torch.testing.assert_close(met[others], missed[others], rtol=0, atol=1e-12)
    assert bad.distance_source is not None
    assert bad.distance_adapted is not None
    assert bad.distance_adapted[2].isnan()
    assert bad.distance_source[2].isnan()
    assert bad.reliable is not None
    assert not bad.reliable[2]


# 9. Every number comes with its baseline


@every_way
def test_source_distance_and_cost_are_logged_beside_the_adapted_distance(way: str) -> None:
    (logged,) = quiet(callbacks=[callback_of(way)]).test(net(), loader(), verbose=False)
    (plain,) = quiet().test(net(), loader(), verbose=False)
    ours = {"distance_source", "distance_adapted", "moved", "skipped", "ms_per_sample"}
    assert logged.keys() == plain.keys() | {f"it3/{name}" for name in ours}
    assert logged["it3/distance_adapted"] < logged["it3/distance_source"]
    assert logged["it3/ms_per_sample"] > 0


# 10. Same seed, same result; the global random state is not disturbed


def test_random_state_and_results_do_not_change_from_run_to_run() -> None:
    model, runs = net(Draws), []
    for callback in (adapting(), adapting()):
        torch.manual_seed(0)
        runs.append(torch.cat(predictions(model, loader(), callback)))
        state = torch.get_rng_state()
    torch.manual_seed(0)
    predictions(model, loader())
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_random_networks_draw_apart_from_the_global_generator() -> None:
    net = toy()
    noise = nn.Dropout(0.5).train()

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        return forward_predict(net, noise(x), prior)

    def run(seed: int) -> tuple[list[Tensor | None], Tensor]:
        torch.manual_seed(seed)
        found = outputs_of(batch_steps(net, forward, **ONLINE), stream(2))
        return found, torch.rand(3)

    (first, next_draw), (second, _), (third, _) = run(7), run(7), run(8)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), next_draw)
    assert same(zip(first, second, strict=True))
    assert not same(zip(first, third, strict=True))


class Dropping(nn.Module):
    """A network with dropout that is on at test time."""

    def __init__(self) -> None:
        super().__init__()
        self.net = toy()
        self.dropout = nn.Dropout(0.5).train()

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        return forward_predict(self.net, self.dropout(x), prior)


@needs_fast_paths
def test_dropout_goes_through_the_loop_as_each_sample_alone() -> None:
    def run(batch: Tensor, seed: int) -> Tensor | None:
        adapter = sample_steps(Dropping(), backend="auto")
        torch.manual_seed(seed)  # which building a network has drawn from
        state = torch.get_rng_state()
        with pytest.warns(UserWarning, match="cannot be vectorised.*random") as caught:
            outputs = adapted(adapter, batch).outputs
        assert len(caught) == 1
        assert same([(outputs, adapted(adapter, batch).outputs)])  # and says no more
        assert backend_of(adapter) == "loop"
        assert torch.equal(torch.get_rng_state(), state)
        return outputs

    whole, again, other = run(images(), 0), run(images(), 0), run(images(), 1)
    assert whole is not None
    assert same([(whole, again)])
    assert other is not None
    assert not torch.allclose(whole, other)
    for index in range(6):
        net = Dropping()
        torch.manual_seed(0)
        alone = Settings(objective=PUBLISHED, lr=0.01, steps=2)
        with BatchAdapter(net, takes_prior(net), softmax_label, alone).adapted(
            images()[index : index + 1]
        ) as adaptation:
            pass
        assert same([(adaptation.outputs, whole[index : index + 1])])


def test_the_same_seed_gives_the_same_bits() -> None:
    first, second = (adapted(sample_steps(toy()), images()).outputs for _ in range(2))
    assert same([(first, second)])


# 11. What is checked once is checked for what comes later too


@needs_fast_paths
def test_other_conditions_select_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other shapes, types or modes of the network; those that were met before are known."""
    times = Times(2.0, 1.0)
    monkeypatch.setattr(per_sample, "_timed", times)
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3, dtype=torch.float32))
    net(images(1).float())
    net.eval()
    adapter = SampleAdapter(
        net,
        lambda x, prior: net(x) if prior is None else prior,
        lambda y: y,
        Settings(scope="sample"),
    )
    given = images(4).float()
    for inputs, selections in ((given, 1), (given, 1), (given[:, :, :, [0, 1, 2, 3]].mT, 1)):
        adapted(adapter, inputs)
        assert sum(name == "vectorised" for name, _ in times.asked) == selections
    net[0].train()
    adapted(adapter, given)
    assert sum(name == "vectorised" for name, _ in times.asked) == 2
    net[0].eval()
    adapted(adapter, given)
    adapted(adapter, given.double().float())
    assert sum(name == "vectorised" for name, _ in times.asked) == 2  # known


@needs_fast_paths
def test_a_batch_unlike_the_first_one_is_looped() -> None:
    net, calls = toy(), [0]

    def forward(x: Tensor, prior: Tensor | None) -> Tensor:
        calls[0] += 1
        if x.shape[2] == 5:  # what torch.func cannot take comes later
            assert x.sum().item() < torch.inf
        return forward_predict(net, x[:, :, :4, :4], prior)

    adapter = sample_steps(net, forward)
    adapted(adapter, images())
    assert backend_of(adapter) == taken("vectorised")
    larger = torch.nn.functional.pad(images(), (0, 1, 0, 1))
    with pytest.warns(UserWarning, match=r"cannot be vectorised.*item\(\)"):
        found = adapted(adapter, larger)
    assert backend_of(adapter) == "loop"
    expected = adapted(sample_steps(toy(), backend="loop"), images())
    torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=1e-10)
