"""`IT3TestTimeCallback` as a guest on the Trainer: stages, steps, precision, logs, neighbours."""

import copy
import pickle
from collections.abc import Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from helpers.method_runs import METHODS
from helpers.toy import (
    Batch,
    IT3Net,
    LitNet,
    Validated,
    adapting,
    doubles,
    loader,
    net,
    parts,
    predicted,
    quiet,
    samples,
    seeded,
)
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from it3_lightning import ForwardArgument, Idempotence, IT3TestTimeCallback
from it3_lightning.engine.types import Scope


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def head(module: LightningModule) -> Tensor:
    return module.get_parameter("net.head.weight").detach().clone()


# Stages


class Steps(Validated):
    """Notes the weights each step runs with."""

    seen: list[tuple[str, Tensor]]

    def note(self, stage: str) -> None:
        self.seen.append((stage, head(self)))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.note("validate")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.note("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> int:  # type: ignore[override]
        self.note("predict")
        return batch_idx


@pytest.mark.parametrize("stages", [("test", "predict"), ("validate",), ("predict",), ()])
def test_only_the_stages_asked_for_adapt(stages: Any) -> None:
    model = net(Steps)
    model.seen, source = [], head(model)
    for stage in ("validate", "test", "predict"):
        getattr(quiet(callbacks=[adapting(stages=stages)]), stage)(model, loader())
    adapted = {stage for stage, weights in model.seen if not torch.equal(weights, source)}
    assert adapted == set(stages)
    assert len(model.seen) == 9


def test_default_leaves_sanity_check_and_validation_of_a_fit_alone() -> None:
    runs = []
    for callbacks in ([], [IT3TestTimeCallback()]):
        model, trainer = net(Steps), quiet(callbacks=callbacks, num_sanity_val_steps=2)
        model.seen = []
        torch.manual_seed(0)
        trainer.fit(model, loader(), loader(seed=1))
        runs.append((model.seen, trainer.callback_metrics, model.state_dict()))
    for (_, ours), (_, theirs) in zip(runs[0][0], runs[1][0], strict=True):
        assert torch.equal(ours, theirs)
    assert runs[0][1].keys() == runs[1][1].keys()
    assert all(torch.equal(runs[1][2][name], value) for name, value in runs[0][2].items())


def test_validation_inside_fit_adapts_where_asked_and_leaves_training_alone() -> None:
    runs = []
    for callbacks in ([], [adapting(stages=["validate"])]):
        trainer = quiet(callbacks=callbacks, num_sanity_val_steps=2, max_epochs=2)
        model = net(Steps)
        model.seen = []
        torch.manual_seed(0)
        trainer.fit(model, loader(), loader(seed=1))
        runs.append((model.seen, dict(trainer.callback_metrics), model.state_dict()))
    assert all(torch.equal(runs[1][2][name], value) for name, value in runs[0][2].items())
    same = [torch.equal(a[1], b[1]) for a, b in zip(runs[0][0], runs[1][0], strict=True)]
    assert same == [True, True] + 6 * [False]  # the sanity check keeps the source
    assert runs[1][1]["it3/distance_adapted"] < runs[1][1]["it3/distance_source"]


def test_unknown_stage_and_prediction_are_refused() -> None:
    with pytest.raises(ValueError, match=r"stages among validate, test, predict, got \['fit'\]"):
        IT3TestTimeCallback(stages=["fit"])
    with pytest.raises(ValueError, match="'first', 'second' or 'mean', got 'third'"):
        IT3TestTimeCallback(prediction="third")


# Predictions


def test_second_prediction_without_steps_is_the_prediction_given_the_first() -> None:
    model = net().eval()
    images = samples()[0]
    with torch.no_grad():
        expected = model.predict_with(images, model(images).softmax(1))
    actual = predicted(model, adapting(steps=0, prediction="second"))
    torch.testing.assert_close(actual, expected)
    assert (actual - model(images)).abs().max() > 1e-3


def test_second_prediction_comes_from_the_adapted_weights() -> None:
    class Both(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            first.append(self.predict_with(batch[0], None))
            given.append(self.predict_with(batch[0], first[-1].softmax(1)))
            return self(batch[0])

    first: list[Tensor] = []
    given: list[Tensor] = []
    outputs = predicted(net(Both), adapting(prediction="second", reset="never"))
    torch.testing.assert_close(torch.cat(first), predicted(net(), adapting(reset="never")))
    torch.testing.assert_close(outputs, torch.cat(given))
    assert (outputs - torch.cat(first)).abs().max() > 1e-3


def test_mean_prediction_has_the_mean_of_both_probabilities() -> None:
    model = net().eval()
    images = samples()[0]
    with torch.no_grad():
        first = model(images).softmax(1)
        second = model.predict_with(images, first).softmax(1)
    actual = predicted(model, adapting(steps=0, prediction="mean"))
    torch.testing.assert_close(actual.softmax(1), (first + second) / 2)
    assert (actual.softmax(1) - first).abs().max() > 1e-3


def test_mean_prediction_comes_from_the_adapted_weights_and_leaves_given_priors_alone() -> None:
    class Both(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            first = self.predict_with(batch[0], None).softmax(1)
            second = self.predict_with(batch[0], first).softmax(1)
            means.append((first + second) / 2)
            return self(batch[0])

    means: list[Tensor] = []
    model = net(Both)
    outputs = predicted(model, adapting(prediction="mean", reset="never"))
    torch.testing.assert_close(outputs.softmax(1), torch.cat(means))
    assert not model._forward_hooks
    assert "it3_given" not in vars(model)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_mean_prediction_where_the_prior_is_an_argument_of_forward(scope: Scope) -> None:
    class Takes(IT3Net):
        def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
            asked.append(prior is not None and bool(prior.any()))
            outputs = super().forward(x)
            return outputs if prior is None else outputs + 2 * prior

    asked: list[bool] = []
    model = net(Takes, conditioning=ForwardArgument())
    outputs = predicted(model, adapting(steps=0, prediction="mean", scope=scope))
    with torch.no_grad():
        first = model.eval()(samples()[0])
        mean = (first.softmax(1) + (first + 2 * first.softmax(1)).softmax(1)) / 2
    torch.testing.assert_close(outputs.softmax(1), mean)
    assert {True, False} == set(asked)


@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 1}, {"scope": "sample"}])
def test_mean_prediction_of_a_forward_that_writes_into_its_inputs(given: Any) -> None:
    class Writes(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    class Halves(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 0.5)

    outputs, expected = (
        predicted(net(kind), adapting(prediction="mean", **given)) for kind in (Writes, Halves)
    )
    torch.testing.assert_close(outputs, expected)


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_mean_prediction_of_a_step_that_never_calls_the_module_is_refused(scope: Scope) -> None:
    class Beside(IT3Net):
        def predict_step(self, batch: Batch, batch_idx: int) -> Any:  # type: ignore[override]
            return self.net(batch[0])

    with pytest.raises(MisconfigurationException, match="never called self"):
        predicted(net(Beside), adapting(prediction="mean", scope=scope))


@pytest.mark.parametrize("inference_mode", [True, False])
def test_inference_mode_does_not_matter(inference_mode: bool) -> None:
    expected = predicted(net(), adapting())
    assert torch.equal(predicted(net(), adapting(), inference_mode=inference_mode), expected)


def test_network_that_writes_into_its_inputs_spoils_no_batch() -> None:
    class InPlace(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(0.5))

    model = net(InPlace)
    for mode in (True, False):
        off = predicted(model, adapting(steps=0), inference_mode=mode)
        assert torch.equal(off, predicted(model, inference_mode=mode))


def test_mixed_precision_moves_the_weights_at_every_step() -> None:
    torch.set_default_dtype(torch.float32)
    distances = []
    for steps in (0, 1, 5):
        callback = adapting(steps=steps, lr=0.2)
        quiet(callbacks=[callback], precision="bf16-mixed").test(net(), loader(), verbose=False)
        distances.append(callback.summary.distance_adapted)
        assert callback.summary.skipped == 0
    exact = adapting(steps=5, lr=0.2)
    quiet(callbacks=[exact]).test(net(), loader(), verbose=False)
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] == pytest.approx(exact.summary.distance_adapted, rel=0.1)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_adapts_as_full_precision_does(precision: Any) -> None:
    torch.set_default_dtype(torch.float32)
    exact, half = adapting(steps=4, lr=0.1), adapting(steps=4, lr=0.1)
    quiet(callbacks=[exact]).test(net(), loader(), verbose=False)
    quiet(callbacks=[half], precision=precision).test(net(), loader(), verbose=False)
    moved = exact.summary.distance_source - exact.summary.distance_adapted
    assert half.summary.distance_adapted == pytest.approx(
        exact.summary.distance_adapted, abs=0.05 * moved
    )


