"""Streams of unequal classes, and rows handed out in batches."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from it3_lightning.data import DigitsDataModule, ShiftedData, correlated_stream, unequal_stream
from it3_lightning.data.sampling import Mixed, Rows, subset


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


def test_a_correlated_stream_holds_every_sample_once_among_few_classes() -> None:
    labels = torch.arange(10).repeat(200)
    order = correlated_stream(labels, seed=1)
    assert sorted(order.tolist()) == list(range(2000))
    assert torch.equal(order, correlated_stream(labels, seed=1))
    assert not torch.equal(order, correlated_stream(labels, seed=2))
    most = [float(b.bincount().max()) / len(b) for b in labels[order].view(-1, 100)]
    assert sum(most) / len(most) > 0.5  # a shuffled batch has about 0.15
    even = correlated_stream(labels, seed=1, concentration=1e6)
    assert max(float(b.bincount().max()) for b in labels[even].view(-1, 100)) < 30


def test_the_fewer_classes_are_neighbours_the_smaller_the_concentration() -> None:
    counts = []
    for concentration in (1.0, 0.01):
        data = DigitsDataModule(shifts=[], stream="correlated", concentration=concentration)
        data.test_size = 500
        batches = [y for _, y in data.test_dataloader()[0]]
        assert [len(y) for y in batches] == [100] * 5
        counts.append(sum(len(y.unique()) for y in batches) / 5)
    assert counts[0] > 9
    assert counts[1] < 6
    with pytest.raises(ValueError, match="concentration > 0, got 0"):
        DigitsDataModule(concentration=0)


def test_correlated_loaders_hold_all_samples_in_the_same_order_under_every_shift() -> None:
    data = DigitsDataModule(shifts=("contrast", "fog"), severity=4, stream="correlated")
    clean, contrast, fog = (torch.cat([y for _, y in d]) for d in data.test_dataloader())
    assert torch.equal(clean, contrast)
    assert torch.equal(clean, fog)
    data.stream = "equal"
    whole = torch.cat([y for _, y in data.test_dataloader()[0]])
    assert torch.equal(clean.sort().values, whole.sort().values)
    assert (clean.diff() == 0).float().mean() > 3 * (whole.diff() == 0).float().mean()


def test_a_continual_stream_has_all_shifts_one_after_another_in_one_loader() -> None:
    data = DigitsDataModule(shifts=("contrast", "fog"), severity=4, test_size=130)
    separate = data.test_dataloader()
    data.stream = "continual"
    assert data.test_names == ["clean", "continual"]
    clean, joined = data.test_dataloader()
    assert len(joined) == len(separate[1]) + len(separate[2]) == 4
    for loaders, one in ((separate[:1], clean), (separate[1:], joined)):
        expected = [batch for loader in loaders for batch in loader]
        for (x, y), (u, v) in zip(one, expected, strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    with pytest.raises(ValueError, match="shifts for stream='continual', got none"):
        DigitsDataModule(shifts=(), stream="continual")


def test_a_mixed_stream_has_each_sample_once_under_one_of_the_shifts() -> None:
    data = DigitsDataModule(shifts=("contrast", "fog", "blur"), severity=4, test_size=130)
    whole = [[torch.cat(each) for each in zip(*d, strict=True)] for d in data.test_dataloader()]
    data.stream = "mixed"
    assert data.test_names == ["clean", "mixed"]
    clean, mixed = (
        [torch.cat(each) for each in zip(*d, strict=True)] for d in data.test_dataloader()
    )
    assert torch.equal(clean[0], whole[0][0])
    came, shifts = [], []
    for image, label in zip(*mixed, strict=True):
        found = [
            (shift, row)
            for shift, (images, labels) in enumerate(whole[1:])
            for row in range(130)
            if torch.equal(images[row], image) and labels[row] == label
        ]
        shifts.append(found[0][0])
        came.append(found[0][1])
    assert sorted(came) == list(range(130))
    assert {shifts.count(shift) for shift in range(3)} == {43, 44}
    assert sum(a != b for a, b in pairwise(shifts)) > 43  # side by side
    data.seed = 1
    assert not torch.equal(mixed[0], torch.cat([x for x, _ in data.test_dataloader()[1]]))
    with pytest.raises(ValueError, match="shifts for stream='mixed', got none"):
        DigitsDataModule(shifts=(), stream="mixed")


def test_a_mixed_stream_of_other_batches_than_two_tensors_is_refused() -> None:
    class Named(Rows):
        def __getitems__(self, indices: Any) -> Any:
            return {"x": self.inputs[indices]}, self.targets[indices]

    rows = Named(torch.arange(4.0), torch.arange(4))
    with pytest.raises(ValueError, match=r"input and a target tensor for stream='mixed'"):
        Mixed.of([rows, rows], 0).__getitems__([0, 1])
