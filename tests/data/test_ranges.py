"""Levels outside a range and what lies inside it, and UCI's file of self-noise."""

from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.airfoil_files import write_self_noise
from torch import Tensor

from it3_lightning.data import AirfoilSelfNoiseDataModule
from it3_lightning.data.ranges import Column, deciles, level_names, levels, outside, read
from it3_lightning.data.sampling import Rows


def test_distances_outside_a_box_are_in_its_widths() -> None:
    low, high = torch.tensor([0.0, 10.0]), torch.tensor([2.0, 20.0])
    values = torch.tensor([[1.0, 15.0], [2.0, 20.0], [-6.0, 15.0], [8.0, 60.0]])
    assert outside(values, low, high).tolist() == [0.0, 0.0, 3.0, 5.0]


def test_levels_go_from_near_to_far_and_hold_equally_many() -> None:
    distance = torch.rand(58, generator=torch.Generator().manual_seed(0)) * (torch.arange(58) > 5)
    found = levels(distance, "far", "")
    assert list(found) == [f"far_{level}" for level in (1, 2, 3, 4, 5)]
    assert [len(indices) for indices in found.values()] == [11, 11, 10, 10, 10]
    for near, far in pairwise(found.values()):
        assert distance[near].max() <= distance[far].min()
    together = torch.cat(list(found.values())).sort().values
    assert torch.equal(together, torch.arange(6, 58))


def test_too_few_samples_outside_say_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"at least 5 samples outside .* far, .* got 4\. Go there"):
        levels(torch.tensor([0.0, 1, 2, 3, 4]), "far", "Go there.")


def test_deciles_are_tenths_by_rank() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0))
    tenths = deciles(values)
    assert tenths.bincount().tolist() == [4] * 10
    assert all(values[tenths == i].max() < values[tenths == i + 1].min() for i in range(9))


def test_samples_are_selected_in_order() -> None:
    samples = Rows(torch.arange(4.0)[:, None], torch.arange(4.0)[:, None] * 10)
    chosen = samples.select(torch.tensor([3, 1]))
    assert (chosen.inputs[:, 0].tolist(), chosen.targets[:, 0].tolist()) == (
        [3.0, 1.0],
        [30.0, 10.0],
    )


def test_names_of_levels_are_numbered() -> None:
    assert level_names("shape") == ("shape_1", "shape_2", "shape_3", "shape_4", "shape_5")


def test_the_distance_outside_a_box_is_euclidean_over_its_sides() -> None:
    box = torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0])
    assert outside(torch.tensor([[0.5, 1.0], [4.0, 10.0]]), *box).tolist() == [0.0, 5.0]


def test_the_nearest_level_has_the_sample_nearest_to_the_range() -> None:
    distance = torch.tensor([0, 9.0, 0, 1, 3, 8, 5])
    assert levels(distance, "far", "")["far_1"].tolist() == [3]


# --- UCI's airfoil self-noise


@pytest.fixture
def make(airfoil_data: Path) -> Any:
    def module(**settings: Any) -> AirfoilSelfNoiseDataModule:
        return AirfoilSelfNoiseDataModule(airfoil_data, **settings)

    return module


def gather(loader: Iterable[Any]) -> tuple[Tensor, Tensor]:
    features, targets = zip(*loader, strict=True)
    return torch.cat(features), torch.cat(targets)


def test_the_published_format_is_read(tmp_path: Path) -> None:
    file = write_self_noise(tmp_path)
    first = "800\t0\t0.3048\t71.3\t0.00266337\t126.201"  # the first line as published
    file.write_text("\r\n".join([first, *file.read_text().splitlines()[1:], ""]))
    rows = read(file)
    assert rows.shape == (1503, 6)
    assert rows[0].tolist() == [800, 0, 0.3048, 71.3, 0.00266337, 126.201]


