"""The gate for streams: the source until a shift is proved, then what adapts; under a Trainer."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toy import (
    Batch,
    LitNet,
    Marked,
    Validated,
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
from helpers.toy import predicted as predicted_of
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import (
    EATA,
    ROID,
    T3A,
    ClassPrior,
    CoTTA,
    Idempotence,
    IT3Predictor,
    IT3TestTimeCallback,
    Settings,
    Tent,
    TestTimeCallback,
)
from it3_lightning.calibration import Calibration
from it3_lightning.engine.betting import ConformalMartingale
from it3_lightning.integration.stream_gate import score_of
from it3_lightning.methods import Entropy

SCOPES: list[Any] = ["batch", "sample"]
SIZE = 4  # of a batch
SHIFTED = 2  # the batch that the shift begins with
DELTA = 0.05


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def serving(images: Tensor, labels: Tensor, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, labels), batch_size=SIZE, **kwargs)


def source_data(count: int = 60) -> DataLoader[Any]:
    images, labels = samples(count, 1)
    return serving(0.05 * images, labels)


def stream(batches: int = 5) -> tuple[Tensor, Tensor]:
    """Samples like the source's, and, from the third batch on, others far from them."""
    images, labels = samples(SIZE * batches, 0)
    images = 0.05 * images
    images[SIZE * SHIFTED :] += 3
    return images, labels


def betting(delta: float = DELTA, **settings: Any) -> IT3TestTimeCallback:
    return adapting(**{"gate": "bet", "delta": delta, "backend": "loop", **settings})


def calibrated(kind: Any = Validated, callback: Any = None, **args: Any) -> Any:
    model = net(kind, **args)
    quiet(callbacks=[callback or betting()]).validate(model, source_data(), verbose=False)
    return model


def predicted(model: Any, *callbacks: Any, data: Any = None) -> Tensor:
    return predicted_of(model, *callbacks, data=data or serving(*stream()))


@torch.no_grad()
def distances(model: Any, images: Tensor) -> Tensor:
    first = model.predict_with(images, None).softmax(1)
    found: Tensor = (first - model.predict_with(images, first).softmax(1)).square().sum(1)
    return found


def begin(model: Any) -> ConformalMartingale:
    known = distances(model.eval(), source_data().dataset.tensors[0])  # type: ignore[attr-defined]
    return ConformalMartingale.of(known.float().tolist())


def opening(model: Any, images: Tensor, delta: float = DELTA) -> int | None:
    """Which batch opens the gate, by distances of the source."""
    bet = begin(model)
    for index, batch in enumerate(torch.split(images, SIZE)):
        bet = bet.after(distances(model, batch).float().tolist())
        if bet.highest >= 1 / delta:
            return index
    return None


# What a stream gets


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "sample"},
        {"scope": "sample", "backend": "vectorised"},
        {"norm_stats": "batch"},
        {"norm_stats": "mixed"},
        {"reset": "never", "anchor": "ema"},
        {"steps": 3, "measure": False},
        {"prediction": "second"},
        {"prediction": "mean", "norm_stats": "batch", "steps": 0},
        {"prediction": "second", "scope": "sample"},
        {"objective": Idempotence(balance=0.5), "optimizer": "sgd"},
    ],
    ids=str,
)
def test_a_shut_gate_is_no_callback_to_the_last_bit(settings: Any) -> None:
    model = calibrated(callback=betting(**settings))
    callback = betting(1e-12, **settings)
    assert torch.equal(predicted(model, callback), predicted(model))
    assert (callback.summary.gated, callback.summary.moved) == (20, 0)
    (measured,) = callback.summary.distances
    torch.testing.assert_close(measured, distances(model.eval(), stream()[0]), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scope": "sample"},
        {"norm_stats": "batch"},
        {"reset": "never"},
        {"prediction": "second"},
        {"prediction": "mean", "scope": "sample"},
    ],
    ids=str,
)
def test_the_batch_that_proves_the_shift_and_all_later_ones_are_adapted_to(settings: Any) -> None:
    model = calibrated(callback=betting(**settings))
    assert opening(model, stream()[0]) == SHIFTED
    callback = betting(**settings)
    outputs, source = predicted(model, callback), predicted(model)
    images, labels = stream()
    after = serving(images[SIZE * SHIFTED :], labels[SIZE * SHIFTED :])
    adapted = predicted(model, adapting(backend="loop", **settings), data=after)
    assert torch.equal(outputs[: SIZE * SHIFTED], source[: SIZE * SHIFTED])
    torch.testing.assert_close(outputs[SIZE * SHIFTED :], adapted, rtol=0, atol=1e-9)
    assert (adapted - source[SIZE * SHIFTED :]).abs().max() > 1e-3
    assert callback.summary.gated == SIZE * SHIFTED


