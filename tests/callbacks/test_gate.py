"""The gate: calibrated on validation data, kept in checkpoints, and what it leaves alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.reference import ToyNet, _source, adapt_stream
from helpers.toy import (
    Batch,
    Validated,
    adapting,
    differing,
    doubles,
    everything,
    loader,
    net,
    parts,
    predicted,
    quiet,
    samples,
    seeded,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import ClassPrior, Idempotence, IT3TestTimeCallback
from it3_lightning.calibration import Calibration, gate_of

SCOPES: list[Any] = ["batch", "sample"]
MEASURED = "Idempotence, distance 'l2', norm_stats 'source'"


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def gated(gate: float = 0.5, **settings: Any) -> IT3TestTimeCallback:
    return adapting(gate=gate, backend="loop", **settings)


def distances(model: Any, data: Any, **settings: Any) -> Tensor:
    """The squared distance of the two predictions, in plain torch."""

    def predict(net: Any, x: Tensor, prior: Tensor | None) -> Tensor:
        outputs: Tensor = net.predict_with(x, prior)
        return outputs

    batches = [batch[0] for batch in data]
    given: dict[str, Any] = {"predict": predict, "to_label": lambda y: y.softmax(1), "lr": 0.0}
    records = adapt_stream(model, batches, steps=0, **given, **settings)
    return torch.cat([record.distance_source for record in records])


def calibrated(gate: float = 0.5, **settings: Any) -> Any:
    """A module that knows the distances of the validation samples."""
    model = net(Validated)
    trainer = quiet(callbacks=[gated(gate, **settings)])
    trainer.validate(model, loader(count=20, seed=1), verbose=False)
    return model


# Calibration


@pytest.mark.parametrize(
    ("scope", "norm_stats"), [("batch", "source"), ("batch", "batch"), ("sample", "source")]
)
def test_validate_measures_the_quantiles_of_numpy(scope: Any, norm_stats: Any) -> None:
    model = calibrated(scope=scope, norm_stats=norm_stats)
    expected = distances(model, loader(count=20, seed=1), norm_stats=norm_stats).numpy()
    by = f"Idempotence, distance 'l2', norm_stats {norm_stats!r}"
    for level in (0.1, 0.5, 0.95):
        quantile = model.it3_calibration.quantile(level, by=by)
        assert quantile == pytest.approx(np.quantile(expected, level), rel=1e-6)


def test_fit_measures_after_every_epoch_and_keeps_that_in_the_checkpoint(tmp_path: Path) -> None:
    checkpoints = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = quiet(callbacks=[gated(), checkpoints], max_epochs=2, enable_checkpointing=True)
    trainer.fit(net(Validated), loader(), loader(count=20, seed=1))
    kept = []
    for epoch in (0, 1):
        path = tmp_path / f"epoch={epoch}.ckpt"
        model = Validated.load_from_checkpoint(path, **parts(), weights_only=True)
        expected = np.quantile(distances(model, loader(count=20, seed=1)).numpy(), 0.5)
        kept.append(model.it3_calibration.quantile(0.5, by=MEASURED))
        assert kept[-1] == pytest.approx(expected, rel=1e-6)
    assert kept[0] != kept[1]
    callback, path = gated(scope="sample"), tmp_path / "epoch=0.ckpt"
    again = quiet(callbacks=[callback, checkpoints], enable_checkpointing=True)
    again.test(net(Validated), loader(), ckpt_path=path, verbose=False)
    (measured,) = callback.summary.distances
    assert callback.summary.gated == (measured <= kept[0]).sum()


@pytest.mark.parametrize("train", ["joint", "conditioning"])
def test_measuring_leaves_training_alone(train: Any) -> None:
    runs = []
    for callbacks in ([], [gated()]):
        model = net(Validated, train=train)
        torch.manual_seed(0)
        trainer = quiet(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=2)
        trainer.fit(model, loader(), loader(seed=1))
        runs.append((model, dict(trainer.callback_metrics)))
    (plain, logged), (model, same) = runs
    changed = differing(everything(plain), everything(model))
    assert {name.partition(" ")[0] for name in changed} <= {"storage"}
    assert logged.keys() == same.keys()
    assert all(torch.equal(same[name], value) for name, value in logged.items())
    assert model.it3_calibration.by == MEASURED


AVERAGES: dict[str, Any] = {
    "moving": lambda: EMAWeightAveraging(decay=0.7),
    "moving, buffers kept": lambda: EMAWeightAveraging(decay=0.7, use_buffers=False),
}


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "average first"])
@pytest.mark.parametrize("name", AVERAGES)
def test_the_gate_of_averaged_weights_is_theirs(
    name: str, gate_first: bool, tmp_path: Path
) -> None:
    callbacks = [gated(), AVERAGES[name]()]
    kept = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer = quiet(
        callbacks=[*(callbacks if gate_first else callbacks[::-1]), kept],
        max_epochs=3,
        enable_checkpointing=True,
    )
    model = net(Validated)
    trainer.fit(model, loader(), loader(count=20, seed=1))
    loaded = Validated.load_from_checkpoint(tmp_path / "last.ckpt", **parts(), weights_only=True)
    for each in (model, loaded):
        expected = np.quantile(distances(each.eval(), loader(count=20, seed=1)).numpy(), 0.5)
        assert gate_of(each, gated().settings, 0.5) == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*overrides the configure_model:UserWarning")
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "average first"])
def test_a_gate_of_other_weights_than_those_at_the_end_is_refused(gate_first: bool) -> None:
    class Epochs(WeightAveraging):
        def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
            return epoch_idx is not None

    callbacks, model = [gated(), Epochs()], net(Validated)
    trainer = quiet(callbacks=callbacks if gate_first else callbacks[::-1], max_epochs=3)
    trainer.fit(model, loader(), loader(seed=1))
    with pytest.raises(MisconfigurationException, match="these weights; they were measured with o"):
        quiet(callbacks=[gated()]).test(model, loader())


def test_a_gate_measured_before_more_training_is_refused() -> None:
    model = calibrated()
    quiet(limit_val_batches=0).fit(model, loader(), loader())
    with pytest.raises(MisconfigurationException, match="these weights; they were measured with o"):
        quiet(callbacks=[gated()]).test(model, loader())


def test_sanity_check_and_validation_that_failed_do_not_count() -> None:
    class Fails(Validated):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            if batch_idx == 1:
                raise RuntimeError("step")

    callback, model = gated(), net(Fails)
    with pytest.raises(RuntimeError, match="step"):
        quiet(callbacks=[callback]).validate(model, loader())
    sane = net(Validated)
    arguments: dict[str, Any] = {"num_sanity_val_steps": 2, "check_val_every_n_epoch": 2}
    quiet(callbacks=[callback], **arguments).fit(sane, loader(), loader(seed=1))
    assert (model.it3_calibration.by, sane.it3_calibration.by) == ("", "")


def test_several_dataloaders_are_measured_together() -> None:
    model, data = net(Validated), [loader(seed=1), loader(count=5, seed=2)]
    quiet(callbacks=[gated()]).validate(model, data, verbose=False)
    expected = torch.cat([distances(model, part) for part in data]).numpy()
    quantile = model.it3_calibration.quantile(0.9, by=MEASURED)
    assert quantile == pytest.approx(np.quantile(expected, 0.9), rel=1e-6)


def test_bad_validation_sample_is_left_out_alone() -> None:
    model, (images, labels) = net(Validated), samples(20, 1)
    expected = distances(model, [(images, labels)])
    images[3] = float("nan")
    data: Any = DataLoader(TensorDataset(images, labels), batch_size=8)
    quiet(callbacks=[gated()]).validate(model, data, verbose=False)
    known = expected[[index for index in range(20) if index != 3]].numpy()
    quantile = model.it3_calibration.quantile(0.5, by=MEASURED)
    assert quantile == pytest.approx(np.quantile(known, 0.5), rel=1e-6)


def test_validation_data_that_cannot_be_measured_is_told() -> None:
    model = net(Validated)
    with pytest.warns(UserWarning, match="not calibrated: no validation sample could be measured"):
        quiet(callbacks=[gated(norm_stats="batch")]).validate(
            model, loader(3, 2, seed=1, drop_last=False, sampler=[0]), verbose=False
        )
    assert model.it3_calibration.by == ""


# Refusals, before any batch


class Steps(Validated):
    """Takes no step."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        raise AssertionError("a step was taken")


