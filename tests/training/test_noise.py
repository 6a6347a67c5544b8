"""Input noise: its size, in units of the inputs or of their spread, and what warns of it."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.by_hand import X, Y, one
from helpers.toy import doubles, net, quiet
from torch import Tensor

from it3_lightning import DualPass, RandomNoise


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with doubles():
        yield


def test_noise_has_one_random_size_a_sample() -> None:
    torch.manual_seed(0)
    noise = RandomNoise(2.0)(torch.zeros(2000, 1, 8, 8))
    sizes = noise.flatten(1).std(1)
    assert sizes.max().item() < 2.0 * 1.4
    assert sizes.mean().item() == pytest.approx(1.0, abs=0.05)  # of U(0, 2)
    assert noise.square().mean().item() == pytest.approx(4 / 3, abs=0.08)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.02)


def test_values_are_clamped_where_asked() -> None:
    torch.manual_seed(0)
    x = torch.rand(50, 20)
    assert RandomNoise(5.0, low=0.0)(x).min().item() == 0.0
    assert RandomNoise(5.0, low=0.0)(x).max().item() > 1.0
    assert RandomNoise(5.0, high=1.0)(x).max().item() == 1.0


def test_only_floating_tensors_are_noisy_and_the_given_ones_stay() -> None:
    torch.manual_seed(0)
    x, tokens, scale = torch.zeros(3, 2), torch.arange(3), torch.tensor(1.0)
    noisy: dict[str, Any] = RandomNoise()({"x": [x, tokens], "scale": scale, "name": "a"})
    assert (noisy["x"][0] != 0).all()
    assert noisy["x"][1] is tokens
    assert noisy["scale"] is scale
    assert noisy["name"] == "a"
    assert not x.any()


def test_no_noise_is_the_input_and_seeds_repeat() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(RandomNoise(0.0)(x), x)
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(RandomNoise()(x))
    assert torch.equal(*draws)
    assert draws[0].dtype == torch.float64


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"size": -1.0}, "size >= 0, got -1.0"),
        ({"low": 2.0, "high": 1.0}, "low <= high, got 2.0"),
        ({"scale": "spreads"}, "Unknown scale 'spreads'. Did you mean 'spread'"),
    ],
)
def test_noise_refuses_settings_that_make_no_sense(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomNoise(**args)


# In units of the spread of the inputs


def by_hand(x: Tensor, spread: Tensor) -> Tensor:
    """Return what half a deviation of noise, at most, makes of rows."""
    torch.manual_seed(3)
    sizes = 0.5 * torch.rand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
    return x + sizes * spread * torch.randn_like(x)


def noisy(noise: RandomNoise, x: Any) -> Any:
    torch.manual_seed(3)
    return noise(x)


def test_each_channel_has_noise_in_units_of_its_own_spread() -> None:
    rows = torch.randn(50, 3) * torch.tensor([0.01, 1.0, 300.0]) + 7
    rows[:, 1] = 5.0  # never another: no noise
    spread = rows.std(0, correction=0)
    found = noisy(RandomNoise(0.5, scale="spread"), rows)
    torch.testing.assert_close(found, by_hand(rows, spread), rtol=1e-5, atol=1e-6)
    assert torch.equal(found[:, 1], rows[:, 1])
    images = torch.randn(6, 2, 4, 4) * torch.tensor([1.0, 40.0])[:, None, None]
    spread = images.std((0, 2, 3), correction=0)[:, None, None]
    found = noisy(RandomNoise(0.5, scale="spread"), images)
    torch.testing.assert_close(found, by_hand(images, spread), rtol=1e-5, atol=1e-6)
    series = torch.randn(6, 9, 2) * torch.tensor([1.0, 40.0])
    spread = series.std((0, 1), correction=0)
    found = noisy(RandomNoise(0.5, scale="spread", dim=-1), series)
    torch.testing.assert_close(found, by_hand(series, spread), rtol=1e-5, atol=1e-6)


def test_the_spread_is_that_of_all_training_batches_so_far() -> None:
    noise = RandomNoise(0.5, scale="spread")
    first, second, third = 4 * torch.randn(3, 20, 2) + torch.tensor([0.0, 9.0, -9.0])[:, None, None]
    noise(first)
    with torch.no_grad():  # a validation uses what is known, and adds nothing
        found = noisy(noise, third)
    spread = first.std(0, correction=0)
    torch.testing.assert_close(found, by_hand(third, spread), rtol=1e-5, atol=1e-6)
    spread = torch.cat([first, second]).std(0, correction=0)
    found = noisy(noise, second)
    torch.testing.assert_close(found, by_hand(second, spread), rtol=1e-5, atol=1e-6)


def test_tensors_beside_each_other_have_a_spread_each_and_bad_values_none() -> None:
    a, b = torch.randn(30, 2), 50 * torch.randn(30)
    bad = a.clone()
    bad[0, 0] = torch.nan
    torch.manual_seed(3)
    found = RandomNoise(0.5, scale="spread")({"a": bad, "b": b})
    torch.manual_seed(3)
    for x, name, rows in ((bad, "a", a[1:]), (b, "b", b)):
        spread = rows.std(0, correction=0)
        if name == "a":
            spread[1] = a[:, 1].std(correction=0)
        sizes = 0.5 * torch.rand(30).reshape(-1, *[1] * (x.ndim - 1))
        expected = x + sizes * spread * torch.randn_like(x)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6, equal_nan=True)


# A size that does not fit the inputs


def fitted(factor: float, noise: RandomNoise) -> list[str]:
    """Return what fitting on inputs times a factor warns of."""
    model = net(dual_pass=DualPass(perturb_inputs=noise))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet(max_epochs=2).fit(model, one((factor * X, Y)))
    return [str(w.message) for w in caught if "perturbed" in str(w.message)]


def test_a_size_far_from_the_spread_is_warned_of_once_with_both_numbers() -> None:
    (text,) = fitted(255.0, RandomNoise())
    spread = (255 * X).movedim(1, 0).flatten(1).std(1, correction=0).median()
    assert "size=0.2 is in units of the inputs" in text
    assert f"standard deviation of {spread:.3g}" in text
    assert f"largest noise is {0.2 / spread:.2g} of it" in text
    assert 'RandomNoise(0.2, scale="spread")' in text
    (text,) = fitted(0.01, RandomNoise(0.3, dim=-1))
    assert 'RandomNoise(0.3, scale="spread", dim=-1)' in text
    assert fitted(1.0, RandomNoise()) == []
    assert fitted(255.0, RandomNoise(0.0)) == []
    assert fitted(255.0, RandomNoise(scale="spread")) == []
    assert fitted(255.0, RandomNoise(scale="inputs")) == []


def test_fitting_perturbs_by_the_spread_and_checkpoints_say_so() -> None:
    noise = RandomNoise(0.2, scale="spread", dim=-1)
    kept = DualPass.of(DualPass(perturb_inputs=noise).init_args(), post_hoc=False)
    assert isinstance(kept.perturb_inputs, RandomNoise)
    assert kept.perturb_inputs.init_args() == noise.init_args()
    assert noise.init_args() == {
        "size": 0.2,
        "low": None,
        "high": None,
        "scale": "spread",
        "dim": -1,
    }
