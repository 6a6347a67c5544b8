"""The benchmark: its rows, its arithmetic, its files, and that it goes on where it stopped."""

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    IT3TestTimeCallback,
    MaskPrior,
    ValuePrior,
)
from it3_lightning.benchmark import Benchmark, Record, Results, Row, rows_for
from it3_lightning.benchmark.about import about
from it3_lightning.benchmark.kind import Kind
from it3_lightning.benchmark.recipe import Recipe
from it3_lightning.data import BundledDataModule, DigitsDataModule, ImageSet
from it3_lightning.engine import Settings
from it3_lightning.methods import Entropy, Idempotence
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.report import by_shift, headers, line, markdown, page, table
from it3_lightning.tasks import Classifier, IT3Classifier, IT3Regressor, IT3Segmenter

FOG = [f"fog/{level}" for level in range(1, 6)]


def make_model() -> IT3Classifier:
    return IT3Classifier(
        SmallCNN(1, 10, 8, width=4, hidden=16),
        prior=ClassPrior(10),
        conditioning=FeatureInjection("network.dense1"),
    )


def digits() -> DigitsDataModule:
    return DigitsDataModule(shifts=("contrast",), severity=4, train_size=200, test_size=120)


def benchmark(folder: Path, **arguments: object) -> Benchmark:
    settings = {"epochs": 1, "posthoc_epochs": 1, "streams": ("equal",), "accelerator": "cpu"}
    return Benchmark(output=str(folder), **{**settings, **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("benchmark")
    return folder, benchmark(folder, rows="all", streams=("equal", "unequal")).run(
        make_model, digits()
    )


def toy_results() -> Results:
    rows = [Row("ordinary", "source"), Row("ordinary", "batch statistics"), Row("ordinary", "Tent")]
    scores = {"source": (90.0, 50.0), "batch statistics": (90.0, 60.0), "Tent": (89.0, 63.0)}
    records = [
        Record("ordinary", row, "equal", seed, shift, score + 2 * seed * (row == "Tent"), 0.5, 7)
        for row, pair in scores.items()
        for seed in (0, 1)
        for shift, score in zip(("clean", "noise"), pair, strict=True)
    ]
    return Results("acc", rows, records)


def cells(markdown_table: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in markdown_table.splitlines()]


def test_gain_is_over_batch_statistics_of_the_same_model_seed_by_seed() -> None:
    results = toy_results()
    gain = results.gain(results.rows[2], "equal")
    assert gain is not None
    assert gain.mean == pytest.approx(4.0)  # (63 - 60 + 65 - 60) / 2
    assert gain.std == pytest.approx(2**0.5)
    worst = results.worst(results.rows[2], "equal")
    assert worst is not None
    assert worst[0] == "noise"
    assert worst[1] == pytest.approx(4.0)
    assert results.gain(results.rows[1], "equal") is None


def test_where_lower_is_better_a_gain_is_how_much_lower() -> None:
    results = toy_results()
    results.higher_is_better, results.decimals = False, 2
    gain, worst = results.gain(results.rows[2], "equal"), results.worst(results.rows[2], "equal")
    assert gain is not None
    assert worst is not None
    assert gain.mean == worst[1] == pytest.approx(-4.0)
    assert line(results, results.rows[2])[2:6] == [
        "90.00 ± 1.41",
        "64.00 ± 1.41",
        "-4.00 ± 1.41",
        "-4.00 noise",
    ]
    assert cells(by_shift(results, "equal"))[2:] == [["ordinary", "Tent", "+0.00", "-4.00"]]
    assert str(table(results).title).startswith("acc (lower is better)")
    assert "<h1>IT3 benchmark: acc (lower is better)</h1>" in page(results)


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


def test_a_distance_of_probabilities_is_refused_for_values(tmp_path: Path) -> None:
    def make() -> IT3Regressor:
        conditioning = FeatureInjection("network.layer0")
        return IT3Regressor(MLP(10, 1), prior=ValuePrior(), conditioning=conditioning)

    with pytest.raises(ValueError, match=r"distance l1 or l2 for a model of values, got 'js'"):
        benchmark(tmp_path, metric="test_mae").run(make, BundledDataModule("diabetes"))


def test_mean_of_shifts_leaves_the_clean_samples_out() -> None:
    results = toy_results()
    assert results.shifted(results.rows[0], "equal").mean == 50.0
    assert results.clean(results.rows[0], "equal").mean == 90.0


def test_rows_without_classes_have_no_entropy_and_no_balance() -> None:
    names = {row.name for row in rows_for(Recipe(), Kind(classes=False, batch_norm=False))}
    assert not any("entropy" in n or "Tent" in n or "balance" in n for n in names)
    assert "batch statistics" not in names


def test_rows_of_maps_have_entropy_but_no_balance() -> None:
    rows = rows_for(Recipe(), Kind(classes=True, batch_norm=True, balanced=False))
    names = {row.name for row in rows}
    assert {"Tent", "filtered entropy, online", "default objective, episodic"} <= names
    assert not any("balance" in name for name in names)


def test_distances_of_distributions_are_refused_for_masks_of_one_channel(tmp_path: Path) -> None:
    def masks() -> IT3Segmenter:
        return IT3Segmenter(
            torch.nn.Conv2d(3, 1, 1),
            prior=MaskPrior(),
            conditioning=FeatureInjection("network"),
        )

    with pytest.raises(
        ValueError, match=r"l1 or l2 for a model of values, got .js.* MaskPrior to 2"
    ):
        benchmark(tmp_path).run(masks, digits())


def test_filtered_entropy_and_filtered_distance_differ_in_the_objective_alone() -> None:
    rows = {
        (r.training, r.name): r for r in rows_for(Recipe(), Kind(classes=True, batch_norm=True))
    }
    entropy = rows["ordinary", "filtered entropy, online"].settings
    default = rows["post-hoc", "filtered distance + entropy, online"].settings
    assert entropy is not None
    assert default is not None
    assert isinstance(entropy.objective, Entropy)
    assert isinstance(default.objective, Idempotence)
    for name in ("steps", "lr", "optimizer", "parameters", "reset", "norm_stats"):
        assert getattr(entropy, name) == getattr(default, name)
    assert entropy.objective.reliability == default.objective.reliability


def test_source_row_runs_without_a_callback() -> None:
    assert Row("ordinary", "source").callback() is None


def test_post_hoc_source_row_equals_the_ordinary_one_exactly(
    finished: tuple[Path, Results],
) -> None:
    _, results = finished
    for name in ("source", "batch statistics"):
        for stream in ("equal", "unequal"):
            for shift in ("clean", "contrast"):
                ordinary, posthoc = (
                    results.scores(Row(training, name), stream, [shift])
                    for training in ("ordinary", "post-hoc")
                )
                assert ordinary == posthoc


def test_every_row_is_scored_on_every_stream_and_shift(finished: tuple[Path, Results]) -> None:
    _, results = finished
    assert len(results.records) == len(results.rows) * 2 * 2
    adapting = [r for r in results.records if "objective" in r.row]
    assert {r.adapted for r in adapting} == {
        sum(p.numel() for p in make_model().network.parameters())
    }
    assert all(r.ms_per_sample > 0 for r in adapting)


def test_files_hold_every_record(finished: tuple[Path, Results]) -> None:
    folder, results = finished
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == [r.score for r in results.records]
    content = json.loads((folder / "results.json").read_text())
    assert len(content["records"]) == len(results.records)
    assert content["about"]["seeds"] == [0]
    assert content["about"]["versions"]["torch"] == torch.__version__


def test_a_finished_seed_is_not_run_again(
    finished: tuple[Path, Results], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, results = finished
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("trained again"))
    again = benchmark(folder, rows="all", streams=("equal", "unequal")).run(make_model, digits())
    assert again.records == results.records


def test_other_settings_are_run_again(tmp_path: Path) -> None:
    fingerprints = []
    for lr in (1e-4, 0.5):
        benchmark(tmp_path, recipe=Recipe(tent_lr=lr)).run(make_model, digits())
        kept = json.loads((tmp_path / "seed_0.json").read_text())
        fingerprints.append(json.loads(kept["fingerprint"]))
    assert [f["benchmark"]["recipe"]["tent_lr"] for f in fingerprints] == [1e-4, 0.5]


def test_kept_scores_hold_only_for_the_same_model(tmp_path: Path) -> None:
    def settings(**args: Any) -> str:
        given = {
            "prior": ClassPrior(10),
            "conditioning": FeatureInjection("network.dense1"),
            **args,
        }
        model = IT3Classifier(SmallCNN(1, 10, 8, width=4, hidden=16), **given)
        return json.dumps(about(benchmark(tmp_path), model, digits())["settings"], sort_keys=True)

    assert settings() == settings()
    changes: list[dict[str, Any]] = [
        {"prior": ClassPrior(10, neutral="uniform")},
        {"conditioning": FeatureInjection("network.dense1", mode="film")},
        {"dual_pass": DualPass(own_share=0.5)},
        {"optimizer": functools.partial(torch.optim.SGD, lr=0.1)},
    ]
    assert len({settings(), *(settings(**change) for change in changes)}) == 5


def test_the_same_seed_gives_the_same_scores(tmp_path: Path) -> None:
    first, second = (
        benchmark(tmp_path / name, rows="main").run(make_model, digits()) for name in ("a", "b")
    )
    assert [r.score for r in first.records] == [r.score for r in second.records]


def test_unknown_metric_names_what_is_logged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test_accuracy.*test_acc"):
        benchmark(tmp_path, metric="test_accuracy").run(make_model, digits())


def test_a_model_without_the_mixin_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"class IT3Net\(IT3Mixin, Classifier\): pass"):
        benchmark(tmp_path).run(lambda: Classifier(MLP(64, 10)), digits())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"epochs": 0}, "epochs >= 1"),
        ({"streams": ("odd",)}, "equal, unequal"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark(tmp_path, **arguments)


def test_every_line_of_the_table_has_a_cell_for_every_title() -> None:
    results = toy_results()
    assert all(len(line(results, row)) == len(headers(results)) for row in results.rows)
    assert markdown(results).count("\n") == len(results.rows) + 1
    assert "+4.0 ± 1.4" in markdown(results)


def test_gains_by_shift_are_means_over_seeds_and_leave_unadapted_rows_out() -> None:
    found = cells(by_shift(toy_results(), "equal"))
    assert found[2:] == [["ordinary", "Tent", "+0.0", "+4.0"]]  # clean: -1 and +1, noise: 3 and 5


def test_page_holds_the_table_and_its_plots(finished: tuple[Path, Results]) -> None:
    text = page(finished[1])
    assert text.split("<h2>")[0].count("<tr") == len(finished[1].rows) + 1
    assert text.count("<svg") == 3
    assert "http" not in text.partition("<svg")[0]  # one file, nothing loaded from elsewhere


def accuracies(row: str, seed: int, drop: float) -> list[Record]:
    """One row on clean samples and on two corruptions at five severities."""
    shifts = ["clean", *(f"{name}/{level}" for name in ("fog", "snow") for level in range(1, 6))]
    scores = [90.0, *(80.0 - drop * level for _ in range(2) for level in range(1, 6))]
    return [
        Record("ordinary", row, "equal", seed, shift, score - 10 * ("snow" in shift), 0.0, 0)
        for shift, score in zip(shifts, scores, strict=True)
    ]


def test_mean_corruption_error_is_the_errors_share_of_the_baselines() -> None:
    rows = [Row("ordinary", "source"), Row("ordinary", "Tent")]
    records = [
        *accuracies("source", 0, 4.0),
        *accuracies("source", 1, 5.0),
        *accuracies("Tent", 0, 2.0),
        *accuracies("Tent", 1, 2.0),
    ]
    results = Results("acc", rows, records, baseline_errors={"fog": 64.0, "snow": 84.0})
    source, tent = (results.corruption_error(row, "equal") for row in rows)
    assert source is not None
    assert tent is not None
    first = 100 * (32 / 64 + 42 / 84) / 2  # errors 20 + 4 * 3 and 30 + 4 * 3
    second = 100 * (35 / 64 + 45 / 84) / 2
    assert source.mean == pytest.approx((first + second) / 2)
    assert tent.mean == pytest.approx(100 * (26 / 64 + 36 / 84) / 2)
    assert headers(results)[-2:] == ["mCE (lower is better)", "ms/sample"]
    assert line(results, rows[1])[-2] == f"{tent.mean:.1f} ± 0.0"
    assert headers(results)[-2] in markdown(results)
    assert "mCE" in page(results)


def test_without_a_baseline_there_is_no_mean_corruption_error() -> None:
    results = toy_results()
    assert results.corruption_error(results.rows[0], "equal") is None
    assert not any("mCE" in title for title in headers(results))


class Compared(DigitsDataModule):
    """Digits under fog, with errors of a reference network."""

    @property
    def baseline_errors(self) -> dict[str, float]:
        return {"fog": 50.0}


def test_a_data_module_with_baseline_errors_has_them_reported(tmp_path: Path) -> None:
    data = Compared(shifts=["fog"], severity="all", train_size=60, test_size=30)
    results = benchmark(tmp_path).run(make_model, data)
    errors = [100 - score for score in results.scores(results.rows[0], "equal", FOG)]
    found = results.corruption_error(results.rows[0], "equal")
    assert found is not None
    assert found.mean == pytest.approx(2 * errors[0])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["table"][0]["equal"]["mean_corruption_error"]["mean"] == found.mean
    assert benchmark(tmp_path / "b", percent=False).run(make_model, data).baseline_errors is None


def test_a_pretrained_model_is_not_trained_ordinarily(tmp_path: Path) -> None:
    results = benchmark(tmp_path, pretrained=True).run(make_model, digits())
    seed_everything(0, verbose=False)  # the weights it came with
    model = make_model().eval()
    with torch.no_grad():
        right = [model(x).argmax(1) == y for x, y in digits().test_dataloader()[0]]
    score = results.scores(Row("ordinary", "source"), "equal", ["clean"])[0]
    assert score == pytest.approx(100 * torch.cat(right).float().mean().item())


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


def test_a_row_callback_carries_all_its_settings() -> None:
    for row in rows_for(Recipe(lr=0.3, balance=0.7), Kind(classes=True, batch_norm=True)):
        callback = row.callback()
        if row.settings is not None:
            assert isinstance(callback, IT3TestTimeCallback)
            assert callback.settings == row.settings


def test_another_recipe_trains_nothing_and_leaves_the_other_rows_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = functools.partial(
        benchmark, tmp_path, rows="all", metric="test_loss", percent=False, higher_is_better=False
    )
    first = losses().run(make_model, digits())
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    second = losses(recipe=Recipe(adam_episodic_lr=0.05)).run(make_model, digits())
    assert len(first.records) == len(second.records)
    changed = set()
    for before, after in zip(first.records, second.records, strict=True):
        assert (before.row, before.shift) == (after.row, after.shift)
        if before.score != after.score:
            changed.add(before.row)
    assert "published objective, episodic" in changed
    assert all("episodic" in row or "each sample" in row for row in changed)


def test_other_samples_to_evaluate_on_train_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark(tmp_path).run(make_model, digits())
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    data = digits()
    data.evaluate_on, data.shifts, data.severity = "validation", ("shear",), 2
    results = benchmark(tmp_path).run(make_model, data)
    assert results.shifts == ["clean", "shear"]


def test_what_training_depends_on_trains_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark(tmp_path).run(make_model, digits())
    fits, fit = [], Trainer.fit

    def counted(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        fits.append(trainer.max_epochs)
        fit(trainer, *args, **kwargs)

    monkeypatch.setattr(Trainer, "fit", counted)
    benchmark(tmp_path, epochs=2).run(make_model, digits())
    assert fits == [4, 2, 1]
    smaller = DigitsDataModule(shifts=("contrast",), severity=4, train_size=150, test_size=120)
    benchmark(tmp_path, epochs=2).run(make_model, smaller)
    assert len(fits) == 6


def test_kept_models_are_states_alone_and_a_damaged_file_trains_again(tmp_path: Path) -> None:
    first = benchmark(tmp_path).run(make_model, digits())
    file = tmp_path / "models" / "seed_0.ckpt"
    states = torch.load(file, weights_only=True)["states"]
    assert set(states) == {"ordinary", "joint", "post-hoc"}
    assert all(name.startswith("it3_") for name in states["post-hoc"])
    assert states["joint"].keys() == make_model().state_dict().keys()
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "seed_0.json").unlink()
    again = benchmark(tmp_path).run(make_model, digits())
    assert [r.score for r in again.records] == [r.score for r in first.records]


def test_a_rows_gate_is_refused_since_a_callbacks_is_another() -> None:
    with pytest.raises(ValueError, match=r"without a gate, got gate=0\.9: a distance"):
        Row("joint", "gated", Settings(gate=0.9))


def test_values_have_no_rows_that_do_the_same() -> None:
    rows = rows_for(Recipe(distance="l1"), Kind(classes=False, batch_norm=False, values=True))
    assert [row.name for row in rows if row.training == "joint"] == [
        "source",
        "second prediction",
        "mean prediction",
        "published objective, episodic",
        "published objective, online",
        "default objective, episodic",
        "default objective, online",
        "default objective, mean prediction",
        "published objective, each sample",
        "default objective, each sample",
    ]
    same = Recipe(distance="l1", optimizer="adam", lr=1e-4, episodic_lr=1e-3, sample_lr=1e-3)
    rows = rows_for(same, Kind(classes=False, batch_norm=False, values=True))
    assert not any("published" in row.name for row in rows)


def test_rows_of_classes_differ_as_far_as_the_recipe_does() -> None:
    kind = Kind(classes=True, batch_norm=True)
    as_published = Recipe(optimizer="adam", lr=1e-4, reliability=None)
    names = {row.name for row in rows_for(as_published, kind)}
    assert "published objective, online" not in names  # it is the default objective, then
    assert "published objective, online" in {row.name for row in rows_for(Recipe(), kind)}


def test_only_the_default_objective_takes_steps_of_polyak() -> None:
    rows = rows_for(Recipe(), Kind(classes=True, batch_norm=True))
    moving = [row for row in rows if row.settings is not None and row.settings.steps]
    assert {row.settings.optimizer for row in moving if row.settings} == {"adam", "polyak"}
    for row in moving:
        assert row.settings is not None
        assert (row.settings.optimizer == "polyak") is row.name.startswith("default")


def test_rows_of_each_sample_are_compared_with_the_source(
    finished: tuple[Path, Results],
) -> None:
    _, results = finished
    rows = {row.name: row for row in results.rows if row.training == "post-hoc"}
    for name in ("default", "published"):
        row = rows[f"{name} objective, each sample"]
        assert row.settings is not None
        assert (row.settings.scope, row.settings.norm_stats) == ("sample", "source")
        gain = results.gain(row, "equal")
        assert gain is not None
        (mine,), (base,) = (results.scores(r, "equal", ["contrast"]) for r in (row, rows["source"]))
        assert gain.mean == pytest.approx(mine - base)