def damaged(lines: list[str], damage: str) -> str:
    text = "\n".join(lines) + "\n"
    if damage == "cut":
        return text[:-15]
    if damage == "text":
        return text.replace(lines[4], "five\tsix")
    if damage == "short":
        return "\n".join(lines[:1000])
    if damage == "swapped":
        swapped = [line.split("\t") for line in lines]
        return "\n".join("\t".join(words[::-1]) for words in swapped)
    return {
        "empty": "",
        "html": "<html>404</html>\n",
        "nan": text.replace(lines[2], "\t".join(["nan"] * 6)),
    }[damage]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("empty", r"Expected 1503 measurements in .*airfoil_self_noise.dat, got 0\."),
        ("short", r"Expected 1503 measurements .* got 1000\."),
        ("cut", r"Expected six numbers .* in line 1503 of"),
        ("text", r"in line 5 of .*, got 'five\\tsix'"),
        ("html", r"in line 1 of .*, got '<html>404"),
        ("swapped", r"frequency 200 to 20000.* in line 1 of"),
        ("nan", r"in line 3 of .*, got 'nan"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: str, message: str) -> None:
    file = write_self_noise(tmp_path)
    file.write_text(damaged(file.read_text().splitlines(), damage))
    data = AirfoilSelfNoiseDataModule(tmp_path)
    for look in (data.prepare_data, lambda: data.setup("fit")):
        with pytest.raises(ValueError, match=message):
            look()


def test_a_missing_file_says_what_goes_where(tmp_path: Path) -> None:
    data = AirfoilSelfNoiseDataModule(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere/airfoil_self_noise\.dat.* set root"):
        data.prepare_data()


@pytest.mark.parametrize("column", get_args(Column))
def test_levels_are_above_what_is_trained_on(make: Any, column: Any, airfoil_data: Path) -> None:
    pool = make(column=column, held=0.2).load()
    place = get_args(Column).index(column)
    parts = [pool.inside, *pool.levels.values()]
    values = [torch.cat([part.inputs, part.targets], dim=1)[:, place] for part in parts]
    assert list(pool.levels) == [f"high_{level}" for level in range(1, 6)]
    for near, far in pairwise(values):
        assert near.max() <= far.min()
    assert sum(map(len, values)) == 1503
    assert len(values[0]) == pytest.approx(0.8 * 1503, abs=2)
    everything = torch.cat([torch.cat([part.inputs, part.targets], dim=1) for part in parts])
    assert torch.equal(
        everything.sum(0).round(), read(airfoil_data / "airfoil_self_noise.dat").sum(0).round()
    )


def test_equal_values_stay_together(tmp_path: Path) -> None:
    file = write_self_noise(tmp_path)
    words = [line.split("\t") for line in file.read_text().splitlines()]
    for index, row in enumerate(words):
        row[0] = str([500, 1000, 2000, 4000][index % 4])
    file.write_text("\n".join("\t".join(row) for row in words))
    pool = AirfoilSelfNoiseDataModule(tmp_path, column="frequency", held=0.3).load()
    assert set(pool.inside.inputs[:, 0].tolist()) == {500, 1000, 2000}
    assert {len(part) for part in pool.levels.values()} == {75}


def test_features_have_the_scale_of_the_training_set_and_levels_stay_in_decibels(make: Any) -> None:
    data = make(train_size=500, test_size=80)
    features, targets = gather(data.train_dataloader())
    assert features.shape == (500, 5)
    assert features.mean(0).tolist() == pytest.approx([0.0] * 5, abs=1e-5)
    assert features.std(0, correction=0).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    assert 104 <= targets.min() < targets.max() <= 140
    raw = data._splits["train"].inputs
    clean = data._splits["test"].inputs
    expected = (clean - raw.mean(0)) / raw.std(0, correction=0)
    actual = gather(data.test_dataloader()[0])[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_perturbations_are_what_they_say(make: Any) -> None:
    names = ["noise", "missing", "gain"]
    clean, *others = make(shifts=names, noise=0.5).test_dataloader()
    x, y = gather(clean)
    noise, missing, gain = (gather(loader) for loader in others)
    for _, targets in (noise, missing, gain):
        assert torch.equal(targets, y)
    assert (noise[0] - x).std().item() == pytest.approx(0.5, rel=0.1)
    lost = missing[0].abs() < 1e-6
    assert lost.float().mean().item() == pytest.approx(0.1, abs=0.03)
    assert torch.equal(missing[0][~lost], x[~lost])
    factors = gain[0] / x
    torch.testing.assert_close(factors, factors[:1].expand_as(factors), rtol=1e-3, atol=1e-3)
    assert (factors[0] - 1).abs().min() > 1e-3


def test_tuning_shifts_are_others_and_levels_are_kept_for_testing(make: Any) -> None:
    shifts = AirfoilSelfNoiseDataModule.TUNING_SHIFTS
    assert set(shifts).isdisjoint(AirfoilSelfNoiseDataModule.SHIFTS)
    data = make(evaluate_on="validation", shifts=shifts)
    assert torch.equal(gather(data.test_dataloader()[0])[0], gather(data.val_dataloader())[0])
    with pytest.raises(ValueError, match=r"no levels .* got 'high_1'"):
        make(evaluate_on="validation")


def test_seeds_decide_splits_and_perturbations(make: Any) -> None:
    def features(seed: int) -> list[Tensor]:
        return [gather(loader)[0] for loader in make(seed=seed).test_dataloader()]

    first, again, other = features(0), features(0), features(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[-1] - first[0], other[-1] - other[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "weight"}, "Unknown column 'weight'"),
        ({"held": 1.0}, "held to be between 0 and 1, got 1.0"),
        ({"noise": -0.1}, "noise to be at least 0 standard deviations"),
        ({"shifts": ["shape_1"]}, "Unknown shift 'shape_1'"),
    ],
)
def test_bad_settings_are_refused_by_the_constructor(
    settings: Any, message: str, make: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings)


