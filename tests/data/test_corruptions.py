"""Corruptions made in memory: the package's own results, seeded, with nothing left behind."""

import sys
from typing import Any

import imagecorruptions
import numpy as np
import pytest
import torch
from helpers.trees import pixels
from torch import Tensor

from it3_lightning.data import (
    ALEXNET_ERRORS,
    CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    Corruption,
    mean_corruption_error,
)

ALL = CORRUPTIONS + EXTRA_CORRUPTIONS
STILL = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}
STILL |= {"gaussian_blur", "saturate"}


def images(count: int = 3, size: int = 40) -> Tensor:
    return torch.from_numpy(pixels(count, size, 2)).permute(0, 3, 1, 2).float() / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return [int(word) for word in state[1]]


def test_fifteen_corruptions_evaluate_and_four_others_tune() -> None:
    assert list(CORRUPTIONS) == imagecorruptions.get_corruption_names("common")
    assert list(EXTRA_CORRUPTIONS) == imagecorruptions.get_corruption_names("validation")


@pytest.mark.parametrize("name", ALL)
def test_the_generator_alone_decides_a_corruption(name: str) -> None:
    first = Corruption(name, 4)(images(), seeded(5))
    np.random.seed(1)
    assert torch.equal(first, Corruption(name, 4)(images(), seeded(5)))
    assert torch.equal(first, Corruption(name, 4)(images(), seeded(6))) == (name in STILL)
    assert first.shape == (3, 3, 40, 40)
    assert torch.equal(first, (first * 255).round() / 255)
    assert 0 <= first.min() <= first.max() <= 1


@pytest.mark.parametrize("name", sorted(STILL))
def test_a_corruption_is_what_the_package_makes(name: str) -> None:
    source = pixels(3, 40, 2)
    made = Corruption(name, 2)(images())
    for image, expected in zip(made, source, strict=True):
        reference = imagecorruptions.corrupt(expected, severity=2, corruption_name=name)
        assert torch.equal((image * 255).round(), torch.from_numpy(reference.copy()).movedim(-1, 0))


def test_noise_is_as_strong_as_published() -> None:
    grey = torch.full((4, 3, 64, 64), 0.5)
    for severity, deviation in enumerate((0.08, 0.12, 0.18, 0.26, 0.38), start=1):
        noisy = Corruption("gaussian_noise", severity)(grey)
        clipped = torch.normal(0.5, deviation, (100_000,), generator=seeded(0)).clamp(0, 1)
        assert noisy.std().item() == pytest.approx(clipped.std().item(), rel=0.02)


def test_images_of_a_batch_get_draws_of_their_own() -> None:
    same = images(1).expand(2, -1, -1, -1)
    first, second = Corruption("impulse_noise", 3)(same)
    assert not torch.equal(first, second)


def test_the_global_states_and_the_images_stay_as_they_are() -> None:
    source = images()
    before, torch_before = numpy_state(), torch.get_rng_state()
    kept = source.clone()
    for name in ("gaussian_noise", "frost", "elastic_transform"):
        Corruption(name, 5)(source)
    assert numpy_state() == before
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert torch.equal(source, kept)


@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 1, 40, 40), (1, 3, 31, 40)])
def test_images_that_are_grey_small_or_alone_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) of at least 32 pixels"):
        Corruption("fog", 1)(torch.zeros(shape))


def test_unknown_names_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Unknown corruption 'frst'. Did you mean 'frost'"):
        Corruption("frst", 1)
    with pytest.raises(ValueError, match="one of 1, 2, 3, 4, 5, got 0"):
        Corruption("frost", 0)


def test_without_the_package_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    with pytest.raises(ImportError, match=r"pip install 'it3_lightning\[vision\]'"):
        Corruption("fog", 1)(images())


class NoDisplay:
    """Fails as OpenCV does on a server without a display."""

    def find_spec(self, name: str, *_: object) -> None:
        if name == "imagecorruptions":
            raise ImportError("libGL.so.1: cannot open shared object file")


def test_without_a_display_the_error_names_the_package_for_servers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "imagecorruptions")
    monkeypatch.setattr(sys, "meta_path", [NoDisplay(), *sys.meta_path])
    with pytest.raises(ImportError, match=r"libGL.*and then: pip install opencv-python-headless"):
        Corruption("fog", 1)(images())


# --- the mean corruption error


def test_the_baseline_itself_has_100_and_half_its_errors_50() -> None:
    assert mean_corruption_error(ALEXNET_ERRORS) == pytest.approx(100)
    halves = {name: error / 2 for name, error in sorted(ALEXNET_ERRORS.items())}
    assert mean_corruption_error(halves) == pytest.approx(50)


def test_the_baseline_is_that_of_the_papers_table() -> None:
    table = "88.6 89.4 92.3 82.0 82.6 78.6 79.8 86.7 82.7 81.9 56.5 85.3 64.6 71.8 60.7"
    assert list(ALEXNET_ERRORS) == list(CORRUPTIONS)
    assert [f"{error + 1e-9:.1f}" for error in ALEXNET_ERRORS.values()] == table.split()


def test_errors_of_other_corruptions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected errors of gaussian_noise, .* those of fog"):
        mean_corruption_error({"fog": 3.0})
