"""Random noise on inputs: its size, its bounds, what it leaves alone."""

from typing import Any

import pytest
import torch

from it3_lightning.training.dual_pass import RandomNoise


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
    [({"size": -1.0}, "size >= 0, got -1.0"), ({"low": 2.0, "high": 1.0}, "low <= high, got 2.0")],
)
def test_settings_that_make_no_sense_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomNoise(**args)
