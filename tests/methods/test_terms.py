"""Distances against the reference, known values, gradients, and the ends of a number's range."""

import math
from typing import Any, get_args

import pytest
import torch
from helpers.modules import predictions
from helpers.reference import Distance, distance
from torch import Tensor

from it3_lightning.methods import agreeing, balance_term, confident
from it3_lightning.methods.terms import DistanceName, get_distance, measured, sharpen_term

NAMES: list[Any] = list(get_args(DistanceName))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, *shape, generator=generator, dtype=torch.float64).softmax(2)
    return p, q


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 5), (4, 3, 5, 6)])
@pytest.mark.parametrize("name", NAMES)
def test_distances_equal_the_reference(name: Distance, shape: tuple[int, ...]) -> None:
    p, q = pair(*shape)
    found = get_distance(name)(p, q)
    assert found.shape == (4,)
    torch.testing.assert_close(found, distance(name, p, q), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_map_weighs_as_much_as_one_of_its_positions(name: Any) -> None:
    p, q = pair(4, 3)
    many = (4, 3, 7, 9)
    found = get_distance(name)(p[..., None, None].expand(many), q[..., None, None].expand(many))
    torch.testing.assert_close(found, get_distance(name)(p, q))


@pytest.mark.parametrize("name", ["l2", "l1"])
def test_values_without_channels_are_one_a_sample(name: Any) -> None:
    found = get_distance(name)(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0]))
    assert found.tolist() == [{"l2": 4.0, "l1": 2.0}[name], 0.0]


@pytest.mark.parametrize("name", ["l2", "l1", "kl", "js"])
def test_equal_predictions_have_no_distance(name: Any) -> None:
    p, _ = pair(4, 3)
    assert get_distance(name)(p, p).tolist() == [0.0] * 4


def test_known_values() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.25, 0.75]])
    expected = {
        "l2": 0.5,
        "l1": 1.0,
        "kl": 0.5 * math.log(3),
        "js": 0.75 * math.log(1.5) - 0.25 * math.log(2),
        "cross_entropy": math.log(4) - 0.25 * math.log(3),
    }
    found = {name: get_distance(name)(p, q).item() for name in NAMES}
    assert found == pytest.approx(expected, abs=1e-6)


def test_js_is_symmetric_and_at_most_ln_2() -> None:
    p, q = pair(50, 3)
    js = get_distance("js")
    torch.testing.assert_close(js(p, q), js(q, p))
    ends = js(torch.eye(2), torch.eye(2).flip(0))
    torch.testing.assert_close(ends, torch.full((2,), math.log(2)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: Any) -> None:
    p, q = pair(3, 4)
    assert torch.autograd.gradcheck(get_distance(name), (p.requires_grad_(), q.requires_grad_()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_certain_predictions_keep_value_and_gradient_finite(name: Any, dtype: torch.dtype) -> None:
    p = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype, requires_grad=True)
    q = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    found = get_distance(name)(p, q)
    (gradient,) = torch.autograd.grad(found.sum(), p)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


def test_a_callable_is_taken_as_it_is() -> None:
    def own(p: Tensor, q: Tensor) -> Tensor:
        return p[:, 0]

    assert get_distance(own) is own


def test_an_unknown_name_is_told_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"Unknown distance 'l3'. Did you mean 'l2' or 'l1'"):
        get_distance("l3")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_probabilities_still_count_as_classes(dtype: torch.dtype) -> None:
    y0 = predictions(50, 1000).to(dtype)
    assert confident(y0, 0.9).sum().item() == int((y0.amax(1) > 0.9).sum())


# Padding


LENGTHS = [5, 2, 3, 1]
VALID = torch.arange(5) < torch.tensor(LENGTHS)[:, None]


def crops(values: Tensor) -> list[Tensor]:
    return [row[None, :, :length] for row, length in zip(values, LENGTHS, strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_distances_of_padded_series_are_those_of_cropped_ones(name: Any) -> None:
    p, q = pair(4, 2, 5)
    p, q = p.softmax(1), q.softmax(1)
    found = measured(name, p, q, VALID)
    cut = zip(crops(p), crops(q), strict=True)
    expected = torch.cat([distance(name, a, b) for a, b in cut])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    maps = measured(name, p[..., None], q[..., None], VALID[..., None])
    torch.testing.assert_close(maps, found)


def test_filters_and_terms_of_padded_series_are_those_of_cropped_ones() -> None:
    p, q = (each.softmax(1) for each in pair(4, 2, 5))
    sure = [a.amax(1).mean().item() for a in crops(p)]
    cut = zip(crops(p), crops(q), strict=True)
    same = [(a.argmax(1) == b.argmax(1)).double().mean().item() for a, b in cut]
    for limit in (0.1, 0.3, 0.5, 0.52, 0.55, 0.6, 0.7):
        assert confident(p, limit, VALID).tolist() == [value > limit for value in sure]
        assert agreeing(p, q, limit, VALID).tolist() == [value > limit for value in same]
    entropies = torch.cat([-(a * a.log()).sum(1).mean(1) for a in crops(p)])
    torch.testing.assert_close(sharpen_term(p, 2.0, VALID), 2 * entropies)
    mean = torch.cat([a[0] for a in crops(p)], dim=1).mean(1)
    torch.testing.assert_close(balance_term(p, 2.0, VALID), 2 * (mean * mean.log()).sum())


def test_a_distance_of_ones_own_is_shown_equal_predictions_where_there_is_padding() -> None:
    p, q = pair(4, 2, 5)
    seen: list[Tensor] = []

    def own(a: Tensor, b: Tensor) -> Tensor:
        seen.append(a - b)
        return (a - b).abs().amax((1, 2))

    expected = torch.cat(
        [(a - b).abs().amax((1, 2)) for a, b in zip(crops(p), crops(q), strict=True)]
    )
    assert torch.equal(measured(own, p, q, VALID), expected)
    assert not seen[0].movedim(1, 2)[~VALID].any()
    assert torch.equal(measured(own, p, q), own(p, q))


def test_a_sample_of_padding_alone_measures_nothing() -> None:
    p, q = pair(4, 2, 5)
    none = torch.zeros_like(VALID)
    assert measured("l2", p, q, none).tolist() == [0.0] * 4
    assert confident(p.softmax(1), 0.1, none).tolist() == [False] * 4