# --- samples beyond the range, set apart for choosing


def targets(data: Any) -> dict[str, Tensor]:
    loaders = zip(data.test_names, data.test_dataloader(), strict=True)
    return {name: torch.cat([batch[1] for batch in loader])[:, 0] for name, loader in loaders}


def test_samples_beyond_the_range_are_set_apart_of_every_level(tmp_path: Path) -> None:
    root = write_self_noise(tmp_path).parent
    all_of_them = targets(AirfoilSelfNoiseDataModule(root, column="level"))
    data = AirfoilSelfNoiseDataModule(root, column="level", beyond_size=50)
    left = targets(data)
    data.evaluate_on, data.shifts = "validation", data.tuning_shifts
    found = targets(data)
    assert [*found] == ["clean", "missing", "gain", "beyond"]
    assert len(found["beyond"]) == 50
    assert found["beyond"].min() > found["clean"].max()
    for level in data.LEVELS:
        assert len(left[level]) == len(all_of_them[level]) - 10
    after = torch.cat([*(left[level] for level in data.LEVELS), found["beyond"]])
    before = torch.cat([all_of_them[level] for level in data.LEVELS])
    assert torch.equal(after.sort().values, before.sort().values)
    for name in ("clean", "noise"):
        assert torch.equal(left[name], all_of_them[name])


def test_by_default_none_are_set_apart(tmp_path: Path) -> None:
    root = write_self_noise(tmp_path).parent
    data = AirfoilSelfNoiseDataModule(root)
    assert data.tuning_shifts == data.TUNING_SHIFTS
    with pytest.raises(ValueError, match="Unknown shift 'beyond'"):
        AirfoilSelfNoiseDataModule(root, shifts=["beyond"])
    with pytest.raises(ValueError, match="beyond_size"):
        AirfoilSelfNoiseDataModule(root, beyond_size=-1)
    with pytest.raises(ValueError, match=r"Expected beyond_size=0, or at least 5.*got 4"):
        AirfoilSelfNoiseDataModule(root, beyond_size=4)
