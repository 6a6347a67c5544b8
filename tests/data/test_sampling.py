"""Streams of unequal classes, and rows handed out in batches."""

import pytest
import torch

from it3_lightning.data import ShiftedData, unequal_stream
from it3_lightning.data.sampling import Rows, subset


def test_unequal_stream_makes_three_classes_ten_times_as_frequent() -> None:
    labels = torch.arange(10).repeat(100)
    chosen = unequal_stream(labels, seed=3)
    assert labels[chosen].bincount().sort().values.tolist() == [10] * 7 + [100] * 3
    assert len(set(chosen.tolist())) == len(chosen) == 370


def test_unequal_stream_is_shuffled_and_the_seed_picks_the_classes() -> None:
    labels = torch.arange(10).repeat(100)
    picked = {
        tuple(
            labels[unequal_stream(labels, seed)].bincount().topk(3).indices.sort().values.tolist()
        )
        for seed in range(8)
    }
    assert len(picked) > 4
    chosen = unequal_stream(labels, seed=0)
    assert torch.equal(chosen, unequal_stream(labels, seed=0))
    assert not torch.equal(chosen, chosen.sort().values)


def test_unequal_stream_of_three_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected more than 3 classes .* got 3"):
        unequal_stream(torch.arange(3).repeat(5), seed=0)


def test_a_subset_and_the_others_are_ascending_and_repeat_with_the_seed() -> None:
    chosen, others = subset(6, 2, seed=0, purpose="test_size")
    assert (chosen.tolist(), others.tolist()) == ([2, 3], [0, 1, 4, 5])


def test_a_split_parts_validation_from_training_samples() -> None:
    rows = Rows(torch.zeros(8, 2), torch.arange(8))
    parts = ShiftedData(val_size=3, train_size=4).parted(rows, rows)
    assert {name: part.targets.tolist() for name, part in parts.items()} == {
        "train": [0, 3, 5, 6],
        "validation": [2, 4, 7],
        "test": [0, 1, 2, 3, 4, 5, 6, 7],
    }


def test_rows_are_selected_in_order() -> None:
    rows = Rows(torch.zeros(3, 2), torch.arange(3.0)[:, None])
    assert rows.select(torch.tensor([2])).targets.tolist() == [[2.0]]