def test_an_open_gate_stays_open_on_samples_like_the_source() -> None:
    model, (images, labels) = calibrated(), stream(8)
    images[SIZE * 4 :] = 0.05 * samples(SIZE * 4, 3)[0]
    callback = betting()
    outputs = predicted(model, callback, data=serving(images, labels))
    adapted = predicted(model, adapting(), data=serving(images, labels))
    torch.testing.assert_close(outputs[SIZE * SHIFTED :], adapted[SIZE * SHIFTED :])
    assert callback.summary.gated == SIZE * SHIFTED


@pytest.mark.parametrize("scope", SCOPES)
def test_every_dataloader_and_every_run_begins_shut(scope: Any) -> None:
    model, callback = calibrated(), betting(scope=scope)
    for _ in range(2):
        both: Any = quiet(callbacks=[callback]).predict(model, [serving(*stream())] * 2)
        first, second = (torch.cat(batches) for batches in both)
        assert torch.equal(first, second)
        assert callback.summary.gated == 2 * SIZE * SHIFTED


@pytest.mark.parametrize("scope", SCOPES)
def test_a_step_that_calls_the_module_often_bets_once(scope: Any) -> None:
    class Views(Validated):
        def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
            return (self(batch[0]) + self(-batch[0]) + self(batch[0] + 3)) / 3  # type: ignore[no-any-return]

    model, callback = calibrated(Views), betting(scope=scope)
    outputs, source = predicted(model, callback), predicted(model)
    assert callback.summary.gated == SIZE * SHIFTED
    assert torch.equal(outputs[: SIZE * SHIFTED], source[: SIZE * SHIFTED])


def test_batches_of_another_size_bet_alike() -> None:
    model, (images, labels) = calibrated(), stream()
    opened = []
    for size in (1, 2, 4):
        data: Any = DataLoader(TensorDataset(images, labels), batch_size=size)
        callback = betting(scope="sample")
        predicted(model, callback, data=data)
        opened.append(callback.summary.gated)
    assert opened[0] // 4 * 4 == opened[1] // 4 * 4 == opened[2]
    assert opened[0] // 2 * 2 == opened[1]


@pytest.mark.parametrize(
    "method",
    [Tent(), EATA(fisher_weight=0), ROID(), CoTTA(), T3A("net.head")],
    ids=lambda m: type(m).__name__,
)
def test_methods_from_the_literature_wait_behind_it(method: Any) -> None:
    model = seeded(type("Plain", (LitNet,), {"validation_step": lambda *_: None})())
    model.it3_calibration = Calibration()
    given: dict[str, Any] = {"norm_stats": "batch", "gate": "bet"}
    quiet(callbacks=[TestTimeCallback(method, **given)]).validate(
        model, source_data(), verbose=False
    )
    shut, source = TestTimeCallback(method, delta=1e-12, **given), predicted(model)
    assert torch.equal(predicted(model, shut), source)
    outputs = predicted(model, callback := TestTimeCallback(method, delta=0.2, **given))
    opened = callback.summary.gated
    assert SIZE * SHIFTED <= opened < 20
    assert torch.equal(outputs[:opened], source[:opened])
    assert (outputs[opened:] - source[opened:]).abs().max() > 1e-3


def test_what_is_bet_on_is_of_each_sample_by_itself() -> None:
    def of_batch(y0: Tensor, second: Any) -> Any:
        raise AssertionError("it was asked")

    of_batch.needs_batch = True  # type: ignore[attr-defined]
    assert score_of(Settings(objective=of_batch).method) == Idempotence()  # type: ignore[arg-type]
    assert score_of(Tent()) == Tent()
    assert score_of(Entropy(balance=1.0)) == score_of(CoTTA()) == Entropy()
    assert score_of(Idempotence("js", balance=0.1)) == Idempotence("js")


def test_a_context_of_the_prior_is_each_samples_own_in_the_bet() -> None:
    for context in ("batch", "stream"):
        model = calibrated(prior=ClassPrior(3, context=context))
        callback = betting(1e-12)
        assert torch.equal(predicted(model, callback), predicted(model))
        (measured,) = callback.summary.distances
        alone = [distances(model.eval(), image[None]) for image in stream()[0]]
        torch.testing.assert_close(measured, torch.cat(alone), rtol=0, atol=1e-9)
        opened = betting()
        assert (predicted(model, opened) - predicted(model)).abs().max() > 1e-3
        assert "carried" not in vars(model.it3_prior)


