"""`IT3Predictor`: the callback's predictions without a Trainer, from many threads, and refusals."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference import adapt_stream
from helpers.toy import (
    IT3Net,
    LitNet,
    adapting,
    differing,
    doubles,
    everything,
    loader,
    net,
    parts,
    quiet,
    samples,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from it3_lightning import (
    EATA,
    ClassPrior,
    Conditioning,
    FeatureInjection,
    Idempotence,
    InputConcat,
    IT3Mixin,
    IT3Predictor,
    Prediction,
    Settings,
    Tent,
    TestTimeCallback,
    ValuePrior,
)
from it3_lightning.calibration import Calibration, fingerprint

ONLINE: dict[str, Any] = {"reset": "never", "anchor": "ema", "ema_decay": 0.9}


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def published(**settings: Any) -> Settings:
    """The settings of `adapting()`."""
    given = {"objective": Idempotence(reliability=None), "optimizer": "sgd", "lr": 0.05}
    return Settings(**{**given, **settings})


def batches(count: int = 3, size: int = 4) -> list[Tensor]:
    images = samples(count * size)[0]
    return [images[start : start + size] for start in range(0, len(images), size)]


def same(a: Prediction, b: Prediction) -> bool:
    pairs = [(vars(a)[name], vars(b)[name]) for name in vars(a) if name != "reason"]
    return all(torch.equal(ours, theirs) for ours, theirs in pairs) and a.reason == b.reason


def given(module: Any, x: Tensor, prior: Tensor | None) -> Tensor:
    outputs: Tensor = module.predict_with(x, prior)
    return outputs


# The numbers


@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 3, "optimizer": "adam"}, ONLINE, {"reset": 2}, {"norm_stats": "batch"}],
    ids=["episodic", "adam", "online", "every second", "batch statistics"],
)
def test_predictions_are_those_of_the_callback_bit_for_bit(settings: dict[str, Any]) -> None:
    expected: Any = quiet(callbacks=[adapting(**settings)]).predict(net(), loader())
    source: Any = quiet().predict(net(), loader())
    predictor = IT3Predictor(net(), published(**settings))
    for x, ours, plain in zip(batches(), expected, source, strict=True):
        prediction = predictor(x)
        assert torch.equal(prediction.outputs, ours)
        if "norm_stats" not in settings:
            assert torch.equal(prediction.source_outputs, plain)


@pytest.mark.parametrize("settings", [{}, ONLINE], ids=["episodic", "online"])
def test_outputs_and_distances_are_those_of_the_method_in_plain_torch(
    settings: dict[str, Any],
) -> None:
    records = adapt_stream(
        net(),
        batches(),
        predict=given,
        to_label=lambda y: y.softmax(1),
        parameters=lambda name: not name.startswith("it3_"),
        lr=0.05,
        **settings,
    )
    predictor = IT3Predictor(net(), published(**settings))
    for x, record in zip(batches(), records, strict=True):
        prediction = predictor(x)
        torch.testing.assert_close(prediction.outputs, record.outputs)
        torch.testing.assert_close(prediction.source_outputs, record.y0)
        torch.testing.assert_close(prediction.distance, record.distance_source)
        torch.testing.assert_close(prediction.distance_adapted, record.distance_after)
        assert not prediction.skipped.any()


@pytest.mark.parametrize("prediction", ["second", "mean"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 0}, ONLINE, {"norm_stats": "batch"}, {"scope": "sample", "backend": "loop"}],
    ids=["episodic", "no step", "online", "batch statistics", "each sample"],
)
def test_other_predictions_are_those_of_the_callback(
    settings: dict[str, Any], prediction: Any
) -> None:
    callback = adapting(prediction=prediction, **settings)
    expected: Any = quiet(callbacks=[callback]).predict(net(), loader())
    plain = IT3Predictor(net(), published(**settings))
    predictor = IT3Predictor(net(), published(**settings), prediction=prediction)
    for x, ours in zip(batches(), expected, strict=True):
        first, found = plain(x), predictor(x)
        torch.testing.assert_close(found.outputs, ours)
        assert (found.outputs - first.outputs).abs().max() > 1e-3
        for name in ("source_outputs", "distance", "distance_adapted"):
            torch.testing.assert_close(getattr(found, name), getattr(first, name))


@pytest.mark.parametrize("prediction", ["second", "mean"])
def test_other_predictions_are_the_same_by_both_backends(prediction: Any) -> None:
    torch.set_default_dtype(torch.float32)
    for precision, atol in (("32-true", 1e-5), ("bf16-mixed", 5e-2)):
        both = [
            IT3Predictor(
                net(),
                published(scope="sample", backend=backend),
                precision=precision,  # type: ignore[arg-type]
                prediction=prediction,
            )(samples()[0]).outputs
            for backend in ("loop", "vectorised")
        ]
        torch.testing.assert_close(*both, rtol=0, atol=atol)


def test_carried_weights_are_forgotten_on_restart() -> None:
    predictor = IT3Predictor(net(), published(**ONLINE))
    first, second = (predictor(batches()[0]) for _ in range(2))
    assert not torch.equal(first.outputs, second.outputs)
    assert torch.equal(first.source_outputs, second.source_outputs)
    predictor.restart()
    assert same(predictor(batches()[0]), first)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)]
)
def test_mixed_precision_is_that_of_a_trainer(precision: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float32)
    half = IT3Predictor(net(), published(), precision=precision)
    full = IT3Predictor(net(), published())
    with torch.autocast("cpu", dtype):  # a Trainer on a CPU takes no "16-mixed"
        expected: Any = quiet(callbacks=[adapting()]).predict(net(), loader())
    for x, ours in zip(batches(), expected, strict=True):
        assert torch.equal(half(x).outputs, ours)
        torch.testing.assert_close(ours.float(), full(x).outputs, atol=2e-2, rtol=0)
        assert not torch.equal(ours.float(), full(x).outputs)


# Scope sample, and the gate


@pytest.mark.parametrize("backend", ["loop", "vectorised"])
def test_each_sample_gets_what_it_gets_alone(backend: Any) -> None:
    settings = published(scope="sample", backend=backend, steps=2)
    predictor, x = IT3Predictor(net(), settings), samples()[0]
    together = predictor(x)
    for index in range(len(x)):
        alone = predictor(x[index : index + 1])
        for name in ("outputs", "source_outputs", "distance", "distance_adapted"):
            mine, whole = getattr(alone, name)[0], getattr(together, name)[index]
            torch.testing.assert_close(mine, whole, rtol=0, atol=1e-9)
    expected: Any = quiet(callbacks=[adapting(steps=2)]).predict(net(), loader(batch=1))
    torch.testing.assert_close(together.outputs, torch.cat(expected), rtol=0, atol=1e-9)
    assert not together.gated.any()


@pytest.mark.parametrize("backend", ["loop", "vectorised"])
def test_sample_that_is_not_finite_harms_no_other_of_its_batch(backend: Any) -> None:
    predictor = IT3Predictor(net(), published(scope="sample", backend=backend))
    x = samples()[0]
    expected, x[3] = predictor(x), float("nan")
    prediction = predictor(x)
    assert prediction.skipped.nonzero().tolist() == [[3]]
    assert prediction.distance.isnan().nonzero().tolist() == [[3]]
    assert prediction.reason == "non-finite output"
    others = [index for index in range(12) if index != 3]
    torch.testing.assert_close(prediction.outputs[others], expected.outputs[others])
    reasons = [part.reason for part in prediction.split()]
    assert reasons == [None, None, None, "non-finite output", *[None] * 8]
    for part, outputs in zip(prediction.split(), prediction.outputs, strict=True):
        torch.testing.assert_close(part.outputs, outputs[None], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["loop", "vectorised"])
def test_outputs_come_in_the_precision_of_the_network(backend: Any) -> None:
    torch.set_default_dtype(torch.float32)
    settings = published(scope="sample", backend=backend, steps=3)
    half = IT3Predictor(net(), settings, precision="bf16-mixed")
    prediction, full = half(samples()[0]), IT3Predictor(net(), settings)(samples()[0])
    assert prediction.outputs.dtype == prediction.source_outputs.dtype == torch.bfloat16
    torch.testing.assert_close(prediction.outputs.float(), full.outputs, atol=3e-2, rtol=0)


def calibrated() -> Any:
    """A module that knows the distances of validation samples."""

    class Validated(IT3Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    module = net(Validated)
    callback = adapting(gate=0.5)
    quiet(callbacks=[callback]).validate(module, loader(20, seed=1), verbose=False)
    return module


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_gate_is_that_of_the_callback(scope: Any, tmp_path: Path) -> None:
    module = calibrated()
    expected: Any = quiet(callbacks=[adapting(scope=scope, backend="loop", gate=0.5)]).predict(
        module, loader()
    )
    path = tmp_path / "gate.ckpt"
    trainer = quiet()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    settings = published(scope=scope, backend="loop")
    predictor = IT3Predictor.from_checkpoint(path, IT3Net, settings=settings, gate=0.5, **parts())
    measured = IT3Predictor(module, published())(samples(20, seed=1)[0]).distance.numpy()
    limit = float(predictor.settings.gate or 0)
    assert limit == pytest.approx(np.quantile(measured, 0.5))
    gated = []
    for x, outputs in zip(batches(), expected, strict=True):
        prediction = predictor(x)
        assert torch.equal(prediction.outputs, outputs)
        assert torch.equal(prediction.gated, prediction.distance <= limit)
        gated += prediction.gated.tolist()
    assert 0 < sum(gated) < 12


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'third'.* Known: first, second, mean"):
        IT3Predictor(net(), prediction="third")  # type: ignore[arg-type]


def test_gate_that_is_not_known_or_given_twice_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="validation samples, measured by Idem"):
        IT3Predictor(net(), published(), gate=0.5)
    with pytest.raises(ValueError, match=r"as a share, gate=0.5, or as a distance, Settings\(gate"):
        IT3Predictor(calibrated(), published(gate=0.1), gate=0.5)
    with pytest.raises(ValueError, match=r"gate to be a share in \[0, 1\] or None, got 2"):
        IT3Predictor(calibrated(), published(), gate=2)


@pytest.mark.parametrize("kind", [InputConcat("net.conv"), FeatureInjection("net.dense")])
def test_an_untrained_conditioning_is_told_before_any_call(kind: Conditioning) -> None:
    with pytest.warns(UserWarning, match="the conditioning has not been trained"):
        predictor = IT3Predictor(IT3Net(**parts(conditioning=kind)), published())
    prediction = predictor(batches()[0])
    assert torch.equal(prediction.outputs, prediction.source_outputs)
    assert not prediction.distance.any()


def test_a_conditioning_that_has_been_trained_or_is_not_asked_is_not_told() -> None:
    model = IT3Net(**parts(conditioning=FeatureInjection("net.dense")))
    IT3Predictor(model, Settings(objective=Tent(), norm_stats="batch"))
    quiet(max_epochs=1).fit(model.train(), loader())
    assert not model.it3_conditioning.untrained  # type: ignore[union-attr]
    IT3Predictor(model, published())


# Inputs


class TwoInputs(LitNet):
    """Adds up two images, given by position or by name."""

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        if isinstance(first, dict):
            first, second = first["a"], first["b"]
        assert second is not None
        return super().forward(first + second)


class IT3TwoInputs(IT3Mixin, TwoInputs):
    pass


def test_nested_inputs_reach_the_network_in_their_structure() -> None:
    x = batches()[0]
    expected = IT3Predictor(net(), published())(x)
    predictor = IT3Predictor(net(IT3TwoInputs), published())
    halves = 0.25 * x, 0.75 * x
    for inputs in (halves, list(halves), {"a": halves[0], "b": halves[1]}):
        torch.testing.assert_close(predictor(inputs).outputs, expected.outputs)


@pytest.mark.parametrize("prediction", ["first", "second", "mean"])
def test_inputs_are_left_as_they_are(prediction: Any) -> None:
    class InPlace(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    class Halves(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    x, settings = batches()[0], published(steps=0)
    predictor = IT3Predictor(net(InPlace), settings, prediction=prediction)
    first, second = predictor(x), predictor(x)
    assert torch.equal(x, batches()[0])
    assert same(first, second)
    assert same(first, IT3Predictor(net(Halves), settings, prediction=prediction)(x))


def test_a_sample_that_is_not_finite_keeps_the_source_and_harms_no_other_call() -> None:
    predictor, (x, y, _) = IT3Predictor(net(), published(**ONLINE)), batches()
    alone = IT3Predictor(net(), published(**ONLINE))
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    assert same(predictor(x), alone(x))
    skipped = predictor(bad)
    assert skipped.reason == "non-finite output"
    assert skipped.skipped.tolist() == [True] * 4
    assert skipped.outputs[0].isnan().all()
    with torch.no_grad():
        assert torch.equal(skipped.outputs[1:], net().eval()(bad)[1:])
    assert skipped.distance.isnan().tolist() == [True] * 4
    assert skipped.distance_adapted.isnan().tolist() == [True] * 4
    assert same(predictor(y), alone(y))


def test_a_single_sample_keeps_the_source_under_batch_statistics() -> None:
    prediction = IT3Predictor(net(), published(norm_stats="batch"))(batches()[0][:1])
    assert prediction.skipped.tolist() == [True]
    assert prediction.reason == "batch statistics and batch terms need at least two samples"
    with torch.no_grad():
        assert torch.equal(prediction.outputs, net().eval()(batches()[0][:1]))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 1, 4, 4), "at least one sample in a batch, got none"),
        ([[0.0, 1.0]], r"a tensor \(B, ...\) in them, got list"),
        (torch.tensor(1.0), r"a tensor \(B, ...\) in them, got Tensor"),
    ],
    ids=["empty", "numbers", "scalar"],
)
def test_what_is_no_batch_is_refused(x: Any, message: str) -> None:
    predictor = IT3Predictor(net(), published())
    with pytest.raises(ValueError, match=message):
        predictor(x)


# What is left behind


@pytest.mark.parametrize("settings", [{}, ONLINE, {"norm_stats": "batch"}])
@pytest.mark.parametrize("prediction", ["first", "mean"])
def test_module_is_bitwise_what_it_was(settings: dict[str, Any], prediction: Any) -> None:
    module = net()
    predictor = IT3Predictor(module, published(**settings), prediction=prediction)
    before, state = everything(module), torch.get_rng_state()
    for x in (*batches(), batches()[0] / 0):
        predictor(x)
    assert differing(before, everything(module)) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_in_the_network_leaves_module_and_predictor_usable() -> None:
    class Fails(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and bool((x > 90).any()):
                raise ArithmeticError("too large")
            return super().forward(x)

    module = net(Fails)
    predictor = IT3Predictor(module, published())
    before, expected = everything(module), predictor(batches()[0])
    with pytest.raises(ArithmeticError, match="too large"):
        predictor(batches()[0] + 100)
    assert differing(before, everything(module)) == []
    assert same(predictor(batches()[0]), expected)


def test_module_goes_into_evaluation_mode() -> None:
    module = net().train()
    predictor = IT3Predictor(module, published(), device="cpu")
    assert not any(layer.training for layer in module.modules())
    assert predictor.module is module
    assert predictor.device == torch.device("cpu")


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": torch.enable_grad,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def mode() -> tuple[bool, bool, bool, torch.dtype]:
    """The calling thread's modes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
    )


