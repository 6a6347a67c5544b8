"""The ten laws, at the level of a Trainer."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.reference import Record, Reset, adapt_stream
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
    quiet,
    samples,
    seeded,
)
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import DualPass, Idempotence, IT3TestTimeCallback


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def predictions(model: LightningModule, data: Any, *callbacks: IT3TestTimeCallback) -> list[Any]:
    predicted: Any = quiet(callbacks=list(callbacks)).predict(model, data)
    return list(predicted)


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


# 1. Labels never reach adaptation


def test_scrambled_labels_leave_every_prediction_unchanged() -> None:
    class Keeps(IT3Net):
        def test_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            seen.append(self(batch[0]))

    (images, labels), runs = samples(), []
    for target in (labels, labels.roll(1), torch.full_like(labels, 2)):
        seen: list[Tensor] = []
        data: Any = DataLoader(TensorDataset(images, target), batch_size=4)
        quiet(callbacks=[adapting()]).test(net(Keeps), data, verbose=False)
        runs.append(torch.cat(seen))
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


# 2. Nothing is left behind


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "error", [None, ValueError("step"), KeyboardInterrupt(), ValueError("engine")], ids=str
)
@pytest.mark.parametrize("reset", ["batch", "never"])
def test_nothing_is_left_behind(stage: Any, error: BaseException | None, reset: Reset) -> None:
    model: Any = net(Marked).eval()
    quiet().predict(model, loader())  # Lightning leaves attributes of its own
    in_engine = str(error) == "engine"
    model.fails = None if in_engine else error
    model.calls.zero_()
    Raises.batches = 0
    objective = Raises(reliability=None) if in_engine else Idempotence(reliability=None)
    before = everything(model)
    callback = adapting(objective=objective, norm_stats="batch", reset=reset, stages=[stage])
    trainer = quiet(callbacks=[callback])
    with ending(error):
        getattr(trainer, stage)(model, loader())
    model.calls.sub_(2 if error else 3).clamp_(min=0)  # the step's own doing
    assert differing(before, everything(model)) == []
    assert trainer.global_step == 0


def test_training_goes_on_as_if_nothing_had_been_adapted() -> None:
    exact = DualPass(perturb_prior=False)
    models = [net(dual_pass=exact), net(dual_pass=exact)]
    for model, tested in zip(models, (True, False), strict=True):
        quiet().fit(model, loader())
        if tested:
            quiet(callbacks=[adapting(steps=2)]).test(model, loader(seed=1), verbose=False)
        quiet().fit(model, loader())
    ours, theirs = (model.state_dict() for model in models)
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


# 3. Off is off


def test_second_prediction_draws_no_random_numbers_of_its_own() -> None:
    states = []
    for callbacks in ([], [adapting(steps=0, prediction="second")]):
        torch.manual_seed(0)
        predictions(net(Draws), loader(), *callbacks)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize("kind", [IT3Net, Draws])
@pytest.mark.parametrize("measure", [True, False])
def test_no_steps_are_no_callback(kind: type[IT3Net], measure: bool) -> None:
    model, runs = net(kind), []
    for callbacks in ([], [adapting(steps=0, measure=measure)]):
        torch.manual_seed(0)
        runs.append((predictions(model, loader(), *callbacks), torch.get_rng_state()))
    assert torch.equal(torch.cat(runs[0][0]), torch.cat(runs[1][0]))
    assert torch.equal(runs[0][1], runs[1][1])


# 4. The neutral pass is the network


def test_module_with_priors_predicts_as_the_plain_one() -> None:
    plain, model = seeded(LitNet()), net()
    model.load_state_dict(plain.state_dict())
    ours, theirs = predictions(model, loader()), predictions(plain, loader())
    assert torch.equal(torch.cat(ours), torch.cat(theirs))


# 5. Episodic is independent


def test_episodic_predictions_depend_on_their_own_batch_alone() -> None:
    model = net()
    images, labels = samples()
    together = torch.cat(predictions(model, loader(), adapting(optimizer="adam")))
    back: Any = DataLoader(TensorDataset(images[8:], labels[8:]), batch_size=4)
    alone = torch.cat(predictions(model, back, adapting(optimizer="adam")))
    assert torch.equal(together[8:], alone)


# 6. and 7. The prediction is after the last step; the second pass is an anchor


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
    assert logged["it3/reliable"] == pytest.approx(8 / 12)


# 9. Every number comes with its baseline


def test_source_distance_and_cost_are_logged_beside_the_adapted_distance() -> None:
    (logged,) = quiet(callbacks=[adapting()]).test(net(), loader(), verbose=False)
    (plain,) = quiet().test(net(), loader(), verbose=False)
    ours = {"distance_source", "distance_adapted", "reliable", "skipped", "ms_per_sample"}
    assert logged.keys() == plain.keys() | {f"it3/{name}" for name in ours}
    assert logged["it3/distance_adapted"] < logged["it3/distance_source"]
    assert logged["it3/ms_per_sample"] > 0


# 10. Same seed, same result


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


def test_what_forward_collects_counts_once() -> None:
    class Collects(IT3Net):
        def __init__(self, **args: Any) -> None:
            super().__init__(**args)
            self.seen: list[int] = []

        def forward(self, images: Tensor) -> Tensor:
            self.seen.append(len(images))
            return super().forward(images)

    model = net(Collects)
    predictions(model, loader(), adapting(steps=3))
    assert model.seen == [4, 4, 4]


def test_a_compiled_network_adapts_like_the_plain_one() -> None:
    model = net()
    expected_ = torch.cat(predictions(model, loader(), adapting(steps=2)))
    model.net.conv = torch.compile(model.net.conv, backend="eager")
    compiled = torch.cat(predictions(model, loader(), adapting(steps=2)))
    torch.testing.assert_close(compiled, expected_, rtol=0, atol=1e-9)
