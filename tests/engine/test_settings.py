"""Settings: what they refuse, and what is chosen where it is not given."""

from typing import Any

import pytest
import torch
from torch import Tensor

from it3_lightning import IT3TestTimeCallback
from it3_lightning.engine import OPTIMIZERS, Rule, Settings
from it3_lightning.methods import LAME, T3A, Idempotence, Objective, Passes
from it3_lightning.methods.base import Steps


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps >= 0, got -1"),
        ({"lr": -0.1}, "lr >= 0, got -0.1"),
        ({"lr": float("nan")}, "finite lr >= 0, got nan"),
        ({"lr": float("inf")}, "finite lr >= 0, got inf"),
        ({"optimizer": "adan"}, "Unknown optimizer 'adan'. Did you mean 'adam'"),
        ({"reset": 0}, "'batch', 'weights', 'never' or N >= 1, got 0"),
        ({"reset": True}, "'batch', 'weights', 'never' or N >= 1, got True"),
        ({"anchor": "teacher"}, "anchor in frozen, ema, live, got 'teacher'"),
        ({"norm_stats": "test"}, "norm_stats in source, batch, mixed, evidence, got 'test'"),
        ({"norm_prior": 0}, "norm_prior N >= 1 samples, got 0"),
        ({"weight_ensembling": 1.0}, r"weight_ensembling in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.1}, r"ema_decay in \[0, 1\], got 1.1"),
        ({"grad_clip": 0}, "grad_clip > 0 or None, got 0"),
    ],
)
def test_settings_refuse_what_is_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


def test_an_objective_that_does_not_say_whether_it_needs_a_batch_is_refused() -> None:
    def mine(y0: Tensor, second: Any) -> Any:
        raise AssertionError("it was evaluated")

    with pytest.raises(TypeError, match=r"needs_batch, .* got function without"):
        Settings(objective=mine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"needs_batch, .* got function without"):
        Settings(objective=mine, optimizer="sgd", lr=0.1)  # type: ignore[arg-type]
    mine.needs_batch = False  # type: ignore[attr-defined]
    assert Settings(objective=mine).moves == ("polyak", 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0},
        {"ema_decay": 0},
        {"ema_decay": 1},
        {"optimizer": "polyak", "lr": 0.01},
        {"optimizer": "polyak", "lr": 2},
        {"memory": 1},
        {"gate": 0.1},
        {"gate": float("inf")},
        {"scope": "sample", "backend": "loop"},
        {"scope": "sample", "compile": True},
    ],
)
def test_settings_take_what_lies_on_the_limits(settings: dict[str, Any]) -> None:
    made = Settings(**settings)
    assert {name: getattr(made, name) for name in settings} == settings


class Thrice(Idempotence):
    """Takes steps of its own."""

    def step(self, passes: Passes, state: Steps) -> Objective:
        for _ in range(3):
            objective = super().step(passes, state)
        return objective


def test_a_gate_does_not_go_with_steps_of_a_methods_own() -> None:
    with pytest.raises(ValueError, match="Thrice takes steps of its own"):
        Settings(objective=Thrice(), gate=0.1)
    assert Settings(objective=Thrice()).gate is None


@pytest.mark.parametrize("optimizer", ["polyak", "sgd", "adam", "rmsprop"])
def test_one_step_of_a_named_optimizer_from_the_source_is_taken_in_closed_form(
    optimizer: Any,
) -> None:
    assert Settings(optimizer=optimizer).single_step
    assert Settings(optimizer=optimizer, anchor="live", reset=1).single_step


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 0},
        {"steps": 2},
        {"anchor": "ema"},
        {"reset": "never"},
        {"reset": "weights"},
        {"reset": 2},
        {"weight_ensembling": 0.01},
        {"grad_clip": 1.0},
        {"objective": Thrice()},
        {"optimizer": torch.optim.SGD},
        {"optimizer": "without a closed form"},
    ],
)
def test_all_else_needs_an_optimizer_with_a_state(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "without a closed form", Rule(torch.optim.Adagrad))
    assert not Settings(**settings).single_step


def test_a_rule_is_that_of_the_name() -> None:
    assert Settings().rule is OPTIMIZERS["polyak"]
    assert Settings(optimizer=torch.optim.SGD).rule is None


def test_what_a_method_predicts_is_asked_for_where_it_may() -> None:
    assert Settings(objective=LAME()).predicts is True
    assert Settings().predicts is False


def test_one_batch_is_an_episode() -> None:
    assert Settings(reset=1).episodic
    assert not Settings(reset=2).episodic


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm_stats": "batch"}, "each sample alone, but norm_stats='batch'"),
        ({"objective": Idempotence(balance=0.1)}, "balance terms need several"),
        ({"weight_ensembling": 0.1}, "goes with neither weight_ensembling nor a method that"),
        ({"objective": T3A("head")}, "a method that predicts by itself, as T3A may"),
        ({"reset": "never"}, "its own weights and optimizer, but reset='never' carries them"),
        ({"reset": "weights"}, "its own weights and optimizer, but reset='weights' carries them"),
        ({"reset": 2}, "its own weights and optimizer, but reset=2 carries them"),
        ({"compile": True, "backend": "loop"}, "not backend='loop'"),
        ({"scope": "batch", "compile": True}, "scope='batch' runs your network as it is"),
        ({"scope": "each"}, "scope in batch, sample, got 'each'"),
        ({"backend": "fast"}, "backend in auto, vectorised, loop, got 'fast'"),
        ({"chunk_size": 0}, "chunk_size 'auto' or N >= 1, got 0"),
        ({"chunk_size": True}, "chunk_size 'auto' or N >= 1, got True"),
        ({"memory": 0}, "memory > 0 bytes, got 0"),
        ({"gate": float("nan")}, "gate to be a distance or None, got NaN"),
    ],
)
def test_settings_refuse_what_a_single_sample_cannot_have(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"scope": "sample", **settings})


def test_a_reset_after_every_batch_is_taken() -> None:
    assert Settings(scope="sample", reset=1).episodic


@pytest.mark.parametrize(
    ("given", "moves"),
    [
        ({}, ("polyak", 0.5)),
        ({"lr": 1e-3}, ("adam", 1e-3)),
        ({"optimizer": "polyak", "lr": 1.0}, ("polyak", 1.0)),
        ({"optimizer": "sgd"}, ("sgd", 1e-4)),
        ({"grad_clip": 1.0}, ("adam", 1e-4)),
        ({"objective": Idempotence("js", balance=0.3)}, ("adam", 1e-4)),
    ],
)
def test_polyak_is_the_default_where_no_learning_rate_is_given(
    given: dict[str, Any], moves: tuple[str, float]
) -> None:
    assert Settings(**given).moves == moves
    assert IT3TestTimeCallback(**given).settings.moves == moves


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": 1e-4}, r"share of the distance in \[0.01, 2\], .* got 0.0001"),
        ({"lr": 1e-3}, "share of the distance in .* got 0.001"),
        ({"lr": 2.1}, r"share of the distance in \[0.01, 2\], .* got 2.1"),
        ({"grad_clip": 1.0}, "Leave out grad_clip"),
        ({"objective": Idempotence("js", balance=0.3)}, "cannot fall below 0"),
    ],
)
def test_what_does_not_go_with_polyak_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"optimizer": "polyak", "lr": 0.5, **given})