@pytest.mark.parametrize("name", MODES)
def test_modes_of_the_caller_neither_matter_nor_change(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    expected = IT3Predictor(net(), published())(batches()[0])
    predictor = IT3Predictor(net(), published())
    with MODES[name]():
        before, x = mode(), 1.0 * batches()[0]
        prediction, skipped = predictor(x), predictor(x / 0)
        assert mode() == before
    assert same(prediction, expected)
    for tensor in (*vars(prediction).values(), *vars(skipped).values()):
        if isinstance(tensor, Tensor):
            assert not tensor.requires_grad
            assert not tensor.is_inference()


# Threads


def at_once(call: Callable[[int], Any], threads: int = 8) -> list[Any]:
    """Run a call on all threads, which start together."""
    barrier = threading.Barrier(threads)

    def run(index: int) -> Any:
        barrier.wait()
        return call(index)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_threads_get_what_they_would_get_alone_and_keep_their_modes(precision: Any) -> None:
    torch.set_default_dtype(torch.float32)
    module, inputs = net(), batches(count=40)
    predictor = IT3Predictor(module, published(steps=2), precision=precision)
    before, expected = everything(module), [predictor(x) for x in inputs]

    def call(index: int) -> list[bool]:
        with [*MODES.values()][index % len(MODES)]():
            modes = mode()
            mine = range(index, len(inputs), 8)
            return [same(predictor(inputs[i]), expected[i]) and mode() == modes for i in mine]

    assert at_once(call) == [[True] * 5] * 8
    assert differing(before, everything(module)) == []


def test_threads_carry_weights_along_one_call_after_the_other() -> None:
    x = batches()[0]
    alone, predictor = (IT3Predictor(net(), published(**ONLINE)) for _ in range(2))
    expected = [alone(x).outputs for _ in range(8)]
    outputs = at_once(lambda _: predictor(x).outputs)
    assert sorted(y.tolist() for y in outputs) == sorted(y.tolist() for y in expected)


# Refusals


class UnfittedValues(IT3Net):
    def __init__(self) -> None:
        super().__init__(**parts(prior=ValuePrior(3)))


def source_due(tmp_path: Path) -> LightningModule:
    torch.save(LitNet().state_dict(), tmp_path / "source.pt")
    return IT3Net(**parts(source_checkpoint=str(tmp_path / "source.pt")))


def inferred(_: Path) -> LightningModule:
    with torch.inference_mode():
        return IT3Net(**parts())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda _: LitNet(), r"LitNet does not.\n    wrong:  model = LitNet\(...\)"),
        (lambda _: nn.Linear(1, 1), "predicts with a prior; Linear does not"),
        (lambda _: IT3Net(prior=ClassPrior(3)), "IT3Net has no conditioning"),
        (lambda _: UnfittedValues(), "ValuePrior does not know the mean and spread"),
        (lambda _: net().requires_grad_(False), "'all' matches no trainable parameter"),
        (source_due, "IT3Net has not loaded its source_checkpoint"),
        (inferred, "IT3Net was made in inference mode"),
    ],
    ids=["no mixin", "no host", "no conditioning", "unfitted", "frozen", "due", "inference"],
)
def test_module_that_cannot_be_adapted_is_refused(
    module: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        IT3Predictor(module(tmp_path), Settings())


def test_settings_that_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'bf16'\. Did you mean .*bf16-mixed"):
        IT3Predictor(net(), precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="measure=True, for the distances, got False"):
        IT3Predictor(net(), Settings(measure=False))


# What nobody said


UNKNOWN = r"Nothing was adapted\. No policy has been chosen for this module\. Run it3 calibrate"
PUBLISHED = {"class_path": "it3_lightning.methods.Idempotence", "init_args": {"reliability": None}}
STEP = {"objective": PUBLISHED, "optimizer": "sgd", "lr": 0.05, "measure": False}


def chosen(module: Any, arguments: dict[str, Any], name: str = "chosen") -> Any:
    """Put a policy for its weights into a module."""
    policy = {"name": name, "weights": fingerprint(module), "arguments": arguments}
    module.it3_calibration.policy = policy
    return module


def test_without_settings_and_a_policy_it_predicts_as_the_source_and_says_so() -> None:
    plain: Any = quiet().predict(net(), loader())
    with pytest.warns(UserWarning, match=UNKNOWN):
        predictor = IT3Predictor(net())
    expected = IT3Predictor(net(), Settings(steps=0))
    for x, source in zip(batches(), plain, strict=True):
        prediction = predictor(x)
        assert torch.equal(prediction.outputs, source)
        assert torch.equal(prediction.distance, expected(x).distance)
        assert (prediction.distance > 0).all()
    assert predictor.policy == ""


@pytest.mark.parametrize("asked", [{}, {"policy": "calibrated"}], ids=["by default", "by name"])
def test_a_predictor_follows_the_policy_of_its_module(asked: dict[str, Any]) -> None:
    predictor = IT3Predictor(chosen(net(), STEP), **asked)
    expected = IT3Predictor(net(), published())
    for x in batches():
        assert same(predictor(x), expected(x))
    assert (predictor.policy, predictor.settings.lr) == ("chosen", 0.05)
    second = IT3Predictor(chosen(net(), {"steps": 0, "prediction": "second"}), **asked)
    outputs = IT3Predictor(net(), Settings(steps=0), prediction="second")(batches()[0]).outputs
    assert torch.equal(second(batches()[0]).outputs, outputs)


def test_settings_go_before_a_policy_that_nobody_asked_for() -> None:
    module = chosen(net(), STEP)
    for said in ({"settings": Settings(steps=2)}, {"prediction": "mean"}):
        found = IT3Predictor(module, **said)(batches()[0])
        assert same(found, IT3Predictor(net(), **said)(batches()[0]))


def test_a_policy_that_is_missing_or_of_other_weights_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="No policy has been chosen for this mod"):
        IT3Predictor(net(), policy="calibrated")
    module = chosen(net(), STEP)
    with torch.no_grad():
        module.net.head.bias += 1e-3
    with pytest.raises(MisconfigurationException, match="'chosen' was chosen for other weights"):
        IT3Predictor(module, policy="calibrated")
    with pytest.warns(UserWarning, match="'chosen' was chosen for other weights"):
        predictor = IT3Predictor(module)
    source: Any = quiet().predict(module, loader())
    assert torch.equal(predictor(batches()[0]).outputs, source[0])


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        ({"settings": Settings()}, "settings"),
        ({"gate": "bet"}, "gate"),
        ({"prediction": "second"}, "prediction"),
    ],
)
def test_what_says_how_to_adapt_beside_a_policy_is_refused(
    beside: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=f"says how to adapt, and so does {name}. Leave out"):
        IT3Predictor(chosen(net(), STEP), policy="calibrated", **beside)
    with pytest.raises(ValueError, match="policy 'calibrated' or None, got 'best'"):
        IT3Predictor(net(), policy="best")  # type: ignore[arg-type]


