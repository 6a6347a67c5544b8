"""Levels outside a range, and what lies inside it."""

from itertools import pairwise

import pytest
import torch

from it3_lightning.data.ranges import deciles, level_names, levels, outside
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
