"""The image shifts: seeded, in range, stronger with severity, silent towards the global RNG."""

import math

import pytest
import torch
from torch import Tensor

from it3_lightning.data import SHIFTS, TUNING_SHIFTS, Shift

ALL = SHIFTS + TUNING_SHIFTS
RANDOM = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "rotation",
    "fog",
    "speckle_noise",
    "uniform_noise",
    "motion_blur",
    "shear",
    "occlusion",
}


def smooth_images(count: int = 32, channels: int = 1, size: int = 28) -> Tensor:
    """Bright blobs on black, as clothes and digits are."""
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(count, channels, 5, 5, generator=generator) * 2 - 0.6
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return images.clamp(0, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_nine_shifts_evaluate_and_seven_others_tune() -> None:
    assert SHIFTS == (
        "gaussian_noise",
        "shot_noise",
        "impulse_noise",
        "blur",
        "contrast",
        "brightness",
        "pixelation",
        "rotation",
        "fog",
    )
    assert len(TUNING_SHIFTS) == 7
    assert set(SHIFTS).isdisjoint(TUNING_SHIFTS)


@pytest.mark.parametrize("name", ALL)
def test_same_generator_seed_gives_bitwise_same_images(name: str) -> None:
    images = smooth_images()
    first = Shift(name, 3)(images, seeded(5))
    assert torch.equal(first, Shift(name, 3)(images, seeded(5)))
    assert torch.equal(first, Shift(name, 3)(images, seeded(6))) == (name not in RANDOM)


@pytest.mark.parametrize("name", ALL)
def test_no_generator_repeats_and_leaves_the_global_state(name: str) -> None:
    images = smooth_images()
    before = torch.get_rng_state()
    first = Shift(name, 3)(images)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(Shift(name, 3)(images), first)


@pytest.mark.parametrize("name", ALL)
def test_given_generator_leaves_the_global_state(name: str) -> None:
    before = torch.get_rng_state()
    Shift(name, 3)(smooth_images(), seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("size", [8, 28, 56])
@pytest.mark.parametrize("name", ALL)
def test_distance_to_clean_grows_with_severity(name: str, size: int) -> None:
    images = smooth_images(size=size)
    distances = [
        (Shift(name, severity)(images, seeded()) - images).abs().mean().item()
        for severity in range(1, 6)
    ]
    assert distances[0] > 0
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("name", ALL)
def test_result_is_a_new_tensor_in_range_and_input_stays(name: str) -> None:
    images = smooth_images(channels=3)
    copy = images.clone()
    shifted = Shift(name, 5)(images, seeded())
    assert shifted.shape == images.shape
    assert shifted.dtype == torch.float32
    assert shifted.min() >= 0
    assert shifted.max() <= 1
    assert shifted.data_ptr() != images.data_ptr()
    assert torch.equal(images, copy)


@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 4, 5, 9), (1, 3, 224, 160), (0, 1, 8, 8)])
@pytest.mark.parametrize("name", ALL)
def test_any_size_and_number_of_channels_keeps_its_shape(name: str, shape: tuple[int, ...]) -> None:
    shifted = Shift(name, 5)(torch.rand(shape, generator=seeded()), seeded())
    assert shifted.shape == shape
    assert bool(shifted.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_double_images_give_the_float_result_as_double(name: str) -> None:
    images = smooth_images(4)
    shifted = Shift(name, 3)(images.double(), seeded())
    assert shifted.dtype == torch.float64
    assert torch.equal(shifted.float(), Shift(name, 3)(images, seeded()))


def test_gaussian_noise_has_the_standard_deviation_of_its_level() -> None:
    images = torch.full((50, 1, 28, 28), 0.5)
    noise = Shift("gaussian_noise", 2)(images, seeded()) - images
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert noise.mean().item() == pytest.approx(0.0, abs=0.002)


def test_shot_noise_has_the_variance_of_counted_photons() -> None:
    images = torch.full((50, 1, 28, 28), 0.3)
    shift = Shift("shot_noise", 1)
    variance = shift(images, seeded()).var().item()
    assert variance == pytest.approx(0.3 * shift.level, rel=0.03)


def test_impulse_noise_sets_its_share_half_black_half_white() -> None:
    images = torch.full((50, 1, 28, 28), 0.5)
    shift = Shift("impulse_noise", 4)
    shifted = shift(images, seeded())
    assert (shifted == 0).float().mean().item() == pytest.approx(shift.level / 2, rel=0.05)
    assert (shifted == 1).float().mean().item() == pytest.approx(shift.level / 2, rel=0.05)


def test_contrast_and_brightness_follow_their_formulas() -> None:
    images = smooth_images(4)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    assert torch.allclose(Shift("contrast", 3)(images), mean + 0.6 * (images - mean), atol=1e-6)
    assert torch.allclose(Shift("brightness", 3)(images), (images + 0.12).clamp(max=1))


def test_blur_spreads_a_point_by_its_sigma_at_every_size() -> None:
    for size in (28, 56):
        image = torch.zeros(1, 1, size, size)
        image[0, 0, size // 2, size // 2] = 1
        profile = Shift("blur", 3)(image)[0, 0].sum(dim=0)
        place = torch.arange(size) - size // 2
        sigma = math.sqrt((profile * place**2).sum().item())
        assert sigma == pytest.approx(1.25 * size / 28, rel=0.03)


def test_pixelation_averages_over_whole_blocks() -> None:
    images = torch.rand(2, 1, 24, 24, generator=seeded())
    shifted = Shift("pixelation", 3)(images)
    assert torch.allclose(shifted.mean(dim=(2, 3)), images.mean(dim=(2, 3)), atol=1e-5)
    exact = Shift("pixelation", 3)(images[..., :8, :8])  # 8 pixels in 5 blocks
    edges = torch.linspace(0, 8, 6)
    first = images[..., 0, 0] + 0.6 * (images[..., 0, 1] + images[..., 1, 0])
    corner = (first + 0.36 * images[..., 1, 1]) / edges[1] ** 2
    assert torch.allclose(exact[..., 0, 0], corner, atol=1e-6)


def test_rotation_turns_images_both_ways() -> None:
    image = torch.zeros(1, 1, 29, 29)
    image[0, 0, 14, 24] = 1  # 10 pixels right of the centre
    turned = Shift("rotation", 3)(image.expand(64, 1, 29, 29), seeded())
    rows = turned[:, 0].sum(dim=2).argmax(dim=1) - 14
    assert sorted(set(rows.tolist())) == [-5, 5]  # 10 sin(30 degrees)
    assert 20 <= int((rows > 0).sum()) <= 44


def test_fog_only_brightens_and_differs_between_images() -> None:
    images = torch.zeros(2, 1, 28, 28)
    shift = Shift("fog", 5)
    veil = shift(images, seeded())
    assert veil.max() <= shift.level
    assert not torch.equal(veil[0], veil[1])
    steps = (veil[..., 1:] - veil[..., :-1]).abs().max()
    assert steps < 0.3 * shift.level  # smooth: 28 pixels over 4 random knots


def test_occlusion_greys_one_square_of_its_side() -> None:
    images = torch.zeros(16, 1, 28, 28)
    grey = Shift("occlusion", 3)(images, seeded()) == 0.5
    assert grey.sum(dim=(1, 2, 3)).tolist() == [14 * 14] * 16
    assert len({tuple(mask.nonzero()[0].tolist()) for mask in grey[:, 0]}) > 1


def test_unknown_name_error_names_the_closest_and_all_names() -> None:
    with pytest.raises(ValueError, match="Did you mean 'gaussian_noise'") as caught:
        Shift("gausian_noise", 3)
    assert all(name in str(caught.value) for name in ALL)


@pytest.mark.parametrize("severity", [0, 6, 2.5, True, "3", None])
def test_severity_outside_one_to_five_is_refused(severity: object) -> None:
    with pytest.raises(ValueError, match="Expected severity to be one of 1, 2, 3, 4, 5, got"):
        Shift("fog", severity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(4, 28, 28), r"\(B, C, H, W\) in \[0, 1\], got \(4, 28, 28\)"),
        (torch.zeros(4, 1, 8, 8, dtype=torch.uint8), r"got .* of torch\.uint8"),
        (torch.full((1, 1, 8, 8), 255.0), "got 255 to 255"),
        (torch.full((1, 1, 8, 8), float("nan")), "got nan to nan"),
    ],
)
def test_images_of_another_shape_dtype_or_range_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Shift("blur", 3)(images)