class Validates(IT3Net):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


def test_a_policy_whose_method_knows_source_data_predicts_as_under_a_trainer() -> None:
    module = net(Validates)
    eata = {"objective": {"class_path": "it3_lightning.methods.EATA", "init_args": {}}, "lr": 0.05}
    callback = TestTimeCallback(EATA(), lr=0.05)
    quiet(callbacks=[callback]).validate(module, loader(), verbose=False)
    chosen(module, eata)
    expected: Any = quiet(callbacks=[callback]).predict(module, loader())
    predictor = IT3Predictor(module)
    for x, ours in zip(batches(), expected, strict=True):
        assert torch.equal(predictor(x).outputs, ours)


# Checkpoints


class Saves(LitNet):
    def __init__(self, hidden: int = 8) -> None:
        super().__init__(hidden)
        self.save_hyperparameters()


class IT3Saves(IT3Mixin, Saves):
    pass


def written(module: LightningModule, path: Path) -> Path:
    """Let a Trainer write a checkpoint of a fitted module."""
    trainer = quiet()
    trainer.fit(module, loader())
    trainer.save_checkpoint(path)
    return path


@pytest.mark.parametrize("inference", [nullcontext, torch.inference_mode])
def test_checkpoint_predicts_as_the_fitted_module_does(inference: Any, tmp_path: Path) -> None:
    prior = ClassPrior(3, neutral="uniform")
    module = seeded(IT3Saves(hidden=5, **parts(prior=prior, train="conditioning")))
    path = written(module, tmp_path / "it3.ckpt")
    expected = IT3Predictor(module, published())(batches()[0])
    with inference():
        predictor = IT3Predictor.from_checkpoint(
            path, IT3Saves, settings=published(), device="cpu", weights_only=True
        )
    assert same(predictor(batches()[0]), expected)
    assert predictor.module.hparams["hidden"] == 5
    assert predictor.module.it3_train == "conditioning"


