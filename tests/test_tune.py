"""Tuning: the rule, the grid, what it looks at, what it keeps, and the lines it writes."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Trainer

from it3_lightning import ClassPrior, FeatureInjection, IT3TestTimeCallback, ValuePrior
from it3_lightning.benchmark import Benchmark, Row, Tuned, Tuning
from it3_lightning.benchmark.candidates import Candidate, Grid
from it3_lightning.benchmark.choosing import Rule
from it3_lightning.benchmark.kind import Kind
from it3_lightning.benchmark.recipe import Recipe
from it3_lightning.data import TUNING_SHIFTS, DigitsDataModule
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.tasks import IT3Classifier, IT3Regressor
from it3_lightning.tuning_report import show_tuning, tuning_markdown

GRID = Grid(
    shares=(), lrs=(1e-3, 0.05), forms=("published",), parameters=("all",), modes=("episodic",)
)


def make_model() -> IT3Classifier:
    return IT3Classifier(
        SmallCNN(1, 10, 8, width=4, hidden=16),
        prior=ClassPrior(10),
        conditioning=FeatureInjection("network.dense1"),
    )


def digits() -> DigitsDataModule:
    return DigitsDataModule(
        shifts=("contrast",), severity=4, train_size=200, test_size=120, val_size=60
    )


def settings(folder: Path, **arguments: Any) -> Benchmark:
    given = {"epochs": 1, "posthoc_epochs": 1, "streams": ("equal",), "accelerator": "cpu"}
    losses = {"metric": "test_loss", "percent": False, "higher_is_better": False, "decimals": 4}
    return Benchmark(output=str(folder), **{**given, **losses, **arguments})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    folder = tmp_path_factory.mktemp("tuning")
    return folder, Tuning(grid=GRID).run(settings(folder), make_model, digits())


# The rule


def test_a_gain_that_costs_too_much_on_one_kind_of_samples_harms() -> None:
    verdict = Rule().verdict({"clean": [0.1, 0.1], "fog": [9.0, 9.0], "noise": [-0.5, -0.7]}, 0.5)
    assert (verdict.worst, verdict.harmless, verdict.gains) == ("noise", False, True)
    assert verdict.loss == pytest.approx(0.6)
    assert verdict.gain.mean == pytest.approx((4.25 + 4.15) / 2)  # clean samples are no shift
    assert verdict.clean.mean == pytest.approx(0.1)


def test_a_loss_on_clean_samples_of_one_stream_harms() -> None:
    gains = {"clean, equal": [0.0], "clean, unequal": [-1.0], "fog, equal": [2.0]}
    verdict = Rule().verdict(gains, 0.5)
    assert (verdict.worst, verdict.harmless) == ("clean, unequal", False)


@pytest.mark.parametrize(
    ("by_seed", "gains"),
    [
        ([1.0, 1.2, 1.1], True),
        ([0.3, 0.3, 0.3], False),  # no more than what is tolerated as a loss
        ([0.1, 3.0, 0.2], False),  # 1.1, with a standard error of 0.95
        ([5.0, 6.0, -0.1], False),  # harmful with one seed
        ([0.6], True),  # one seed has no standard error
    ],
)
def test_a_gain_is_larger_than_what_is_tolerated_and_than_chance(
    by_seed: list[float], gains: bool
) -> None:
    verdict = Rule().verdict({"clean": [0.0] * len(by_seed), "fog": by_seed}, 0.5)
    assert verdict.gains is gains


def test_chosen_is_the_harmless_one_that_gains_most() -> None:
    rule = Rule()
    gains = [
        {"clean": [0.0, 0.0], "fog": [1.0, 1.1]},
        {"clean": [0.0, 0.0], "fog": [2.0, 2.1]},
        {"clean": [-3.0, -3.0], "fog": [9.0, 9.1]},
    ]
    assert rule.chosen([rule.verdict(each, 0.5) for each in gains]) == 1
    assert rule.chosen([rule.verdict(gains[2], 0.5)]) is None
    assert rule.chosen([]) is None


def test_what_is_tolerated_follows_the_median_standard_error_not_that_of_wild_candidates() -> None:
    wild = {"clean": [0.0, 90.0], "fog": [-50.0, 50.0]}
    tame = {"clean": [0.0, 0.2], "fog": [0.0, 0.6]}
    assert Rule(0.01).tolerated([tame, wild, tame], error=10.0) == pytest.approx(0.3)
    assert Rule(0.05).tolerated([tame, wild, tame], error=10.0) == pytest.approx(0.5)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match="tolerance and significance >= 0"):
        Rule(tolerance=-1)


# The grid


def test_classes_have_every_combination_and_two_predictions_without_a_step() -> None:
    kind = Kind(classes=True, batch_norm=True)
    names = [c.name for c in Grid().candidates(Recipe(), kind, make_model())]
    assert len(names) == len(set(names)) == 2 + (3 + 3) * 3 * 2 * 2
    assert names[:2] == ["second prediction", "mean prediction"]
    assert "sharpened objective, norm, 1 step of polyak 0.5, online" in names


def test_values_have_one_objective_and_what_a_model_lacks_is_left_out() -> None:
    kind = Kind(classes=False, batch_norm=False, values=True)
    candidates = Grid().candidates(Recipe(distance="l1"), kind, MLP(4, 1))
    assert len(candidates) == 2 + (3 + 3) * 2
    assert {c.recipe.parameters for c in candidates[2:]} == {"all"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forms": ["entropy"]}, "Unknown form 'entropy'"),
        ({"modes": ["on-line"]}, "Did you mean 'online'"),
        ({"lrs": [0.0]}, "lrs > 0 and steps >= 1"),
        ({"steps": [0]}, "lrs > 0 and steps >= 1"),
        ({"shares": [1e-4]}, r"shares in \[0\.01, 2\]"),
    ],
)
def test_a_wrong_grid_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**arguments)


# The search


def test_gains_are_those_of_the_benchmark_on_validation_samples(
    found: tuple[Path, Tuned], tmp_path: Path
) -> None:
    _, tuned = found
    data = digits()
    data.evaluate_on, data.shifts = "validation", TUNING_SHIFTS
    results = settings(tmp_path, rows="all", recipe=Recipe(adam_episodic_lr=0.05)).run(
        make_model, data
    )
    rows = {row.name: row for row in results.rows if row.training == "post-hoc"}
    unadapted = [rows["source"], rows["batch statistics"]]
    losses = {
        r.name: statistics.fmean(results.scores(r, "equal", TUNING_SHIFTS)) for r in unadapted
    }
    assert tuned.base.name == min(losses, key=lambda name: losses[name])
    assert tuned.base.name == "batch statistics"
    gain = results.gain(rows["published objective, episodic"], "equal")
    assert gain is not None
    verdicts = {c.name: v for c, v in zip(tuned.candidates, tuned.verdicts, strict=True)}
    verdict = verdicts["published objective, all, 1 step of adam 0.05, episodic"]
    assert verdict.gain.mean == pytest.approx(gain.mean)
    assert verdict.gain.mean != 0
    second = results.gain(rows["second prediction"], "equal", "shear")
    assert second is not None
    worst = verdicts["second prediction"]
    assert -worst.loss <= second.mean


def test_the_data_tests_on_what_it_did_before(found: tuple[Path, Tuned], tmp_path: Path) -> None:
    data = digits()
    Tuning(grid=GRID, batches=1).run(settings(found[0]), make_model, data)
    assert (data.evaluate_on, tuple(data.shifts), data.stream) == ("test", ("contrast",), "equal")


def test_a_second_search_neither_trains_nor_scores(
    found: tuple[Path, Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tuned = found
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("ran again"))
    data = digits()
    data.shifts, data.severity = (), 4  # the configuration's shifts do not matter
    again = Tuning(grid=GRID).run(settings(folder, rows="all"), make_model, data)
    assert again.verdicts == tuned.verdicts


def test_a_larger_grid_scores_only_what_is_new_with_the_benchmarks_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(tmp_path).run(make_model, digits())
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    Tuning(grid=GRID).run(settings(tmp_path), make_model, digits())
    tests, test = [], Trainer.test

    def counted(*args: Any, **kwargs: Any) -> Any:
        tests.append(args)
        return test(*args, **kwargs)

    monkeypatch.setattr(Trainer, "test", counted)
    larger = Grid(**{**vars(GRID), "lrs": (1e-3, 0.05, 0.1)})
    Tuning(grid=larger).run(settings(tmp_path), make_model, digits())
    assert len(tests) == 1
    kept = json.loads((tmp_path / "tuning" / "seed_0.json").read_text())
    assert len(kept["rows"]) == 2 + 2 + 3


def test_data_without_tuning_shifts_is_refused(tmp_path: Path) -> None:
    class Without(DigitsDataModule):
        tuning_shifts = ()

    with pytest.raises(ValueError, match=r"shifts to tune on, got Without without"):
        Tuning().run(settings(tmp_path), make_model, Without())


def test_a_distance_of_probabilities_is_refused_for_values(tmp_path: Path) -> None:
    def make() -> IT3Regressor:
        conditioning = FeatureInjection("network.layer0")
        return IT3Regressor(MLP(64, 1), prior=ValuePrior(), conditioning=conditioning)

    with pytest.raises(ValueError, match=r"l1 or l2 for a model of values, got 'js'"):
        Tuning().run(settings(tmp_path), make, digits())


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches >= 1 or None, got 0"):
        Tuning(batches=0)


# What is shown


def toy(*gains: tuple[Candidate, float, float]) -> Tuned:
    """Tuned on made-up gains: candidate, on clean samples, on fog."""
    rule = Rule()
    verdicts = [rule.verdict({"clean": [a, a], "fog": [b, b]}, 0.5) for _, a, b in gains]
    return Tuned(
        title="test_acc",
        decimals=1,
        training="post-hoc",
        seeds=(0, 1),
        shifts=("fog",),
        base=Row("post-hoc", "source"),
        before={"clean": [90.0, 92.0], "fog": [60.0, 62.0]},
        candidates=tuple(candidate for candidate, *_ in gains),
        verdicts=tuple(verdicts),
        tolerated=0.5,
        rule=rule,
    )


def candidate(lr: float, mode: Any = "episodic", **recipe: Any) -> Candidate:
    own = Recipe(lr=lr, episodic_lr=lr, optimizer="adam", sharpen=1.0, **recipe)
    return Candidate(mode, own, "first", "published" if own.reliability is None else "sharpened")


def read(tuned: Tuned) -> tuple[dict[str, Any], dict[str, Any]]:
    """The callback's arguments and the recipe of the lines, as a configuration is read."""
    lines = yaml.safe_load(tuned.yaml())
    arguments = lines["trainer"]["callbacks"][0]["init_args"]
    return arguments, lines.get("benchmark", {}).get("recipe", {})