# Steps of any shape


def test_step_may_take_keywords_and_any_of_lightnings_arguments() -> None:
    class ByKeyword(Callback):
        def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            step: Any = pl_module.predict_step
            with torch.no_grad():
                outputs.append(step(batch=batch, batch_idx=0))
                outputs.append(step(batch, batch_idx=0, dataloader_idx=0))

    class NoIndex(IT3Net):
        def predict_step(self, batch: Batch) -> Any:  # type: ignore[override]
            return self(batch[0])

    outputs: list[Tensor] = []
    batch = next(iter(loader()))
    expected = predicted(net(), adapting(), ByKeyword())
    assert torch.equal(outputs[0], expected[:4])
    assert torch.equal(outputs[1], expected[:4])
    assert torch.equal(predicted(net(NoIndex), adapting()), expected)


def test_step_on_the_instance_is_used_and_put_back() -> None:
    def doubled(self: IT3Net, batch: Batch, batch_idx: int) -> Tensor:
        return 2 * self.forward(batch[0])

    model, expected = net(), predicted(net(), adapting())
    step = MethodType(doubled, model)
    model.predict_step = step
    assert torch.equal(predicted(model, adapting()), 2 * expected)
    assert vars(model)["predict_step"] is step


def test_module_can_be_copied_and_pickled_after_a_run() -> None:
    model, callback = net(), adapting()
    expected = predicted(model, callback)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predicted(twin, adapting()), expected)
        assert "predict_step" not in vars(twin)
    assert torch.equal(predicted(model, pickle.loads(pickle.dumps(callback))), expected)


