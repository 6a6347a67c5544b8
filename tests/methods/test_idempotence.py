"""Idempotence against the reference: the loss, which samples are reliable, the balance."""

import math
from typing import Any

import pytest
import torch
from helpers.modules import predictions
from helpers.reference import Distance, distance, objective, reliable
from torch import Tensor

from it3_lightning.methods import Entropy, Idempotence, agreeing, confident

P0, P1 = predictions(40, 3), predictions(40, 3, seed=1)


def second(_: Tensor) -> Tensor:
    return P1


@pytest.mark.parametrize("name", ["l2", "js", "cross_entropy"])
@pytest.mark.parametrize("reliability", [None, 0.0, 0.6, 0.99999])
@pytest.mark.parametrize("balance", [0.0, 0.3])
@pytest.mark.parametrize("sharpen", [0.0, 0.7])
def test_idempotence_equals_the_reference(
    name: Distance, reliability: float | None, balance: float, sharpen: float
) -> None:
    found = Idempotence(name, reliability, balance, sharpen)(P0, second)
    threshold = reliability or 0.0
    expected = objective(P0, P1, name, reliability is not None, balance, threshold, sharpen)
    torch.testing.assert_close(found.loss(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.measure, distance(name, P0, P1), rtol=0, atol=1e-12)
    if reliability is not None:
        assert torch.equal(found.reliable, reliable(P0, P1, reliability))
        assert found.empty == (balance == 0 and not reliable(P0, P1, reliability).any())


def test_maps_are_reliable_where_most_positions_are() -> None:
    sure, unsure = [0.9, 0.1], [0.55, 0.45]
    y0 = torch.tensor([[sure] * 4, [unsure] * 4, [sure] * 4]).movedim(2, 1)
    y1 = y0.clone()
    y1[0, :, 0] = torch.tensor([0.1, 0.9])  # another class at 1 position of 4
    y1[2, :, :2] = torch.tensor([[0.1], [0.9]])  # and at 2 of 4
    found = Idempotence(reliability=0.6)(y0, lambda _: y1)
    assert found.reliable.tolist() == [True, False, False]
    assert agreeing(y0, y1, 0.6).tolist() == [True, True, False]
    assert confident(y0, 0.6).tolist() == [True, False, True]


@pytest.mark.parametrize(
    "values",
    [
        torch.randn(6),
        torch.randn(6, 1),
        torch.randn(6, 3),  # three values are no three classes
        torch.rand(6, 4) + 0.5,  # nor are independent labels
        torch.rand(6, 1, 4, 4),
    ],
)
def test_predictions_that_are_no_classes_always_count(values: Tensor) -> None:
    found = Idempotence(reliability=0.99)(values, lambda y0: -y0)
    assert found.reliable.tolist() == [True] * 6


def test_balance_is_lowest_where_classes_are_equally_frequent() -> None:
    equal, one = torch.eye(4), torch.eye(4)[[0, 0, 0, 0]]
    terms = [Idempotence(balance=2.0)(y0, lambda y0: y0).batch_term for y0 in (equal, one)]
    assert terms[0] is not None
    assert terms[1] is not None
    assert terms[0].item() == pytest.approx(-2 * math.log(4))
    assert terms[1].item() == pytest.approx(0.0, abs=1e-6)


def test_balance_of_maps_counts_every_position() -> None:
    maps = predictions(5, 3, 4, 4)
    rows = maps.movedim(1, 3).reshape(-1, 3)
    found = Idempotence(reliability=None, balance=1.0)(maps, lambda y0: y0).batch_term
    mean = rows.mean(0)
    torch.testing.assert_close(found, (mean * mean.log()).sum())


@pytest.mark.parametrize("values", [torch.randn(4), torch.rand(4, 1)])
def test_what_needs_classes_says_so(values: Tensor) -> None:
    with pytest.raises(ValueError, match=r"balance term needs class probabilities \(B, C"):
        Idempotence(balance=0.1)(values, lambda y0: y0)
    with pytest.raises(ValueError, match=r"Entropy needs class probabilities \(B, C"):
        Entropy()(values, lambda y0: y0)


def test_a_distance_averaged_over_the_batch_is_refused() -> None:
    objective = Idempotence(lambda p, q: (p - q).square().mean())
    with pytest.raises(ValueError, match=r"shape \(40,\), one per sample, got \(\)"):
        objective(P0, second)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Idempotence("l3"), "Unknown distance 'l3'"),  # type: ignore[arg-type]
        (lambda: Idempotence(reliability=1.5), r"reliability in \[0, 1\] or None, got 1.5"),
        (lambda: Idempotence(balance=-1.0), "balance >= 0, got -1.0"),
        (lambda: Entropy(reliability=-0.1), r"reliability in \[0, 1\] or None, got -0.1"),
        (lambda: Entropy(balance=-1.0), "balance >= 0, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_a_batch_term_needs_a_batch() -> None:
    assert not Idempotence().needs_batch
    assert Idempotence(balance=0.1).needs_batch
    assert not Entropy().needs_batch
    assert Entropy(balance=0.1).needs_batch


def test_without_a_filter_nothing_is_sharpened() -> None:
    published = Idempotence(reliability=None, sharpen=5.0)(P0, second)
    torch.testing.assert_close(published.loss(), distance("l2", P0, P1).mean())


def test_values_are_not_sharpened() -> None:
    values = torch.tensor([[0.3], [0.9]])
    assert Idempotence(sharpen=1.0)(values, lambda y0: y0).loss() == 0


def test_negative_sharpening_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharpen >= 0, got -1.0"):
        Idempotence(sharpen=-1.0)
