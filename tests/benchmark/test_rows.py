"""Rows of a benchmark: which there are for a kind of model, and in what they differ."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.benchmark_runs import benchmark, digits

from it3_lightning import (
    ClassPrior,
    DualPass,
    FeatureInjection,
    IT3TestTimeCallback,
    MaskPrior,
    ValuePrior,
)
from it3_lightning.benchmark import Row, rows_for
from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.rows import (
    Kind,
    ShuffledPrior,
    control_rows,
    control_trainings,
)
from it3_lightning.data import BundledDataModule
from it3_lightning.engine import Settings
from it3_lightning.methods import Entropy, Idempotence
from it3_lightning.networks import MLP, SmallCNN
from it3_lightning.tasks import IT3Classifier, IT3Regressor, IT3Segmenter


def test_a_distance_of_probabilities_is_refused_for_values(tmp_path: Path) -> None:
    def make() -> IT3Regressor:
        conditioning = FeatureInjection("network.layer0")
        return IT3Regressor(MLP(10, 1), prior=ValuePrior(), conditioning=conditioning)

    with pytest.raises(ValueError, match=r"distance l1 or l2 for a model of values, got 'js'"):
        benchmark(tmp_path, metric="test_mae").run(make, BundledDataModule("diabetes"))


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


def test_rows_without_classes_have_no_entropy_and_no_balance() -> None:
    names = {row.name for row in rows_for(Recipe(), Kind(classes=False, batch_norm=False))}
    assert not any("entropy" in n or "Tent" in n or "balance" in n for n in names)
    assert "batch statistics" not in names


def test_rows_of_maps_have_entropy_but_no_balance() -> None:
    rows = rows_for(Recipe(), Kind(classes=True, batch_norm=True, balanced=False))
    names = {row.name for row in rows}
    assert {"Tent", "filtered entropy, online", "default objective, episodic"} <= names
    assert not any("balance" in name for name in names)


def test_rows_that_see_the_context_of_a_batch_have_several_samples_in_it() -> None:
    kind = Kind(classes=True, batch_norm=True, context="batch")
    rows, plain = rows_for(Recipe(), kind), rows_for(Recipe(), replace(kind, context=None))
    assert [row for row in plain if not row.alone] == [replace(r, company=False) for r in rows]
    single = {row.name for row in rows if row.goes_with("equal/1") and row.training == "post-hoc"}
    assert single == {"source"}
    assert all(row.goes_with("equal/2") for row in rows)


@pytest.mark.parametrize("context", ["batch", "stream"])
def test_a_model_with_a_context_is_scored(tmp_path: Path, context: Any) -> None:
    def make() -> IT3Classifier:
        return IT3Classifier(
            SmallCNN(1, 10, 8, width=4, hidden=16),
            prior=ClassPrior(10, context=context),
            conditioning=FeatureInjection("network.dense1"),
        )

    small = benchmark(
        tmp_path,
        rows="all",
        streams=("equal", "equal/1"),
        methods=["Iterates"],
        posthoc=DualPass(own_share=1.0, unequal_share=0.5, norm_stats="batch"),
    )
    results = small.run(make, digits(test_size=20))
    scored = {(record.row, record.stream) for record in results.records}
    assert ("second prediction", "equal") in scored
    assert (("second prediction", "equal/1") in scored) == (context == "stream")


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


def test_a_row_callback_carries_all_its_settings() -> None:
    for row in rows_for(Recipe(lr=0.3, balance=0.7), Kind(classes=True, batch_norm=True)):
        callback = row.callback()
        if row.settings is not None:
            assert isinstance(callback, IT3TestTimeCallback)
            assert callback.settings == row.settings


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


def test_controls_are_those_that_go_with_model_and_settings(tmp_path: Path) -> None:
    classes = Kind(classes=True, batch_norm=True)
    settings = benchmark(tmp_path, controls=True)
    beside = ["perturbed", "perturbed post-hoc"]
    used = ["perturbed unequal", "perturbed context"]
    assert control_trainings(settings, classes) == beside + used
    for kind in (
        replace(classes, context="batch"),
        replace(classes, balanced=False),
        replace(classes, redrawn=False),
        Kind(classes=False, batch_norm=True, values=True),
    ):
        assert control_trainings(settings, kind) == beside
    unperturbed = benchmark(tmp_path, controls=True, posthoc=DualPass())
    assert control_trainings(unperturbed, classes) == ["post-hoc unequal", "post-hoc context"]
    assert control_trainings(benchmark(tmp_path), classes) == []


def test_control_rows_are_no_rows_that_are_there() -> None:
    kind = Kind(classes=True, batch_norm=True)
    trainings = ["perturbed", "perturbed context"]
    rows = [*rows_for(Recipe(), kind), *control_rows(Recipe(), kind, trainings)]
    names = [(row.training, row.name) for row in rows]
    assert len(names) == len(set(names))
    kept = next(row for row in rows if row.name == "published objective, kept moments")
    assert kept.settings is not None
    assert (kept.settings.reset, kept.settings.optimizer) == ("weights", "adam")
    without = control_rows(Recipe(), replace(kind, batch_norm=False), trainings)
    assert not any("evidence" in r.name or "statistics" in r.name for r in without)


def test_a_shuffled_prior_is_that_of_the_sample_before() -> None:
    def second(prior: torch.Tensor) -> torch.Tensor:
        return 10 * prior

    passes: Any = SimpleNamespace(y0=torch.tensor([[1.0], [2.0], [3.0]]), second=second)
    assert ShuffledPrior().predict(passes).tolist() == [[30.0], [10.0], [20.0]]
    shuffled = control_rows(Recipe(), Kind(classes=True, batch_norm=True), [])
    assert not any(row.goes_with("equal/1") for row in shuffled if "shuffled" in row.name)