def test_evidence_and_bets_are_measured_in_one_validation() -> None:
    model = calibrated(callback=betting(norm_stats="evidence"))
    shut, opened = (betting(delta, norm_stats="evidence") for delta in (1e-12, DELTA))
    assert torch.equal(predicted(model, shut), predicted(model))
    outputs, whole = predicted(model, opened), predicted(model, adapting(norm_stats="evidence"))
    assert opened.summary.gated == SIZE * SHIFTED
    torch.testing.assert_close(outputs[SIZE * SHIFTED :], whole[SIZE * SHIFTED :])


@pytest.mark.parametrize("scope", SCOPES)
def test_the_share_kept_at_the_source_is_logged(scope: Any) -> None:
    model = calibrated()
    (logged,) = quiet(callbacks=[betting(scope=scope)]).test(
        model, serving(*stream()), verbose=False
    )
    assert logged["it3/gated"] == pytest.approx(SHIFTED / 5)


# What does not count


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sample_that_is_not_finite_does_not_count(scope: Any) -> None:
    model, (images, labels) = calibrated(), stream()
    images[[1, 6]] = float("nan")
    callback = betting(scope=scope)
    with pytest.warns(UserWarning, match="keeps the source prediction of a .*: non-finite output"):
        outputs = predicted(model, callback, data=serving(images, labels))
    source = predicted(model, data=serving(images, labels))
    assert torch.equal(outputs[:8].nan_to_num(9.0), source[:8].nan_to_num(9.0))
    assert (callback.summary.gated, callback.summary.skipped) == (6, 2)
    seen = distances(model.eval(), images[[i for i in range(20) if i not in (1, 6)]])
    before, after = (begin(model).after(seen[:count].float().tolist()) for count in (6, 10))
    assert before.highest < 1 / DELTA <= after.highest


def test_a_batch_that_is_skipped_opens_nothing_and_does_not_count() -> None:
    model, (images, labels), delta = calibrated(), stream(), 0.5
    images[SIZE * SHIFTED] = float("nan")  # the other three of the batch would prove the shift
    finite = distances(model.eval(), images[: SIZE * (SHIFTED + 1)]).float().tolist()
    assert begin(model).after(finite).highest >= 1 / delta
    callback = betting(delta)
    with pytest.warns(UserWarning, match="keeps the source prediction of a batch"):
        outputs = predicted(model, callback, data=serving(images, labels))
    rest = [*range(SIZE * SHIFTED), *range(SIZE * SHIFTED + 1, SIZE * (SHIFTED + 1))]
    assert torch.equal(outputs[rest], predicted(model)[rest])
    assert (callback.summary.gated, callback.summary.skipped) == (SIZE * SHIFTED, SIZE)
    predictor = IT3Predictor(model, Settings(objective=Idempotence()), gate="bet", delta=delta)
    for batch in torch.split(images[: SIZE * (SHIFTED + 1)], SIZE):
        predictor(batch)
    assert predictor._gate is not None
    assert (predictor._gate.open, predictor._gate.martingale.count) == (False, SIZE * SHIFTED)


# Nothing is left


@pytest.mark.parametrize("end", [None, RuntimeError("step"), KeyboardInterrupt()])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("delta", [1e-12, 0.5])
def test_nothing_is_left_on_the_module(delta: float, scope: Any, end: Any) -> None:
    model = calibrated(Marked)
    predicted(model)
    model.calls.zero_()
    before = everything(model.eval())
    model.fails = end
    with ending(end):
        predicted(model, betting(delta, scope=scope))
    model.fails = None
    left = differing(before, everything(model))
    assert set(left) <= {"buffer calls"}


def test_measuring_leaves_training_alone() -> None:
    runs = []
    for callbacks in ([], [betting()]):
        model = net(Validated)
        torch.manual_seed(0)
        trainer = quiet(callbacks=callbacks, max_epochs=2, num_sanity_val_steps=2)
        trainer.fit(model, loader(), source_data())
        runs.append((model, dict(trainer.callback_metrics)))
    (plain, logged), (model, same) = runs
    changed = differing(everything(plain), everything(model))
    assert {name.partition(" ")[0] for name in changed} <= {"storage"}
    assert all(torch.equal(same[name], value) for name, value in logged.items())
    assert len(model.it3_calibration.reference["distances"]) == 60


# Calibration


