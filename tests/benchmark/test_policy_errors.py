"""Errors of single samples: of classes, masks and values, and by families of shifts."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_jaccard_index,
    multiclass_jaccard_index,
)

from it3_lightning import ClassPrior, LabelsPrior, MaskPrior, ValuePrior
from it3_lightning.benchmark.policy_errors import by_family, errors_of, unit_of
from it3_lightning.benchmark.policy_rule import Condition, Errors


def test_classes_are_right_or_wrong() -> None:
    logits = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    wrong = [
        100.0 * (row.argmax().item() != y.item()) for row, y in zip(logits, labels, strict=True)
    ]
    assert errors_of(ClassPrior(5), logits, labels).tolist() == wrong
    assert {0.0, 100.0} == set(wrong)


def test_a_single_logit_is_that_of_class_one() -> None:
    errors = errors_of(ClassPrior(2), torch.tensor([-1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]))
    assert errors.tolist() == [0.0, 0.0, 100.0]


def test_labels_that_the_loss_ignores_are_never_wrong() -> None:
    prior = ClassPrior(3, ignore_index=255)
    assert errors_of(prior, torch.eye(3)[:2], torch.tensor([255, 0])).tolist() == [0.0, 100.0]


def test_values_have_their_absolute_error_in_their_own_units() -> None:
    prior = ValuePrior(2, mean=[10.0, 0.0], std=[5.0, 2.0])
    outputs, target = torch.tensor([[11.0, 1.0], [2.0, 3.0]]), torch.tensor([[10.0, 4.0], [2, 3]])
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.tensor([2.0, 0.0]))


def test_of_tokens_and_of_labels_the_share_counts_that_is_wrong() -> None:
    tokens = torch.tensor([[[3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]])  # 0, 0, 1, 1
    prior = ClassPrior(2, layout="BTC", ignore_index=9)
    assert errors_of(prior, tokens, torch.tensor([[0, 0, 1, 0]])).tolist() == [25.0]
    assert errors_of(prior, tokens, torch.tensor([[9, 9, 1, 0]])).tolist() == [50.0]
    logits, labels = torch.tensor([[1.0, -1.0, 1.0, 1.0]]), torch.tensor([[1, 1, 1, 0]])
    assert errors_of(LabelsPrior(4), logits, labels).tolist() == [50.0]


def test_values_of_a_series_have_the_units_of_their_channel_and_unknown_ones_do_not_count() -> None:
    prior = ValuePrior(2, layout="BCT", mean=[0.0, 1.0], std=[2.0, 10.0])
    outputs = torch.tensor([[[1.0, 2.0, 0.0], [5.0, 6.0, 0.0]]])
    target = torch.tensor([[[0.0, 0.0, float("nan")], [5.0, 9.0, 0.0]]])
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.tensor([1.5]))


def test_a_binary_mask_has_the_overlap_of_its_foreground() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, 1, 5, 5, generator=draw)
    target = torch.randint(2, (6, 5, 5), generator=draw)
    known = [
        100 - 100 * binary_jaccard_index(o, y) for o, y in zip(outputs[:, 0], target, strict=True)
    ]
    torch.testing.assert_close(errors_of(MaskPrior(1), outputs, target), torch.stack(known))
    two = torch.cat([-outputs / 2, outputs / 2], dim=1)
    torch.testing.assert_close(errors_of(MaskPrior(2), two, target), torch.stack(known))


def test_an_empty_mask_is_right_where_nothing_is_found() -> None:
    nothing = torch.full((2, 1, 3, 3), -1.0)
    nothing[1, 0, 0, 0] = 1.0
    assert errors_of(MaskPrior(1), nothing, torch.zeros(2, 3, 3)).tolist() == [0.0, 100.0]


def test_several_classes_have_the_mean_of_those_in_the_image() -> None:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(4, 3, 6, 6, generator=draw)
    target = torch.randint(3, (4, 6, 6), generator=draw)
    target[:, 0, 0] = 255
    known = [
        100 - 100 * multiclass_jaccard_index(o.argmax(0)[None], y[None], 3, ignore_index=255)
        for o, y in zip(outputs, target, strict=True)
    ]
    prior = MaskPrior(3, ignore_index=255)
    torch.testing.assert_close(errors_of(prior, outputs, target), torch.stack(known))


@pytest.mark.parametrize(
    ("prior", "unit"),
    [
        (ClassPrior(3), "error, percent"),
        (MaskPrior(), "100 - IoU, percent"),
        (ValuePrior(), "absolute error"),
    ],
)
def test_the_unit_is_said(prior: ClassPrior, unit: str) -> None:
    assert unit_of(prior) == unit


def test_severities_of_a_shift_are_one_family() -> None:
    weak, strong = Condition("fog/1", "equal", 4), Condition("fog/5", "equal", 4)
    clean = Condition("clean", "equal", 4)
    ids = {c: np.arange(2) for c in (clean, weak, strong)}
    values = {clean: np.zeros(2), weak: np.ones(2), strong: np.full(2, 5.0)}
    found = by_family(Errors(ids, values, {"policy": values}))
    fog = Condition("fog", "equal", 4)
    assert found.samples[fog].tolist() == [0, 1, 0, 1]
    assert found.source[fog].tolist() == found.policies["policy"][fog].tolist() == [1, 1, 5, 5]
    assert [*found.source] == [clean, fog]
