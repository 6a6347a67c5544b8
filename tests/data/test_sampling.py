"""Streams of unequal classes, and rows handed out in batches."""

import pytest
import torch

from it3_lightning.data import unequal_stream


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