@pytest.mark.parametrize(
    ("measured", "message"),
    [
        (None, r"measured by Idempotence, distance 'l2', norm_stats 'source'; they have not been"),
        ({"objective": Idempotence("js")}, "they were measured by Idempotence, distance 'js'"),
        ({"norm_stats": "batch"}, "they were measured by .*, norm_stats 'batch'"),
    ],
    ids=["never", "distance", "statistics"],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_gate_that_was_not_calibrated_so_is_refused(
    measured: Any, message: str, scope: Any
) -> None:
    model = net(Steps)
    if measured is not None:
        quiet(callbacks=[gated(**measured)]).validate(model, loader(seed=1), verbose=False)
    with pytest.raises(MisconfigurationException, match=message):
        quiet(callbacks=[gated(scope=scope)]).test(model, loader())


def test_gate_on_the_data_it_is_calibrated_on_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot gate stage 'validate'"):
        IT3TestTimeCallback(gate=0.95, stages=["validate"])


@pytest.mark.parametrize("gate", [-0.1, 1.5, float("nan")])
def test_gate_that_is_no_share_is_refused(gate: float) -> None:
    with pytest.raises(ValueError, match=r"gate to be a share in \[0, 1\] or None, got"):
        IT3TestTimeCallback(gate=gate)


class Foreign(LightningModule):
    """Predicts with a prior in its own way, without the mixin."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ToyNet()
        self.it3_prior = ClassPrior(3)
        self.prior: Tensor | None = None

    def it3_inputs(self, batch: Any) -> Any:
        return batch[0]

    def predict_with(self, inputs: Any, prior: Tensor | None) -> Tensor:
        with self.it3_given(prior):
            outputs: Tensor = self(inputs)
            return outputs

    @contextmanager
    def it3_given(self, prior: Tensor | None) -> Iterator[None]:
        before, self.prior = self.prior, prior
        yield
        self.prior = before

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x, self.prior)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        raise AssertionError("a step was taken")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self(batch[0])

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_module_without_a_place_for_the_quantiles_is_refused(stage: str) -> None:
    data = [loader(), loader()] if stage == "fit" else [loader()]
    with pytest.raises(MisconfigurationException, match="Foreign has no place for them"):
        getattr(quiet(callbacks=[gated()]), stage)(seeded(Foreign()), *data)


@pytest.mark.parametrize("scope", SCOPES)
def test_module_without_the_mixin_may_have_a_place(scope: Any) -> None:
    model = seeded(Foreign())
    model.it3_calibration = Calibration()
    quiet(callbacks=[gated()]).validate(model, loader(seed=1), verbose=False)
    callback = gated(scope=scope)
    outputs, source = predicted(model, callback), predicted(model)
    assert 0 < callback.summary.gated < 12
    assert (outputs - source).abs().max() > 1e-3


# What the gate does


def beyond(model: Any, gate: float = 0.5) -> Tensor:
    """Which test samples lie beyond the gate, by numpy's quantile."""
    limit = np.quantile(distances(model, loader(count=20, seed=1)).numpy(), gate)
    found: Tensor = distances(model, loader()) > limit
    assert 0 < found.sum() < 12
    return found


@pytest.mark.parametrize("backend", ["loop", "vectorised"])
@pytest.mark.parametrize("prediction", ["first", "second"])
def test_samples_within_the_gate_get_exactly_the_source_prediction(
    prediction: Any, backend: Any
) -> None:
    model = calibrated()
    moved = beyond(model)
    made = {"scope": "sample", "backend": backend, "prediction": prediction}
    callback = adapting(gate=0.5, **made)
    outputs = predicted(model, callback)
    source = predicted(model, adapting(steps=0, prediction=prediction))
    adapted = predicted(model, adapting(**made))
    assert torch.equal(outputs[~moved], source[~moved])
    torch.testing.assert_close(outputs[moved], adapted[moved], rtol=0, atol=1e-9)
    assert callback.summary.gated == (~moved).sum()
    assert callback.summary.moved == moved.sum()


@pytest.mark.parametrize("norm_stats", ["source", "batch"])
def test_samples_within_the_gate_do_not_move_the_weights_of_a_batch(norm_stats: Any) -> None:
    model = calibrated(norm_stats=norm_stats)
    limit = np.quantile(
        distances(model, loader(count=20, seed=1), norm_stats=norm_stats).numpy(), 0.5
    )
    outputs = torch.split(predicted(model, gated(norm_stats=norm_stats)), 4)
    for (x, _), actual in zip(loader(), outputs, strict=True):
        source = _source(model, norm_stats)
        weights = {n: p.requires_grad_() for n, p in source.named_parameters()}
        p0 = source.predict_with(x, None).softmax(1)  # type: ignore[operator]
        p1 = _source(model, norm_stats).predict_with(x, p0).softmax(1)  # type: ignore[operator]
        distance = (p0 - p1).square().sum(1)
        loss = distance[distance > limit].sum() / max(1, (distance > limit).sum())
        grads = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), grads, strict=True):
            if gradient is not None and not name.startswith("it3_"):
                weight.data -= 0.05 * gradient
        torch.testing.assert_close(actual, source(x).detach(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("scope", "reset"), [("batch", "batch"), ("batch", "never"), ("sample", "batch")]
)
def test_where_all_samples_are_usual_nothing_is_adapted(scope: Any, reset: Any) -> None:
    model = net(Validated)
    quiet(callbacks=[gated()]).validate(model, loader(), verbose=False)
    callback = gated(1.0, scope=scope, reset=reset)
    assert torch.equal(predicted(model, callback), predicted(model))
    assert (callback.summary.gated, callback.summary.moved) == (12, 0)


@pytest.mark.parametrize("scope", SCOPES)
def test_share_within_the_gate_is_logged_and_counted(scope: Any) -> None:
    model = calibrated()
    callback = gated(scope=scope)
    (logged,) = quiet(callbacks=[callback]).test(model, loader(), verbose=False)
    within = int((~beyond(model)).sum())
    assert callback.summary.gated == within
    assert logged["it3/gated"] == pytest.approx(within / 12)
    assert logged["it3/moved"] == pytest.approx(1 - within / 12)
    assert f"{within} within the gate" in str(callback.summary)
    (plain,) = quiet(callbacks=[adapting(scope=scope)]).test(model, loader(), verbose=False)
    assert logged.keys() - plain.keys() == {"it3/gated"}


@pytest.mark.parametrize("scope", SCOPES)
def test_module_is_what_it_was_after_a_run_with_a_gate(scope: Any) -> None:
    model = calibrated()
    predicted(model)
    before = everything(model.eval())
    predicted(model, gated(scope=scope))
    assert differing(before, everything(model)) == []


# The distances as scores


def test_summary_holds_the_distance_of_every_sample_by_dataloader() -> None:
    data: Any = [loader(), loader(count=7, seed=1)]
    for settings in ({}, {"scope": "sample"}, {"reset": "never"}, {"steps": 0}, {"measure": False}):
        callback = adapting(**{"backend": "loop", **settings})
        quiet(callbacks=[callback]).predict(net(), data)
        for actual, part in zip(callback.summary.distances, data, strict=True):
            torch.testing.assert_close(actual, distances(net(), part), rtol=0, atol=1e-9)


def test_distances_that_are_not_known_are_nan() -> None:
    images, labels = samples()
    images[5] = float("nan")
    data: Any = DataLoader(TensorDataset(images, labels), batch_size=4)
    callback = adapting()
    with pytest.warns(UserWarning, match="non-finite output"):
        predicted(net(), callback, data=data)
    (measured,) = callback.summary.distances
    assert measured.isnan().tolist() == 4 * [False] + 4 * [True] + 4 * [False]
    unknown = adapting(reset="never", measure=False)
    predicted(net(), unknown)
    assert unknown.summary.distances[0].isnan().tolist() == 4 * [False] + 8 * [True]
