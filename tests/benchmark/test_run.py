"""Runs of a benchmark: every row scored, equal for equal seeds, continued where they stopped."""

import json
from pathlib import Path

import pytest
from helpers.benchmark_runs import benchmark, digits, make_model, scored_rows

from it3_lightning import FeatureInjection, ValuePrior
from it3_lightning.benchmark import Benchmark, Results
from it3_lightning.benchmark.config import Recipe
from it3_lightning.data import BundledDataModule, DigitsDataModule, ImageSet
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.tasks import IT3Regressor


def test_every_row_is_scored_on_every_stream_and_shift(finished: tuple[Path, Results]) -> None:
    _, results = finished
    assert len(results.records) == len(results.rows) * 2 * 2
    adapting = [r for r in results.records if "objective" in r.row]
    assert {r.adapted for r in adapting} == {
        sum(p.numel() for p in make_model().network.parameters())
    }
    assert all(r.ms_per_sample > 0 for r in adapting)


def test_a_finished_seed_is_not_run_again(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("trained again"))
    again = benchmark(folder, rows="all", streams=("equal", "unequal")).run(make_model, digits())
    assert again.records == results.records


def test_another_seed_goes_into_the_same_folder(tmp_path: Path) -> None:
    first = benchmark(tmp_path, rows="main").run(make_model, digits())
    both = benchmark(tmp_path, rows="main", seeds=(1, 0)).run(make_model, digits())
    alone = benchmark(tmp_path, rows="main", seeds=(1,)).run(make_model, digits())
    assert [r for r in both.records if r.seed == 0] == first.records
    assert [r for r in both.records if r.seed == 1] == alone.records != []
    for found, seed in ((first, 0), (both, 1), (alone, 1)):  # of the first one samples are shown
        assert {key[3] for key in found.shown} == {seed}


def test_a_row_of_other_settings_is_run_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = benchmark(tmp_path, recipe=Recipe(tent_lr=1e-4)).run(make_model, digits())
    ran = scored_rows(monkeypatch)
    with pytest.warns(UserWarning, match=r"distances_seed_0\.json is of other settings: .*tent_lr"):
        after = benchmark(tmp_path, recipe=Recipe(tent_lr=0.5)).run(make_model, digits())
    assert ran == [("ordinary", "Tent")]
    same = [r for r in before.records if r.row != "Tent"]
    assert [r for r in after.records if r.row != "Tent"] == same


def test_the_same_seed_gives_the_same_scores(tmp_path: Path) -> None:
    first, second = (
        benchmark(tmp_path / name, rows="main").run(make_model, digits()) for name in ("a", "b")
    )
    assert [r.score for r in first.records] == [r.score for r in second.records]


def test_unknown_metric_names_what_is_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_accuracy.*test_acc"):
        benchmark(tmp_path, metric="test_accuracy").run(make_model, digits())


def test_a_benchmark_of_errors_reports_improvements(tmp_path: Path) -> None:
    def make() -> IT3Regressor:
        return IT3Regressor(
            MLP(10, 1, (8,), output_mean=150.0, output_std=75.0),
            prior=ValuePrior(),
            conditioning=FeatureInjection("network.layer0"),
        )

    errors = benchmark(
        tmp_path,
        metric="test_mae",
        percent=False,
        higher_is_better=False,
        recipe=Recipe(distance="l1", lr=0.01),
    )
    results = errors.run(make, BundledDataModule("diabetes", shifts=["zeroed"], severity=5))
    rows = {(row.training, row.name): row for row in results.rows}
    for name in ("second prediction", "default objective, online"):
        row, source = rows["joint", name], rows["joint", "source"]
        (mine,), (base,) = (results.scores(r, "equal", ["zeroed"]) for r in (row, source))
        gain = results.gain(row, "equal")
        assert gain is not None
        assert gain.mean == pytest.approx(base - mine)
        assert mine != base
        assert 20 < base < 200  # in units of the target
    content = json.loads((tmp_path / "results.json").read_text())
    assert (content["metric"], content["higher_is_better"]) == ("test_mae", False)


def test_values_with_batch_statistics_are_scored_in_every_row(tmp_path: Path) -> None:
    class Values(DigitsDataModule):
        def load(self) -> tuple[ImageSet, ImageSet]:
            train, test = super().load()
            return as_values(train), as_values(test)

    def make() -> IT3Regressor:
        return IT3Regressor(
            SmallCNN(1, 1, 8, width=4, hidden=16),
            prior=ValuePrior(),
            conditioning=FeatureInjection("network.dense1"),
        )

    data = Values(shifts=("contrast",), train_size=100, test_size=50)
    settings = benchmark(
        tmp_path,
        metric="test_mae",
        percent=False,
        higher_is_better=False,
        recipe=Recipe(distance="l1"),
    )
    results = settings.run(make, data)
    assert {record.row for record in results.records} >= {"batch statistics", "second prediction"}
    assert all(0 < record.score < 9 for record in results.records)


def as_values(images: ImageSet) -> ImageSet:
    return ImageSet(images.images, images.labels.float()[:, None])
