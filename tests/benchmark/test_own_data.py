"""Samples of one's own through the benchmark, tuning and calibration; changed ones are noticed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import benchmark
from lightning.pytorch import LightningModule
from torch.utils.data import DataLoader, TensorDataset

from it3_lightning import ClassPrior, FeatureInjection, ShiftedLoaders
from it3_lightning.benchmark import PolicyChoice, Results, Tuning, models
from it3_lightning.benchmark.tune_rules import Grid
from it3_lightning.data import ImageSet, ShiftedData, ShiftedImages
from it3_lightning.networks import MLP
from it3_lightning.tasks import IT3Classifier


def make_model() -> LightningModule:
    network, conditioning = MLP(4, 3, hidden=(8, 8)), FeatureInjection("network.layer0")
    return IT3Classifier(network, prior=ClassPrior(3), conditioning=conditioning)


def rows(seed: int, shift: float = 0.0, count: int = 60) -> TensorDataset:
    draws = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    noise = torch.randn(count, 4, generator=draws)
    return TensorDataset(2 * torch.eye(3, 4)[targets] + noise + shift, targets)


def own(**changed: Any) -> ShiftedLoaders:
    tests = {"clean": rows(2), "night": DataLoader(rows(3, 1.0), 20), "rain": rows(4, -1.0, 30)}
    given: dict[str, Any] = {"train": rows(0), "val": rows(1), "tests": tests}
    return ShiftedLoaders(**{**given, "tuning": {"dusk": rows(5, 0.5)}, **changed})


def source_scores(results: Results) -> dict[str, float]:
    return {r.shift: r.score for r in results.records if (r.training, r.row) == ("joint", "source")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("own")
    return folder, benchmark(folder, streams=("equal", "correlated/16")).run(make_model, own())


def accuracy(model: LightningModule, samples: Any) -> float:
    inputs, targets = samples.tensors
    with torch.no_grad():
        return 100 * float((model.eval()(inputs).argmax(1) == targets).float().mean())


def test_own_samples_are_scored_under_every_shift(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    assert results.streams == ["equal", "correlated/16"]
    assert results.shifts == ["clean", "night", "rain"]
    states = torch.load(folder / "models" / "seed_0.ckpt", weights_only=True)["states"]
    model = make_model()
    model.load_state_dict(states["joint"])
    known = {"clean": rows(2), "night": rows(3, 1.0), "rain": rows(4, -1.0, 30)}
    expected = {name: accuracy(model, samples) for name, samples in known.items()}
    scored = {
        r.shift: r.score
        for r in results.records
        if r.stream == "equal" and (r.training, r.row) == ("joint", "source")
    }
    assert scored == pytest.approx(expected, abs=1e-3)


def test_tuning_and_calibration_see_validation_samples_alone(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = finished
    monkeypatch.setattr(models, "_train_models", lambda *_: pytest.fail("trained again"))
    data = own()
    grid = Grid(shares=(), lrs=(1e-3,), forms=("published",), parameters=("all",))
    tuned = Tuning(grid=grid, batches=1).run(benchmark(folder), make_model, data)
    assert tuned.shifts == ("dusk",)
    assert set(tuned.before) == {"clean", "dusk"}
    choice = PolicyChoice(batch_sizes=(20,), policies=("second prediction",))
    found = choice.run(benchmark(folder), make_model, data)
    assert {(c.shift, c.stream) for c in found.errors.source} == {
        (shift, stream)
        for shift in ("clean", "dusk")
        for stream in ("equal", "unequal", "correlated")
    }
    assert (data.evaluate_on, data.shifts) == ("test", ("night", "rain"))


def test_without_shifts_to_tune_on_there_is_no_tuning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data with shifts to tune on, got ShiftedLoaders"):
        Tuning().run(benchmark(tmp_path), make_model, own(tuning={}))


@pytest.mark.parametrize("name", ["train", "val"])
def test_other_samples_to_learn_of_are_another_run(
    name: str, finished: tuple[Path, Results]
) -> None:
    with pytest.raises(FileExistsError, match=r"data\.content\.(train|validation) .* instead of"):
        benchmark(finished[0]).run(make_model, own(**{name: rows(9)}))


def test_other_test_samples_are_scored_again_with_the_same_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = benchmark(tmp_path).run(make_model, own())
    monkeypatch.setattr(models, "_train_models", lambda *_: pytest.fail("trained again"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert source_scores(benchmark(tmp_path).run(make_model, own())) == source_scores(first)
    tests = {**own().tests, "night": rows(3, -3.0)}
    wrong = r"seed_0\.json is of other settings: data\.content\.tests\['night'\]"
    with pytest.warns(UserWarning, match=wrong):
        changed = source_scores(benchmark(tmp_path).run(make_model, own(tests=tests)))
    before = source_scores(first)
    assert changed["night"] != before["night"]
    assert {**changed, "night": 0} == {**before, "night": 0}


class Stripes(ShiftedImages):
    """A class of one's own, whose images come from anywhere."""

    brightness = 1.0

    def load(self) -> tuple[ImageSet, ImageSet]:
        draws = torch.Generator().manual_seed(0)
        sets = [torch.rand(20, 1, 4, 4, generator=draws) for _ in range(2)]
        train, test = (ImageSet(x * self.brightness, torch.arange(20) % 2) for x in sets)
        return train, test


class Loaders(ShiftedData):
    """A class of one's own, with all loaders of its own."""

    value = 0.0

    def setup(self, stage: str) -> None:
        self.stage = stage

    def loader(self, value: float) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.full((4, 2), value), torch.zeros(4)), 2)

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(self.value)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self.loader(1.0), self.loader(1.0 + self.value)]


def facts(data: ShiftedData, folder: Path) -> tuple[Any, Any]:
    found = models.about(benchmark(folder), make_model(), data)  # type: ignore[arg-type]
    return found["training"]["data"]["content"], found["settings"]["data"]["content"]


def test_classes_of_ones_own_are_told_apart_by_their_samples(tmp_path: Path) -> None:
    first, second, darker = (Stripes(shifts=["fog"], val_size=5) for _ in range(3))
    darker.brightness = 0.5
    assert facts(first, tmp_path) == facts(second, tmp_path)
    learnt, known = facts(first, tmp_path)
    assert set(learnt) == {"train", "validation"}
    assert set(known) == {"train", "validation", "test"}
    assert all(facts(darker, tmp_path)[1][name] != known[name] for name in known)
    assert first.seed == 0


def test_loaders_of_ones_own_are_told_apart_by_what_they_yield(tmp_path: Path) -> None:
    first, other = Loaders(shifts=["night"]), Loaders(shifts=["night"])
    other.value = 0.5
    learnt, known = facts(first, tmp_path)
    assert facts(first, tmp_path) == (learnt, known)
    assert facts(other, tmp_path)[0] != learnt
    clean, night = facts(other, tmp_path)[1]["loaders"]
    assert clean == known["loaders"][0]
    assert night != known["loaders"][1]


def test_what_content_says_is_taken(tmp_path: Path) -> None:
    class Named(ShiftedLoaders):
        """Samples that are not to be read for a fingerprint."""

        def content(self) -> dict[str, str]:
            return {"train": "2026-11", "test": "2026-12"}

    data = own()
    data.__class__ = Named
    assert facts(data, tmp_path) == (
        {"train": "2026-11"},
        {"train": "2026-11", "test": "2026-12"},
    )
