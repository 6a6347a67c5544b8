"""Tuning: what it looks at, what it keeps, and the lines it writes."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.benchmark_runs import benchmark, candidate, digits, make_model, toy_tuned
from lightning.pytorch import Trainer

from it3_lightning import FeatureInjection, IT3TestTimeCallback, ValuePrior
from it3_lightning.benchmark import Benchmark, Tuned, Tuning
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.tune_rules import Candidate, Grid
from it3_lightning.data import TUNING_SHIFTS, DigitsDataModule
from it3_lightning.networks import MLP
from it3_lightning.tasks import IT3Regressor

GRID = Grid(
    shares=(), lrs=(1e-3, 0.05), forms=("published",), parameters=("all",), modes=("episodic",)
)


def settings(folder: Path, **arguments: Any) -> Benchmark:
    losses = {"metric": "test_loss", "percent": False, "higher_is_better": False, "decimals": 4}
    return benchmark(folder, **{**losses, **arguments})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuned]:
    folder = tmp_path_factory.mktemp("tuning")
    return folder, Tuning(grid=GRID).run(settings(folder), make_model, digits(val_size=60))


def test_gains_are_those_of_the_benchmark_on_validation_samples(
    found: tuple[Path, Tuned], tmp_path: Path
) -> None:
    _, tuned = found
    data = digits(val_size=60)
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
    data = digits(val_size=60)
    Tuning(grid=GRID, batches=1).run(settings(found[0]), make_model, data)
    assert (data.evaluate_on, tuple(data.shifts), data.stream) == ("test", ("contrast",), "equal")


def test_a_second_search_neither_trains_nor_scores(
    found: tuple[Path, Tuned], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, tuned = found
    monkeypatch.setattr(Benchmark, "trainer", lambda *_, **__: pytest.fail("ran again"))
    data = digits(val_size=60)
    data.shifts, data.severity = (), 4  # the configuration's shifts do not matter
    again = Tuning(grid=GRID).run(settings(folder, rows="all"), make_model, data)
    assert again.verdicts == tuned.verdicts


def test_a_larger_grid_scores_only_what_is_new_with_the_benchmarks_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings(tmp_path).run(make_model, digits(val_size=60))
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("trained again"))
    Tuning(grid=GRID).run(settings(tmp_path), make_model, digits(val_size=60))
    tests, test = [], Trainer.test

    def counted(*args: Any, **kwargs: Any) -> Any:
        tests.append(args)
        return test(*args, **kwargs)

    monkeypatch.setattr(Trainer, "test", counted)
    larger = Grid(**{**vars(GRID), "lrs": (1e-3, 0.05, 0.1)})
    Tuning(grid=larger).run(settings(tmp_path), make_model, digits(val_size=60))
    assert len(tests) == 2  # the first with an untrained model, before all work
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
        Tuning().run(settings(tmp_path), make, digits(val_size=60))


def test_no_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="batches >= 1 or None, got 0"):
        Tuning(batches=0)


def read(tuned: Tuned) -> tuple[dict[str, Any], dict[str, Any]]:
    """The callback's arguments and the recipe of the lines, as a configuration is read."""
    lines = yaml.safe_load(tuned.yaml())
    arguments = lines["trainer"]["callbacks"][0]["init_args"]
    return arguments, lines.get("benchmark", {}).get("recipe", {})


def test_lines_are_those_of_the_chosen_candidate_and_the_best_like_it_of_each_mode() -> None:
    tuned = toy_tuned(
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
    arguments, recipe = read(toy_tuned((candidate(1e-3), 0.0, 0.1)))
    assert (arguments["steps"], arguments["prediction"], recipe) == (0, "first", {})


def test_a_prediction_without_a_step_may_be_chosen() -> None:
    tuned = toy_tuned((Candidate("none", Recipe(), "mean"), 0.0, 3.0), (candidate(1e-3), 0.0, 1.0))
    arguments, recipe = read(tuned)
    assert (arguments["steps"], arguments["prediction"]) == (0, "mean")
    assert recipe["episodic_lr"] == 1e-3
