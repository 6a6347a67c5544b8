"""Scope ``"sample"`` under a Trainer: whole runs, predictions, stages, precision, logs."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.fast import needs_fast_paths
from helpers.toy import (
    Batch,
    IT3Net,
    adapting,
    doubles,
    loader,
    net,
    predicted,
    quiet,
    samples,
)
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from it3_lightning import IT3TestTimeCallback

BACKENDS = ["loop", "vectorised"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def each(backend: Any = "loop", **settings: Any) -> IT3TestTimeCallback:
    return adapting(scope="sample", backend=backend, **settings)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_module_and_callback_can_be_copied_and_pickled_after_a_run() -> None:
    model, callback = net(), each()
    expected = predicted(model, callback)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predicted(twin, each()), expected)
    assert torch.equal(predicted(model, pickle.loads(pickle.dumps(callback))), expected)


def test_other_callbacks_see_the_source_weights() -> None:
    class Sees(Callback):
        def on_predict_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            seen.append(module.get_parameter("net.head.weight").detach().clone())

    seen: list[Tensor] = []
    model = net()
    source = model.net.head.weight.detach().clone()
    predicted(model, each("vectorised", steps=2), Sees())
    assert len(seen) == 3
    assert all(torch.equal(weights, source) for weights in seen)


def test_second_prediction_without_steps_is_that_of_the_source() -> None:
    callbacks = [make(steps=0, prediction="second") for make in (each, adapting)]
    one, other = (predicted(net(), callback) for callback in callbacks)
    assert torch.equal(one, other)
    assert callbacks[0].summary.distance_source == callbacks[1].summary.distance_source


@pytest.mark.parametrize("backend", BACKENDS)
def test_mean_prediction_is_that_of_each_samples_own_weights(backend: str) -> None:
    settings = {"steps": 2, "optimizer": "sgd", "lr": 0.05}
    outputs = predicted(net(), each(backend, prediction="mean", **settings))
    alone = [predicted(net(), adapting(prediction="mean", **settings), data=loader(batch=1))]
    close(outputs, torch.cat(alone))
    first, second = (
        predicted(net(), each(backend, prediction=p, **settings)) for p in ("first", "second")
    )
    close(outputs.softmax(1), (first.softmax(1) + second.softmax(1)) / 2)


def test_backends_agree_however_many_samples_are_vectorised_at_once() -> None:
    expected = predicted(net(), each("loop"))
    for chunk in (1, 3, "auto"):
        close(predicted(net(), each("vectorised", chunk_size=chunk)), expected)
    close(predicted(net(), each("auto")), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_run_may_be_limited_and_have_several_dataloaders(backend: str) -> None:
    class Keeps(IT3Net):
        def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            outputs[dataloader_idx].append(self(batch[0]))
            super().test_step(batch, batch_idx)

    alone = [predicted(net(), each(), data=loader(seed=seed))[:8] for seed in (0, 1)]
    outputs: list[list[Tensor]] = [[], []]
    callback = each(backend)
    trainer = quiet(callbacks=[callback], limit_test_batches=2)
    logged = trainer.test(net(Keeps), [loader(seed=0), loader(seed=1)], verbose=False)
    assert callback.summary.samples == 16
    for index, expected in enumerate(alone):
        close(torch.cat(outputs[index]), expected)
        distances = callback.summary.distances[index]
        assert distances.shape == (8,)
        name = f"it3/distance_source/dataloader_idx_{index}"
        assert logged[index][name] == pytest.approx(distances.mean().item())


# Stages, precision, modes


@pytest.mark.parametrize("stages", [("validate",), ("predict",)])
def test_only_the_stages_asked_for_adapt(stages: Any) -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen["validate"].append(self(batch[0]))

        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            seen["test"].append(self(batch[0]))

        def predict_step(self, batch: Batch, batch_idx: int) -> int:  # type: ignore[override]
            seen["predict"].append(self(batch[0]))
            return batch_idx

    seen: dict[str, list[Tensor]] = {stage: [] for stage in ("validate", "test", "predict")}
    for stage in seen:
        getattr(quiet(callbacks=[each(stages=stages)]), stage)(net(Validated), loader())
    source = predicted(net())
    adapted = {stage for stage in seen if not torch.equal(torch.cat(seen[stage]), source)}
    assert adapted == set(stages)


def test_validation_inside_fit_adapts_each_sample_and_leaves_training_alone() -> None:
    class Validated(IT3Net):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.append(self(batch[0]))

    runs = []
    for callbacks in ([], [each("vectorised", stages=["validate"])]):
        seen: list[Tensor] = []
        model = net(Validated)
        trainer = quiet(callbacks=callbacks, num_sanity_val_steps=2, max_epochs=2)
        torch.manual_seed(0)
        trainer.fit(model, loader(), loader(seed=1))
        runs.append((seen, model))
    ours, theirs = (model.state_dict() for _, model in runs)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    same = [torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True)]
    assert same == [True, True] + 6 * [False]  # the sanity check keeps the source
    close(torch.cat(runs[1][0][-3:]), predicted(runs[1][1], each(), data=loader(seed=1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU:UserWarning")
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_adapts_as_batches_of_one_do(precision: Any, backend: str) -> None:
    torch.set_default_dtype(torch.float32)
    single = predicted(net(), adapting(steps=3), data=loader(batch=1), precision=precision)
    callback = each(backend, steps=3)
    outputs = predicted(net(), callback, precision=precision)
    assert outputs.dtype == single.dtype == torch.bfloat16
    assert callback.summary.skipped == 0
    source = predicted(net(), precision=precision).float()
    moved = (single.float() - source).abs().max()
    assert (outputs.float() - single.float()).abs().max() < 0.1 * moved


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_adapts_as_full_precision_does(precision: Any, backend: str) -> None:
    torch.set_default_dtype(torch.float32)
    exact, half = each(backend, steps=4, lr=0.1), each(backend, steps=4, lr=0.1)
    predicted(net(), exact)
    assert predicted(net(), half, precision=precision).dtype in (torch.bfloat16, torch.float16)
    moved = exact.summary.distance_source - exact.summary.distance_adapted
    assert half.summary.distance_adapted == pytest.approx(
        exact.summary.distance_adapted, abs=0.1 * moved
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_inference_mode_does_not_matter(backend: str) -> None:
    runs = [predicted(net(), each(backend), inference_mode=mode) for mode in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_compiled_lightning_module_adapts_like_the_plain_one(scope: Any) -> None:
    callback, data = adapting(scope=scope, backend="loop"), loader(count=4)
    compiled: Any = torch.compile(net(), backend="eager")
    close(predicted(compiled, callback, data=data), predicted(net(), callback, data=data))


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_on_the_instance_is_used_and_put_back(backend: str) -> None:
    model = net()
    plain = model.forward

    def doubled(x: Tensor) -> Tensor:
        outputs: Tensor = 2 * plain(x)
        return outputs

    class Doubled(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.forward = doubled
    close(predicted(model, each(backend)), predicted(net(Doubled), each()))
    assert vars(model)["forward"] is doubled


# Logs


def test_step_logs_and_counts_each_sample_once() -> None:
    class Metrics(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.accuracy = MulticlassAccuracy(3, average="micro")

        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            logits = self(batch[0])
            self.accuracy(logits, batch[1])
            outputs.append(logits)
            self.log("accuracy", self.accuracy)
            super().test_step(batch, batch_idx)

    outputs: list[Tensor] = []
    trainer = quiet(callbacks=[each("vectorised", steps=2)])
    (logged,) = trainer.test(net(Metrics), loader(), verbose=False)
    labels = samples()[1]
    right = (torch.cat(outputs).argmax(1) == labels).double().mean().item()
    assert logged["accuracy"] == pytest.approx(right)
    loss = nn.functional.cross_entropy(torch.cat(outputs), labels).item()
    assert logged["test_loss"] == pytest.approx(loss)
    ours = {"distance_source", "distance_adapted", "moved", "skipped", "ms_per_sample"}
    assert logged.keys() == {"accuracy", "test_loss"} | {f"it3/{name}" for name in ours}


def test_without_measuring_no_distance_is_logged_and_predictions_stay() -> None:
    callback = each("vectorised", measure=False)
    (logged,) = quiet(callbacks=[callback]).test(net(), loader(), verbose=False)
    measured = quiet(callbacks=[each("vectorised")]).test(net(), loader(), verbose=False)[0]
    assert {"it3/distance_source", "it3/distance_adapted"} == measured.keys() - logged.keys()
    assert logged["test_loss"] == measured["test_loss"]
    close(callback.summary.distances[0].mean(), torch.tensor(measured["it3/distance_source"]))


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "IT3 takes" in record.getMessage()]


@needs_fast_paths
def test_backend_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    callback = each("auto")
    with caplog.at_level("INFO"):
        quiet(callbacks=[callback]).predict(net(), [loader(batch=1), loader(batch=12)])
    (message,) = messages(caplog)
    assert "ms a sample, 1 at once" in message
    assert "ms a sample, 12 at once" in callback.summary.backend
    caplog.clear()
    with caplog.at_level("INFO"):
        predicted(net(), each("loop"))
    assert messages(caplog) == ["IT3 takes backend 'loop': as asked for"]


@needs_fast_paths
@pytest.mark.parametrize("backend", ["auto", "vectorised"])
def test_network_that_cannot_be_vectorised_is_looped_over_with_one_warning(backend: Any) -> None:
    class Asks(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 100 else -x)

    callback = each(backend)
    with pytest.warns(UserWarning, match="The network cannot be vectorised, so") as caught:
        outputs = predicted(net(Asks), callback)
    assert len([w for w in caught if "cannot be vectorised" in str(w.message)]) == 1
    assert callback.summary.backend.startswith("backend 'loop': cannot be vectorised")
    close(outputs, predicted(net(Asks), adapting(), data=loader(batch=1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:.*cannot be vectorised")
def test_each_call_of_a_network_that_draws_draws_its_own(backend: str) -> None:
    class Drops(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

        def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
            return torch.stack([self(batch[0]) for _ in range(6)], 1)

    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = predicted(net(Drops), each(backend), data=loader(shuffle=False))
    assert (found.std(1) > 0).any()
    torch.set_rng_state(before)
    assert torch.equal(predicted(net(Drops), each(backend), data=loader(shuffle=False)), found)
    torch.set_rng_state(before)
    close(predicted(net(Drops), each(backend), data=loader(batch=1, shuffle=False)), found)