def test_a_checkpoint_holds_the_distances_beside_the_quantiles(tmp_path: Path) -> None:
    kept = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    trainer = quiet(callbacks=[betting(), kept], enable_checkpointing=True)
    model = net(Validated)
    trainer.fit(model, loader(), source_data())
    loaded = Validated.load_from_checkpoint(tmp_path / "last.ckpt", **parts(), weights_only=True)
    known = loaded.it3_calibration.reference["distances"]
    assert known.tolist() == begin(loaded).reference.tolist()
    quiet(callbacks=[adapting(gate=0.5)]).validate(loaded, source_data(), verbose=False)
    assert torch.equal(loaded.it3_calibration.reference["distances"], known)
    predicted(loaded, betting())
    assert loaded.it3_calibration.by != ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "measured by Idempotence, distance 'l2', norm_stats 'source'; they have not been"),
        ({"objective": Idempotence("js")}, "they were measured by Idempotence, distance 'js'"),
    ],
    ids=["never", "distance"],
)
@pytest.mark.parametrize("scope", SCOPES)
def test_a_bet_without_distances_to_bet_against_is_refused(
    settings: Any, message: str, scope: Any
) -> None:
    model = net(Validated) if settings is None else calibrated(callback=betting(**settings))
    with pytest.raises(MisconfigurationException, match=message):
        predicted(model, betting(scope=scope))
    with pytest.raises(MisconfigurationException, match=r"IT3TestTimeCallback\(gate='bet'\)"):
        IT3Predictor(model, Settings(objective=Idempotence(reliability=None)), gate="bet")


def test_a_bet_against_distances_of_other_weights_is_refused() -> None:
    model = calibrated()
    model.net.head.bias.data += 1
    with pytest.raises(MisconfigurationException, match="these weights; they were measured with o"):
        predicted(model, betting())


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match=r"delta to be a probability in \(0, 1\), got"):
        IT3TestTimeCallback(gate="bet", delta=delta)
    with pytest.raises(ValueError, match=r"delta to be a probability in \(0, 1\), got"):
        IT3Predictor(net(), gate="bet", delta=delta)


def test_a_gate_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate to be a share in \[0, 1\], 'bet' or None, got 'b'"):
        IT3TestTimeCallback(gate="b")


def test_a_module_without_a_place_for_the_distances_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="LitNet has no place for them"):
        quiet(callbacks=[TestTimeCallback(Tent(), gate="bet")]).test(LitNet(), loader())


# Without a Trainer


@pytest.mark.parametrize("prediction", ["first", "second"])
@pytest.mark.parametrize("scope", SCOPES)
def test_a_predictor_bets_along_its_calls(scope: Any, prediction: Any, tmp_path: Path) -> None:
    model = calibrated()
    expected = torch.split(predicted(model, betting(scope=scope, prediction=prediction)), SIZE)
    settings = Settings(
        objective=Idempotence(reliability=None),
        optimizer="sgd",
        lr=0.05,
        scope=scope,
        backend="loop",
    )
    given: dict[str, Any] = {"gate": "bet", "delta": DELTA, "prediction": prediction}
    predictor = IT3Predictor(model, settings, **given)
    for _ in range(2):
        for index, batch in enumerate(torch.split(stream()[0], SIZE)):
            found = predictor(batch)
            torch.testing.assert_close(found.outputs, expected[index], rtol=0, atol=1e-9)
            assert found.gated.tolist() == [index < SHIFTED] * SIZE
            if index < SHIFTED:
                assert torch.equal(found.outputs, found.source_outputs)
        predictor.restart()


def test_a_call_that_fails_does_not_count() -> None:
    class Fails(Validated):
        fails = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fails:
                raise RuntimeError("forward")
            return super().forward(x)

    model = calibrated(Fails)
    predictor = IT3Predictor(model, Settings(objective=Idempotence()), gate="bet")
    predictor(stream()[0][:4])
    model.fails = True
    with pytest.raises(RuntimeError, match="forward"):
        predictor(stream()[0][4:8])
    model.fails = False
    assert predictor._gate is not None
    assert predictor._gate.martingale.count == 4


def test_equal_distances_bet_the_same_in_every_run() -> None:
    model = calibrated()
    images = torch.zeros(20, 1, 4, 4)
    runs: list[ConformalMartingale] = []
    for _ in range(2):
        predictor = IT3Predictor(model, Settings(objective=Idempotence()), gate="bet")
        torch.manual_seed(len(runs))
        with warnings.catch_warnings(action="error"):
            predictor(images)
        assert predictor._gate is not None
        runs.append(predictor._gate.martingale)
    assert runs[0] == runs[1]
    assert runs[0].count == 20