def test_other_callbacks_see_the_source_weights() -> None:
    class Sees(Callback):
        def on_test_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            seen.append(head(module))

        def on_test_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            seen.append(head(module))

    seen: list[Tensor] = []
    model = net()
    source = head(model)
    quiet(callbacks=[Sees(), adapting(reset="never"), Sees()]).test(model, loader(), verbose=False)
    assert len(seen) == 12
    assert all(torch.equal(weights, source) for weights in seen)


def test_one_callback_serves_several_trainers_and_modules() -> None:
    callback, models = adapting(reset="never"), [net(), seeded(IT3Net(**parts()), 1)]
    expected = [predicted(model, adapting(reset="never")) for model in models]
    for _ in range(2):
        for model, outputs in zip(models, expected, strict=True):
            assert torch.equal(predicted(model, callback), outputs)
            assert callback.summary.samples == 12


# Few samples


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_single_last_sample_keeps_the_source_under_batch_statistics(reset: Any) -> None:
    model, data = net(), [loader(9), loader(9, seed=1)]
    callback = adapting(norm_stats="batch", reset=reset)
    with pytest.warns(UserWarning, match="at least two samples") as caught:
        outputs: Any = quiet(callbacks=[callback]).predict(model, data)
    assert len([w for w in caught if "IT3 keeps" in str(w.message)]) == 1
    assert callback.summary.skipped == 2
    source: Any = quiet().predict(model, data)
    for adapted, plain in zip(outputs, source, strict=True):
        assert [torch.equal(a, b) for a, b in zip(adapted, plain, strict=True)] == [0, 0, 1]


@pytest.mark.parametrize("scope", ["batch", "sample"])
@pytest.mark.parametrize("distance", ["l2", "js", "cross_entropy"])
def test_an_untrained_conditioning_is_told_and_distances_move_nothing(
    scope: Any, distance: Any
) -> None:
    callback = adapting(objective=Idempotence(distance, reliability=None), scope=scope)
    with pytest.warns(UserWarning, match="the conditioning has not been trained"):
        predicted(IT3Net(**parts()), callback)
    if distance != "cross_entropy":  # whose gradient at equals is that of rounding
        assert callback.summary.moved == 0


@pytest.mark.filterwarnings("ignore:Every second prediction:UserWarning")
def test_batch_statistics_without_batch_norm_warn() -> None:
    model = IT3Net(**parts())
    model.net.bn = nn.Identity()  # type: ignore[assignment]
    with pytest.warns(UserWarning, match="the module has no BatchNorm layer"):
        predicted(model, adapting(norm_stats="batch"))


