"""Distances of every split: against passes and steps by hand, and scikit-learn on their AUROC."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import digits, make_model
from helpers.task_runs import seeded
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from it3_lightning import FeatureInjection, IT3Mixin, MaskPrior, ValuePrior
from it3_lightning.benchmark import Results
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.distance_lines import Distances
from it3_lightning.benchmark.distances import (
    ADAPTED,
    CONFIDENCE,
    DISTANCE,
    SOURCE,
    STATISTICS,
    measured,
    separations,
    splits,
)
from it3_lightning.benchmark.rows import Kind, Row, rows_for
from it3_lightning.benchmark.tables import separation
from it3_lightning.data import (
    AirfoilDataModule,
    BundledDataModule,
    DigitsDataModule,
    RoadScenesDataModule,
    ShiftedData,
)
from it3_lightning.data.images import Augmented, Images
from it3_lightning.methods import Idempotence
from it3_lightning.methods.terms import get_distance
from it3_lightning.networks import MLP, GraphNet
from it3_lightning.tasks import IT3Classifier, IT3Regressor, IT3Segmenter

CPU = torch.device("cpu")
Found = dict[tuple[str, str], list[float]]


def table() -> BundledDataModule:
    return BundledDataModule("diabetes", shifts=["zeroed", "gaussian_noise"], eval_batch_size=20)


def table_model() -> Any:
    network = MLP(10, 1, (8,), output_mean=150.0, output_std=75.0)
    prior, conditioning = ValuePrior(mean=150.0, std=75.0), FeatureInjection("network.layer0")
    return seeded(IT3Regressor(network, prior=prior, conditioning=conditioning)).eval()


def airfoils(root: Path) -> AirfoilDataModule:
    shifts = ["shape_1", "shape_5", "noise"]
    return AirfoilDataModule(root, profiles=400, nodes=16, shifts=shifts, test_size=60)


def airfoil_model() -> Any:
    network = GraphNet(hidden=4, depth=2, kernels=2)
    prior, conditioning = ValuePrior(mean=95.0, std=20.0), FeatureInjection("network.context")
    return seeded(IT3Regressor(network, prior=prior, conditioning=conditioning)).eval()


def roads() -> RoadScenesDataModule:
    sizes: dict[str, Any] = {
        "train_size": 20,
        "val_size": 10,
        "test_size": 12,
        "eval_batch_size": 4,
    }
    return RoadScenesDataModule(None, size=16, shifts=["blur", "contrast"], **sizes)


def road_model() -> Any:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    prior, conditioning = MaskPrior(), FeatureInjection("network.0")
    return seeded(IT3Segmenter(network, prior=prior, conditioning=conditioning)).eval()


KINDS: dict[str, tuple[Callable[[Path], ShiftedData], Callable[[], IT3Mixin]]] = {
    "table": (lambda _: table(), table_model),
    "graph": (airfoils, airfoil_model),
    "roads": (lambda _: roads(), road_model),
}


def rows(classes: bool = False, batch_norm: bool = False, **recipe: Any) -> list[Row]:
    return rows_for(
        Recipe(**{"optimizer": "adam", **recipe}), Kind(classes=classes, batch_norm=batch_norm)
    )


def found(distances: Iterable[Distances]) -> Found:
    return {(each.row, each.split): list(each.values) for each in distances}


def close(actual: list[float], expected: Tensor, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    torch.testing.assert_close(torch.tensor(actual), expected, rtol=rtol, atol=atol)


def two_passes(model: Any, source: Any, x: Any, name: Any) -> Tensor:
    """d(f(x, 0), F(x, f(x, 0))), the second pass on the weights of the source."""
    y0 = model.it3_prior.from_output(model.predict_with(x, None))
    y1 = source.it3_prior.from_output(source.predict_with(x, y0))
    return get_distance(name)(y0, y1)


def stepped(model: Any, x: Any, name: Any, lr: float, steps: int) -> Any:
    """The model after a few steps of Adam on all of the network's weights."""
    adapted = copy.deepcopy(model)
    optimizer = torch.optim.Adam(adapted.network.parameters(), lr=lr)
    for _ in range(steps):
        loss = two_passes(adapted, model, x, name).mean()
        gradients = torch.autograd.grad(loss, list(adapted.network.parameters()))
        for parameter, gradient in zip(adapted.network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_two_passes_by_hand_before_and_after_steps_by_hand(
    kind: str, airfoil_data: Path
) -> None:
    make_data, make = KINDS[kind]
    model, data = make(), make_data(airfoil_data)
    table = rows(distance="l1", episodic_lr=0.01, episodic_steps=2)
    actual = found(measured({"joint": model, "post-hoc": model}, table, data, 12, CPU))
    parts = list(splits(make_data(airfoil_data), 12))
    assert set(actual) == {(row, name) for row in (SOURCE, ADAPTED) for name, _ in parts}
    for name, loader in parts:
        inputs = [model.it3_inputs(batch) for batch in loader]
        before = [two_passes(model, model, x, "l1") for x in inputs]
        after = [two_passes(stepped(model, x, "l1", 0.01, 2), model, x, "l1") for x in inputs]
        close(actual[SOURCE, name], torch.cat(before).detach())
        close(actual[ADAPTED, name], torch.cat(after).detach(), rtol=1e-3, atol=1e-5)


def test_networks_with_batch_statistics_are_measured_with_both_statistics() -> None:
    model = seeded(make_model()).eval()
    table = rows(classes=True, batch_norm=True)
    actual = found(measured({"joint": model, "post-hoc": model}, table, digits(), 100, CPU))
    kinds = [make_model(), make_model()]
    for row, trained in zip((SOURCE, STATISTICS), kinds, strict=True):
        trained.load_state_dict(model.state_dict())
        for layer in trained.eval().modules():
            if row == STATISTICS and isinstance(layer, nn.BatchNorm2d):
                layer.train()
                layer.track_running_stats = False
        for name, loader in splits(digits(), 100):
            images = torch.cat([x for x, _ in loader])  # a single batch
            with torch.no_grad():
                close(actual[row, name], two_passes(trained, trained, images, "js"))
    assert actual[ADAPTED, "contrast/5"] != actual[STATISTICS, "contrast/5"]


def test_the_model_and_the_data_module_are_left_as_they_were() -> None:
    model, data = table_model(), table()
    data.severity, data.stream = 4, "unequal"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measured({"post-hoc": model, "joint": model}, rows(distance="l1"), data, 30, CPU)
    assert (data.severity, data.stream) == (4, "unequal")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_closed_iterator_leaves_the_data_module_as_it_was() -> None:
    data = table()
    parts = splits(data, 20)
    assert [next(parts)[0] for _ in range(4)][-1] == "zeroed/1"
    during = data.severity
    parts.close()
    assert (during, data.severity) == (1, 3)


def names_of(data: ShiftedData, size: int = 10) -> list[str]:
    return [name for name, _ in splits(data, size)]


def test_every_severity_is_there_whatever_the_data_module_is_set_to(airfoil_data: Path) -> None:
    seen = ["train", "validation", "clean"]
    graded = [f"{name}/{level}" for level in range(1, 6) for name in ("zeroed", "gaussian_noise")]
    assert names_of(table()) == [*seen, *graded]
    every = table()
    every.severity = "all"
    assert names_of(every) == [*seen, *graded]
    assert names_of(airfoils(airfoil_data)) == [*seen, "shape_1", "shape_5", "noise"]
    assert names_of(DigitsDataModule(shifts=[])) == seen


class WithOthers(DigitsDataModule):
    """Digits with one more test, on other samples, which has no severity."""

    @property
    def shifted_names(self) -> list[str]:
        return [*super().shifted_names, "unseen"]

    def shifted(self, name: str) -> Images:
        return self._splits["validation"] if name == "unseen" else super().shifted(name)


def test_tests_on_other_samples_come_once() -> None:
    data = WithOthers(shifts=["fog"])
    assert names_of(data)[3:] == [*(f"fog/{level}" for level in range(1, 6)), "unseen"]


def gathered(loader: Iterable[Any]) -> Tensor:
    return torch.cat([inputs for inputs, _ in loader])


def test_each_severity_has_the_samples_that_the_data_module_has_at_it() -> None:
    for name, loader in splits(table(), 10_000):
        if "/" in name:
            shift, severity = name.split("/")
            data = table()
            data.shifts, data.severity = [shift], int(severity)
            assert torch.equal(gathered(loader), gathered(data.test_dataloader()[1]))


def test_a_severity_shares_its_samples_among_the_shifts_in_whole_batches() -> None:
    data = DigitsDataModule(shifts=["fog", "blur"], eval_batch_size=8, train_size=60)
    counts = {name: len(gathered(loader)) for name, loader in splits(data, 50)}
    assert (counts["train"], counts["validation"], counts["clean"]) == (50, 50, 50)
    assert {count for name, count in counts.items() if "/" in name} == {24}  # 3 batches: 48 of 50
    few = DigitsDataModule(shifts=["fog", "blur"], eval_batch_size=8)
    assert len(gathered(dict(splits(few, 10))["blur/2"])) == 8  # at least a batch


def test_the_same_samples_are_taken_of_every_severity() -> None:
    data = DigitsDataModule(shifts=["brightness", "contrast"], eval_batch_size=10)
    labels = [
        torch.cat([label for _, label in loader])
        for name, loader in splits(data, 40)
        if "/" in name
    ]
    assert all(torch.equal(labels[0], other) for other in labels)


class Mirrored(DigitsDataModule):
    """Digits, trained on mirrored."""

    def training(self, images: Images) -> Augmented:
        return Augmented(images, lambda x, _: x.flip(3))


@pytest.mark.parametrize(
    "data", [Mirrored(shifts=[]), roads(), table()], ids=["images", "maps", "tables"]
)
def test_training_samples_come_without_augmentation_in_evaluation_batches(
    data: ShiftedData,
) -> None:
    plain = data.plain_train_dataloader()
    assert plain.batch_size == data.test_dataloader()[0].batch_size
    source = data._splits["train"]
    expected = source.__getitems__(list(range(len(source))))[0]
    assert torch.equal(gathered(plain), expected)


@pytest.mark.parametrize("data", [table(), roads()], ids=["table", "roads"])
def test_severity_all_tests_on_each_severity_in_turn(data: ShiftedData) -> None:
    first = data.shifts[0]
    data.shifts, data.severity = [first], "all"
    assert data.test_names == ["clean", *(f"{first}/{level}" for level in range(1, 6))]
    every = [gathered(loader) for loader in data.test_dataloader()]
    for severity in range(1, 6):
        data.severity = severity
        assert torch.equal(every[severity], gathered(data.test_dataloader()[1]))
    data.severity = "most"  # type: ignore[assignment]
    with pytest.raises(ValueError, match="severity"):
        data.setup("test")


def drawn() -> IT3Classifier:
    torch.manual_seed(0)
    model = make_model()
    for parameter in model.it3_parts()[1].parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def scores(model: IT3Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared L2 distances and 1 - confidence, in plain torch."""
    with torch.no_grad():
        y0 = model(images).softmax(1)
        y1 = model.predict_with(images, y0).softmax(1)
    return (y0 - y1).square().sum(1), 1 - y0.max(1).values


def test_separation_is_the_area_under_the_curve_of_distances_and_confidences() -> None:
    model, data = drawn(), digits()
    found = {
        record.row: record.score
        for record in separations({"post-hoc": model}, data, Idempotence("l2"))
    }
    clean, shifted = (torch.cat([x for x, _ in loader]) for loader in data.test_dataloader())
    target = np.repeat([0, 1], [len(clean), len(shifted)])
    for index, name in enumerate((DISTANCE, CONFIDENCE)):
        both = torch.cat([scores(model, clean)[index], scores(model, shifted)[index]])
        expected = 100 * roc_auc_score(target, both.numpy())
        assert found[name] == pytest.approx(expected, abs=0.02)


def test_a_model_without_a_second_prediction_has_no_distance() -> None:
    assert separations({"ordinary": drawn()}, digits(), Idempotence()) == []
    assert separation(Results("acc", [])) == []
