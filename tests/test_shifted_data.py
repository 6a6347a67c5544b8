"""What all data modules of shifted samples have in common."""

from typing import Any

import pytest

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
    split = "test" if settings.get("corruptions") == "files" else "validation"
    data = kind(**settings, evaluate_on=split, shifts=expected[1])
    assert data.test_names == ["clean", *data.tuning_shifts]
