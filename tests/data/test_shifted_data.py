"""What all data modules of shifted samples have in common."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data_modules import CASES, Case, gather, same, write_all
from jsonargparse import ArgumentParser

from it3_lightning.data import (
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    ROAD_SHIFTS,
    ROAD_TUNING_SHIFTS,
    SHIFTS,
    TABULAR_SHIFTS,
    TABULAR_TUNING_SHIFTS,
    TUNING_SHIFTS,
    AirfoilDataModule,
    AirfoilSelfNoiseDataModule,
    BundledDataModule,
    CIFAR10DataModule,
    DigitsDataModule,
    ImageNetCDataModule,
    RoadScenesDataModule,
    ShiftedData,
)

OWN = (SHIFTS, TUNING_SHIFTS)
PUBLISHED = (CORRUPTIONS, EXTRA_CORRUPTIONS)
TUNINGS: list[tuple[type[ShiftedData], dict[str, Any], tuple[tuple[str, ...], tuple[str, ...]]]] = [
    (DigitsDataModule, {}, OWN),
    (CIFAR10DataModule, {"corruptions": "own"}, OWN),
    (CIFAR10DataModule, {"corruptions": "files"}, PUBLISHED),
    (ImageNetCDataModule, {"corruptions": "own"}, OWN),
    (ImageNetCDataModule, {"corruptions": "made"}, PUBLISHED),
    (RoadScenesDataModule, {}, (ROAD_SHIFTS, ROAD_TUNING_SHIFTS)),
    (BundledDataModule, {}, (TABULAR_SHIFTS, TABULAR_TUNING_SHIFTS)),
    (AirfoilDataModule, {}, (AirfoilDataModule.SHIFTS, AirfoilDataModule.TUNING_SHIFTS)),
    (AirfoilSelfNoiseDataModule, {}, (AirfoilSelfNoiseDataModule.SHIFTS, ("missing", "gain"))),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), TUNINGS)
def test_a_module_names_the_shifts_to_report_and_others_to_tune_on(
    kind: type[ShiftedData],
    settings: dict[str, Any],
    expected: tuple[tuple[str, ...], tuple[str, ...]],
) -> None:
    data = kind(**settings)
    assert (data.reporting_shifts, data.tuning_shifts) == expected
    assert set(data.reporting_shifts).isdisjoint(data.tuning_shifts)
    assert data.test_names == ["clean", *data.reporting_shifts]


@pytest.mark.parametrize(("kind", "settings", "expected"), TUNINGS)
def test_a_module_takes_its_tuning_shifts(
    kind: type[ShiftedData], settings: dict[str, Any], expected: Any
) -> None:
    split: Any = "test" if settings.get("corruptions") == "files" else "validation"
    data = kind(**settings, evaluate_on=split, shifts=expected[1])
    assert data.test_names == ["clean", *data.tuning_shifts]


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("all_data"))


@pytest.fixture(params=sorted(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def loaders(data: Any) -> list[Any]:
    return [data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()]


def changes(case: Case) -> list[dict[str, Any]]:
    """One change after the other, each to be followed by the next loader."""
    found: list[dict[str, Any]] = [{"seed": 4}, {"shifts": [case.shifts[1]]}]
    found += [{"test_size": 11}, {"train_size": 9}]
    if case.graded:
        found += [{"severity": 5}, {"severity": "all"}]
    if case.validates:
        found += [{"evaluate_on": "validation"}]
    if case.unequal:
        found += [{"stream": "unequal"}]
    return found


# --- loaders


def test_loaders_are_clean_first_then_each_shift_of_the_same_samples(
    case: Case, root: Path
) -> None:
    data = case.module(root)
    assert data.test_names == ["clean", *case.shifts]
    clean, *shifted = map(gather, data.test_dataloader())
    for inputs, targets in shifted:
        assert torch.equal(targets, clean[1])
        assert inputs.shape == clean[0].shape
        assert not torch.equal(inputs, clean[0])


def test_predict_loaders_hold_the_samples_of_the_test_loaders(case: Case, root: Path) -> None:
    data = case.module(root)
    pairs = zip(data.test_dataloader(), data.predict_dataloader(), strict=True)
    assert all(same(*pair) for pair in pairs)


@pytest.mark.parametrize("stream", ["equal", "unequal", "correlated"])
def test_orders_say_which_samples_the_test_loaders_hold(stream: Any) -> None:
    sizes: dict[str, int] = {"train_size": 100, "test_size": 90}
    plain = DigitsDataModule(shifts=["fog"], **sizes)  # type: ignore[arg-type]
    data = DigitsDataModule(shifts=["fog"], stream=stream, **sizes)  # type: ignore[arg-type]
    orders, every = data.test_orders(), torch.arange(90)
    for order, ours, theirs in zip(
        orders, data.test_dataloader(), plain.test_dataloader(), strict=True
    ):
        assert torch.equal(gather(ours)[0], gather(theirs)[0][order])
        assert torch.equal(order, every) == (stream == "equal")


def test_the_order_of_training_is_new_each_epoch_and_repeats_with_the_seed(
    case: Case, root: Path
) -> None:
    loader, again = (case.module(root).train_dataloader() for _ in range(2))
    epochs = [gather(loader) for _ in range(2)]
    assert not torch.equal(epochs[0][0], epochs[1][0])
    for inputs, targets in epochs:
        repeated = gather(again)
        assert torch.equal(inputs, repeated[0])
        assert torch.equal(targets, repeated[1])
    assert not same(case.module(root, seed=1).train_dataloader(), loader)


def test_plain_training_samples_are_those_trained_on_in_one_order(case: Case, root: Path) -> None:
    data = case.module(root)
    plain = gather(data.plain_train_dataloader())
    assert torch.equal(plain[0], gather(data.plain_train_dataloader())[0])
    trained = gather(data.train_dataloader())[1].flatten(1 if plain[1].ndim > 1 else 0)
    if trained.ndim == 1 or trained.shape[1] == 1:  # masks are turned with their images
        assert torch.equal(trained.flatten().sort().values, plain[1].flatten().sort().values)
    assert len(trained) == len(plain[1])


def test_the_batch_size_changes_no_sample(case: Case, root: Path) -> None:
    one, other = (case.module(root, eval_batch_size=size).test_dataloader() for size in (3, 50))
    assert all(same(*pair) for pair in zip(one, other, strict=True))


def test_the_global_random_state_is_not_touched(case: Case, root: Path) -> None:
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    for stream in ("equal", "unequal") if case.unequal else ("equal",):
        for loader in loaders(case.module(root, stream=stream)):
            gather(loader)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


# --- splits


def test_training_validation_and_test_share_no_sample(case: Case, root: Path) -> None:
    data = case.module(root)
    parts = [data.plain_train_dataloader(), data.val_dataloader(), data.test_dataloader()[0]]
    rows = [{row.numpy().tobytes() for row in gather(part)[0]} for part in parts]
    assert all(rows)
    assert len(set.union(*rows)) == sum(map(len, rows))


def test_evaluate_on_validation_holds_the_validation_samples_alone(case: Case, root: Path) -> None:
    if not case.validates:
        with pytest.raises(ValueError, match=r'Expected evaluate_on="test" .*corruptions='):
            case.module(root, evaluate_on="validation")
        return
    tuning = case.module(root).tuning_shifts[:2]
    data = case.module(root, evaluate_on="validation", shifts=tuning)
    clean, *shifted = data.test_dataloader()
    assert same(clean, case.module(root).val_dataloader())
    assert all(torch.equal(gather(clean)[1], gather(loader)[1]) for loader in shifted)


# --- settings


def test_changed_settings_give_the_data_of_a_new_module(case: Case, root: Path) -> None:
    data, settings = case.module(root), {}
    loaders(data)
    for change in changes(case):
        settings.update(change)
        for name, value in change.items():
            setattr(data, name, value)
        fresh = case.module(root, **settings)
        assert data.test_names == fresh.test_names
        assert all(same(*pair) for pair in zip(loaders(data), loaders(fresh), strict=True))


def test_only_what_changed_is_done_again(
    case: Case, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, loads = case.module(root), 0
    load = data.load

    def counted() -> Any:
        nonlocal loads
        loads += 1
        return load()

    monkeypatch.setattr(data, "load", counted)
    loaders(data)
    kept = data._shifted[case.shifts[1]]
    data.shifts = [case.shifts[1]]
    data.batch_size = 7
    loaders(data)
    assert loads == 1
    assert data._shifted[case.shifts[1]] is kept
    data.seed = 5
    loaders(data)
    assert loads == 2


def test_every_severity_has_a_loader_or_is_refused(case: Case, root: Path) -> None:
    if not case.graded:
        data = case.module(root)
        data.severity = "all"
        with pytest.raises(ValueError, match=r"Expected no severity, got 'all'.* Name the levels"):
            data.setup("test")
        return
    data = case.module(root, severity="all", shifts=[case.shifts[0]])
    assert data.test_names == ["clean", *(f"{case.shifts[0]}/{level}" for level in range(1, 6))]
    alone = case.module(root, severity=4, shifts=[case.shifts[0]])
    assert same(data.test_dataloader()[4], alone.test_dataloader()[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, r"batch_size to be an integer of at least 1, got 0\. Set batch_size=1"),
        ({"eval_batch_size": 2.5}, r"eval_batch_size to be .* at least 1, got 2\.5\. Set eval_"),
        ({"val_size": 0}, r"val_size to be an integer of at least 1( or None)?, got 0\. Set val_"),
        ({"train_size": -1}, r"train_size to be an integer .*, got -1\. Set train_size=1"),
        ({"test_size": "5"}, r"test_size to be an integer .*, got '5'\. Set test_size=1"),
        ({"num_workers": -1}, r"num_workers to be .* at least 0, got -1\. Set num_workers=0"),
        ({"seed": "a"}, r"seed to be an integer of at least 0, got 'a'\. Set seed=0"),
        ({"shifts": ["fgo"]}, r"Unknown (shift|corruption) 'fgo'\..* Known: "),
        ({"shifts": "fog"}, r"shifts to be a list of different names, got 'fog'\. Write .*shifts="),
        ({"shifts": ["fog", "fog"]}, "shifts to be a list of different names"),
        (
            {"stream": "uneven"},
            "Unknown stream 'uneven'.* Known: equal, unequal, corr",
        ),
        ({"evaluate_on": "train"}, "Unknown evaluate_on 'train'.* Known: test, validation"),
    ],
)
def test_bad_settings_are_refused_at_once_and_when_they_are_changed(
    case: Case, settings: dict[str, Any], message: str, root: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        case.module(root, **settings)
    data = case.module(root)
    for name, value in settings.items():
        setattr(data, name, value)
    with pytest.raises(ValueError, match=message):
        data.setup("fit")


def test_a_bad_severity_is_refused_though_there_be_no_shift(case: Case, root: Path) -> None:
    if case.graded:
        with pytest.raises(ValueError, match="severity to be one of 1, 2, 3, 4, 5, got 6"):
            case.module(root, severity=6, shifts=[])


def test_an_unequal_stream_of_what_has_no_classes_is_refused(case: Case, root: Path) -> None:
    if not case.unequal:
        with pytest.raises(ValueError, match=r"stream='equal', got 'unequal': .* streams: \[equal"):
            case.module(root, stream="unequal")


def test_more_samples_than_there_are_is_refused(case: Case, root: Path) -> None:
    for name in ("val_size", "test_size"):
        if case.kind is not RoadScenesDataModule:  # which draws as many as are asked for
            with pytest.raises(ValueError, match=rf"{name} to be at most \d+, .* Lower {name}"):
                case.module(root, **{name: 10**6}).setup("fit")


def test_the_command_line_knows_and_explains_every_setting(case: Case) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(case.kind, "data")
    shown = {action.dest: action.help for action in parser._actions}
    names = [*inspect.signature(ShiftedData).parameters, *["severity"] * case.graded]
    assert len(names) >= 10
    assert all(len(str(shown[f"data.{name}"])) > 10 for name in names)


# --- a module of one's own


class OwnLoaders(ShiftedData):
    """Has loaders and names of its own, and nothing that is shifted here."""

    def setup(self, stage: str) -> None:
        self.stage = stage

    def train_dataloader(self) -> Any:
        return [stage_batch(0)]

    def test_dataloader(self) -> Any:
        return [[stage_batch(1)] for _ in self.test_names]


def stage_batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, 3), float(number)), torch.tensor([number, number])


def test_a_module_with_loaders_of_its_own_needs_no_hook() -> None:
    data = OwnLoaders(shifts=["winter"], seed=3)
    assert data.test_names == ["clean", "winter"]
    assert (data.reporting_shifts, data.tuning_shifts, data.baseline_errors) == ((), (), None)
    assert len(data.predict_dataloader()) == 2
    assert OwnLoaders().shifts == ()


@pytest.mark.parametrize("hook", ["split", "shifted", "change", "groups"])
def test_a_hook_that_is_not_defined_is_named(hook: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "shifted": ("x",),
        "change": ("x", 1),
        "groups": ("x",),
    }
    with pytest.raises(NotImplementedError, match=rf"OwnLoaders to define {hook}\(self"):
        getattr(OwnLoaders(), hook)(*arguments.get(hook, ()))


def test_the_package_of_data_needs_no_optional_package() -> None:
    names = "sklearn pandas timm imagecorruptions neuralfoil torch_geometric boston"
    script = f"""
import sys
for name in {names.split()!r}:
    sys.modules[name] = None
from it3_lightning.data import BostonDataModule, DigitsDataModule, ImageNetCDataModule
print(DigitsDataModule().shifts[0], BostonDataModule().shifts[0], ImageNetCDataModule().severity)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split() == ["gaussian_noise", "zeroed", "3"], found.stderr
