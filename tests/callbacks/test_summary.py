"""What the callback logs and sums up: each sample once, its baseline beside it, per dataloader."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.toy import Batch, IT3Net, adapting, doubles, loader, net, quiet, samples
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassPrecision, MulticlassRecall

from it3_lightning.callbacks import summary, test_time


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def test_logs_inside_forward_are_those_of_the_step_alone() -> None:
    class Logs(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            if not self.trainer.predicting:
                self.log("inside", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            return super().forward(x)

    for prediction in ("first", "second"):
        trainer = quiet(callbacks=[adapting(steps=3, prediction=prediction)])
        (logged,) = trainer.test(net(Logs), loader(), verbose=False)
        assert logged["inside"] == 3


def test_metrics_of_the_step_count_each_sample_once() -> None:
    class Metrics(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.group = MetricCollection([MulticlassPrecision(3), MulticlassRecall(3)])
            self.count = MeanMetric()
            self.outputs: list[Tensor] = []

        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            logits = self(batch[0])
            self.group.update(logits, batch[1])
            self.count.update(1.0, len(logits))
            self.outputs.append(logits)
            self.log_dict(self.group)

    model = net(Metrics)
    (logged,) = quiet(callbacks=[adapting(steps=2)]).test(model, loader(), verbose=False)
    outputs, labels = torch.cat(model.outputs), samples()[1]
    for kind in (MulticlassPrecision, MulticlassRecall):
        expected = kind(3)(outputs, labels).item()
        assert logged[kind.__name__] == pytest.approx(expected)
    assert model.count.weight == 12


def test_each_dataloader_starts_from_the_source_and_logs_its_own_numbers() -> None:
    settings: dict[str, Any] = {"reset": "never", "steps": 2}
    (alone,) = quiet(callbacks=[adapting(**settings)]).test(net(), loader(seed=1), verbose=False)
    both: Any = [loader(seed=0), loader(seed=1)]
    logged = quiet(callbacks=[adapting(**settings)]).test(net(), both, verbose=False)
    assert not set(logged[0]) & set(logged[1])
    for name in ("test_loss", "it3/distance_source", "it3/distance_adapted", "it3/skipped"):
        assert logged[1][f"{name}/dataloader_idx_1"] == alone[name]
    assert logged[0]["it3/distance_source/dataloader_idx_0"] != alone["it3/distance_source"]


def test_without_measuring_no_distance_is_logged_and_predictions_stay() -> None:
    trainer = quiet(callbacks=[adapting(measure=False)])
    (logged,) = trainer.test(net(), loader(), verbose=False)
    measured = quiet(callbacks=[adapting()]).test(net(), loader(), verbose=False)[0]
    assert {"it3/distance_source", "it3/distance_adapted"} == measured.keys() - logged.keys()
    assert logged["test_loss"] == measured["test_loss"]


def test_distance_that_is_never_measured_is_logged_as_nan() -> None:
    class Bad(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float("nan")

    with pytest.warns(UserWarning, match="non-finite output"):
        (logged,) = quiet(callbacks=[adapting()]).test(net(Bad), loader(), verbose=False)
    assert logged["it3/skipped"] == 12
    assert torch.tensor(logged["it3/distance_source"]).isnan()


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 0, "prediction": "second"},
        {"steps": 0, "prediction": "mean", "norm_stats": "batch"},
        {"steps": 2},
        {"scope": "sample", "backend": "loop"},
    ],
    ids=str,
)
def test_the_time_is_that_of_all_passes(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(summary, "time", clock)

    class Slow(IT3Net):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 0.25
            return super().forward(x)

    monkeypatch.setattr(test_time, "time", clock)
    callback = adapting(**settings)
    (logged,) = quiet(callbacks=[callback]).test(net(Slow), loader(), verbose=False)
    assert clock.now >= 0.25 * (2 if settings.get("prediction") else 1) * 3  # batches
    assert callback.summary.milliseconds == pytest.approx(1000 * clock.now)
    assert logged["it3/ms_per_sample"] == pytest.approx(1000 * clock.now / 12)


UNMOVED: dict[str, dict[str, Any]] = {
    "no step": {"steps": 0},
    "no step, scope sample": {"steps": 0, "scope": "sample"},
    "steps of no length": {"lr": 0.0},
    "steps of no length, vectorised": {"lr": 0.0, "scope": "sample", "backend": "vectorised"},
    "steps of no length, carried": {"lr": 0.0, "steps": 2, "reset": "never"},
}


@pytest.mark.parametrize("settings", UNMOVED.values(), ids=UNMOVED)
def test_no_sample_is_said_to_have_moved_weights_that_are_the_sources(
    settings: dict[str, Any],
) -> None:
    callback = adapting(**settings)
    (logged,) = quiet(callbacks=[callback]).test(net(), loader(), verbose=False)
    assert str(callback.summary).startswith("12 samples, 0 moved the weights, 0 skipped")
    assert logged["it3/moved"] == 0


def test_the_time_of_logging_is_logged_but_for_the_last_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    for module in (summary, test_time):
        monkeypatch.setattr(module, "time", clock)

    class Slow(IT3Net):
        def log(self, name: str, *args: Any, **kwargs: Any) -> None:
            clock.now += 10.0 if name == "it3/ms_per_sample" else 1.0
            super().log(name, *args, **kwargs)

    callback = adapting()
    (logged,) = quiet(callbacks=[callback]).test(net(Slow), loader(), verbose=False)
    each = 1 + 2 + 1 + 1 + 10  # loss, distances, moved, skipped, time; of three batches
    assert clock.now == 3 * each
    assert callback.summary.milliseconds == pytest.approx(1000 * (3 * each - 10))
    assert logged["it3/ms_per_sample"] == pytest.approx(1000 * (3 * each - 10) / 12)


def test_summary_holds_what_was_logged() -> None:
    callback = adapting()
    (logged,) = quiet(callbacks=[callback]).test(net(), loader(), verbose=False)
    found = callback.summary
    assert (found.samples, found.moved, found.skipped) == (12, 12, 0)
    assert found.distance_source == pytest.approx(logged["it3/distance_source"])
    assert found.distance_adapted == pytest.approx(logged["it3/distance_adapted"])
    assert found.ms_per_sample == pytest.approx(logged["it3/ms_per_sample"])
    assert str(found).startswith("12 samples, 12 moved the weights, 0 skipped; distance 0.")


@pytest.mark.parametrize(("lr", "rose"), [(1e-3, False), (100.0, True)])
def test_the_summary_says_that_steps_went_too_far(lr: float, rose: bool) -> None:
    callback = adapting(lr=lr)
    quiet(callbacks=[callback]).predict(net(), loader())
    found = callback.summary
    assert (found.distance_adapted > 1.05 * found.distance_source) is rose
    assert ("it rose: take a smaller lr, or fewer steps" in str(found)) is rose
    assert "rose" not in str(summary.Summary())
