"""Decision rules of tuning: what harms, what gains, what is chosen, and what is compared."""

from typing import Any

import pytest
from helpers.benchmark_runs import make_model

from it3_lightning.benchmark.config import Recipe
from it3_lightning.benchmark.rows import Kind
from it3_lightning.benchmark.tune_rules import Grid, Rule
from it3_lightning.networks import MLP


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