def test_plain_module_type_is_untouched() -> None:
    before = dict(vars(LitNet))
    predicted(net(), adapting())
    assert dict(vars(LitNet)) == before


def test_what_forward_collects_counts_once() -> None:
    class Collects(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.seen: list[int] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append(len(images))
            return super().forward(images)

    model = net(Collects)
    predicted(model, adapting(steps=3))
    assert model.seen == [4, 4, 4]


def test_a_compiled_network_adapts_like_the_plain_one() -> None:
    model = net()
    expected_ = predicted(model, adapting(steps=2))
    model.net.conv = torch.compile(model.net.conv, backend="eager")
    compiled = predicted(model, adapting(steps=2))
    torch.testing.assert_close(compiled, expected_, rtol=0, atol=1e-9)


# Whose the step is


class FailsIn(Callback):
    """Fails in a hook, and in ``on_exception`` too."""

    def on_predict_batch_end(self, *_: Any) -> None:
        raise ValueError("hook")

    def on_exception(self, *_: Any) -> None:
        raise RuntimeError("cannot save")


def test_a_step_is_the_modules_own_where_its_run_never_ended() -> None:
    model = net()
    plain, alone = predicted(model), predicted(model, adapting())
    with pytest.raises(RuntimeError, match="cannot save"):
        predicted(model, FailsIn(), adapting())
    assert "predict_step" in vars(model)  # no hook of ours was called
    assert torch.equal(predicted(model), plain)
    assert torch.equal(predicted(model, adapting()), alone)
    assert "predict_step" not in vars(model)


def test_a_validation_that_a_hook_ends_leaves_nothing_on_the_module() -> None:
    class Stops(Callback):
        def on_validation_epoch_end(self, *_: Any) -> None:
            if not self.stopped:
                self.stopped = True
                raise StopIteration

        stopped = False

    model = net(Validated)
    quiet(callbacks=[Stops(), adapting(stages=["validate"])], max_epochs=3).fit(
        model, loader(), loader()
    )
    assert "validation_step" not in vars(model)


def test_two_callbacks_for_one_stage_are_refused() -> None:
    model, twice = net(), adapting()
    plain = predicted(model)
    for callbacks in ([adapting(), adapting()], [twice, twice]):
        with pytest.raises(MisconfigurationException, match=r"one callback .* in stage 'predict'"):
            predicted(model, *callbacks)
        assert torch.equal(predicted(model), plain)
    both = adapting(stages=["test"]), adapting(stages=["predict"])
    assert torch.equal(predicted(model, *both), predicted(model, adapting()))


@pytest.mark.parametrize("shared", [False, True])
def test_a_trainer_inside_a_hook_leaves_the_outer_run_alone(shared: bool) -> None:
    class Inner(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
            inner = outer if shared else adapting(stages=["test"])
            quiet(callbacks=[inner]).test(module, loader(), verbose=False)
            module.trainer = trainer

    model = net(Validated)
    outer = adapting(stages=["validate", "test"])
    quiet(callbacks=[outer, Inner()]).validate(model, loader(), verbose=False)
    assert not {"validation_step", "test_step"} & set(vars(model))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_module_has_its_own_step(way: Any) -> None:
    class Copies(Callback):
        made: Any = None

        def on_predict_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
            module._trainer = None
            self.made = way(module)
            module._trainer = trainer

    model, copies = net(), Copies()
    predicted(model, adapting(), copies)
    plain = predicted(copies.made)
    assert torch.equal(plain, predicted(model))
    with torch.inference_mode():  # where it was made
        copies.made.net.head.weight.zero_()
    assert not torch.equal(predicted(copies.made), plain)  # its own weights


@pytest.mark.parametrize("name", [*METHODS])
def test_a_configuration_takes_the_settings_of_the_methods_paper(name: str) -> None:
    method, layer = METHODS[name](), getattr(METHODS[name](), "layer", None)
    own: dict[str, Any] = {"class_path": f"it3_lightning.{type(method).__name__}"}
    if isinstance(layer, str):  # which it cannot do without
        own["init_args"] = {"layer": layer}
    given = {"class_path": "it3_lightning.TestTimeCallback", "init_args": {"method": own}}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    made = parser.instantiate(parser.parse_object({"callback": given})).callback
    expected = dict(type(method)(**own.get("init_args", {})).defaults)
    assert {key: getattr(made.settings, key) for key in expected} == expected