def test_checkpoint_without_hyperparameters_takes_them_as_arguments(tmp_path: Path) -> None:
    module = seeded(IT3Net(hidden=5, **parts()))
    path = written(module, tmp_path / "it3.ckpt")
    expected = IT3Predictor(module, published())(batches()[0])
    predictor = IT3Predictor.from_checkpoint(
        path, IT3Net, settings=published(), hidden=5, **parts()
    )
    assert same(predictor(batches()[0]), expected)


def test_the_policy_of_a_checkpoint_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "it3.ckpt"
    trainer = quiet()
    trainer.strategy.connect(chosen(net(IT3Saves), STEP))
    trainer.save_checkpoint(path)
    predictor = IT3Predictor.from_checkpoint(path, IT3Saves, policy="calibrated", **parts())
    expected = IT3Predictor(net(IT3Saves), published())(batches()[0])
    assert same(predictor(batches()[0]), expected)
    assert IT3Predictor.from_checkpoint(path, IT3Saves, **parts()).policy == "chosen"


def test_a_module_without_priors_follows_the_policy_of_the_file(tmp_path: Path) -> None:
    module, calibration, path = seeded(Saves()), Calibration(), tmp_path / "plain.ckpt"
    trainer = quiet()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    with pytest.raises(ValueError, match=r"a checkpoint with a policy, got one without: .*plain"):
        IT3Predictor.from_checkpoint(path, Saves, policy="calibrated")
    tent = {"objective": {"class_path": "it3_lightning.methods.Tent", "init_args": {}}, "lr": 0.1}
    weights = fingerprint(module)
    calibration.policy = {"name": "Tent", "weights": weights, "arguments": tent}
    content = torch.load(path, weights_only=True)
    content["it3"] = {"calibration": calibration.state_dict()}
    torch.save(content, path)
    found = IT3Predictor.from_checkpoint(path, Saves, policy="calibrated")(batches()[0])
    settings = Settings(**{"objective": Tent(), **Tent.defaults, "lr": 0.1})
    assert same(found, IT3Predictor(seeded(Saves()), settings)(batches()[0]))
    assert not torch.equal(found.outputs, found.source_outputs)


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    whole = written(net(), tmp_path / "whole.ckpt").read_bytes()
    contents = {"empty": b"", "text": b"hello", "half": whole[: len(whole) // 2]}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"got another or a truncated file: .*{name}"):
            IT3Predictor.from_checkpoint(tmp_path / name, IT3Net, **parts())
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="Load weights alone into a module, and make"):
        IT3Predictor.from_checkpoint(tmp_path / "weights.pt", IT3Net, **parts())
    with pytest.raises(FileNotFoundError, match=r"missing\.ckpt"):
        IT3Predictor.from_checkpoint(tmp_path / "missing.ckpt", IT3Net, **parts())


@pytest.mark.parametrize("path", ["http://somewhere/model.ckpt", "s3://bucket/model.ckpt"])
def test_an_address_is_refused_where_it_could_run_code(path: str) -> None:
    with pytest.raises(ValueError, match=r"Expected a file, got an address: .* weights_only=True"):
        IT3Predictor.from_checkpoint(path, IT3Net, **parts())


def test_random_numbers_of_other_threads_do_not_come_again() -> None:
    predictor, stop = IT3Predictor(net(), Settings()), threading.Event()
    images = samples(4)[0]

    def serve() -> None:
        while not stop.is_set():
            predictor(images)

    thread = threading.Thread(target=serve)
    thread.start()
    drawn = [torch.rand(1, dtype=torch.float64).item() for _ in range(2000)]
    stop.set()
    thread.join()
    assert len(set(drawn)) == len(drawn)