def test_lines_are_those_of_the_chosen_candidate_and_the_best_like_it_of_each_mode() -> None:
    tuned = toy(
        (candidate(1e-3), 0.0, 2.0),
        (candidate(2e-3), -9.0, 5.0),
        (candidate(3e-5, "online"), 0.0, 1.0),
        (candidate(4e-5, "online", reliability=None), 0.0, 1.5),
    )
    arguments, recipe = read(tuned)
    assert (arguments["lr"], arguments["reset"], arguments["steps"]) == (1e-3, "batch", 1)
    objective = arguments.pop("objective")["init_args"]
    assert objective == {"distance": "js", "reliability": 0.6, "sharpen": 1.0}
    assert IT3TestTimeCallback(**arguments).settings.lr == 1e-3
    assert Recipe(**recipe) == Recipe(optimizer="adam", sharpen=1.0, episodic_lr=1e-3, lr=3e-5)


def test_lines_without_a_gain_adapt_nothing() -> None:
    arguments, recipe = read(toy((candidate(1e-3), 0.0, 0.1)))
    assert (arguments["steps"], arguments["prediction"], recipe) == (0, "first", {})


def test_a_prediction_without_a_step_may_be_chosen() -> None:
    tuned = toy((Candidate("none", Recipe(), "mean"), 0.0, 3.0), (candidate(1e-3), 0.0, 1.0))
    arguments, recipe = read(tuned)
    assert (arguments["steps"], arguments["prediction"]) == (0, "mean")
    assert recipe["episodic_lr"] == 1e-3


def test_the_report_ranks_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = toy(
        (candidate(1e-3), 0.0, 2.0), (candidate(2e-3), -9.0, 5.0), (candidate(3e-3), 0.0, 0.1)
    )
    show_tuning(tuned, tmp_path)
    lines = (tmp_path / "tuning.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| sharpened")]
    assert [row.rsplit("| ", 1)[1] for row in rows] == ["chosen |", "harms |", "no gain |"]
    assert rows[1].startswith(
        "| sharpened objective, all, 1 step of adam 0.002, episodic "
        "| +5.0 ± 0.0 | -9.0 ± 0.0 | -9.0 |"
    )
    assert "clean 91.0 ± 1.4, shifts 61.0 ± 1.4" in tuning_markdown(tuned)
    printed = capsys.readouterr().out
    assert "Chosen: sharpened objective, all, 1 step of adam 0.001, episodic." in printed
    assert "it3_lightning.IT3TestTimeCallback" in printed
