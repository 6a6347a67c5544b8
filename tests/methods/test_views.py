"""Views of images: what they keep, what they refuse, and by which numbers they are drawn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from it3_lightning.methods.views import View, crop_and_flip, drawn_by, jitter_and_warp


def pictures(channels: int = 3) -> Tensor:
    return torch.rand(4, channels, 16, 20, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("view", [crop_and_flip, jitter_and_warp])
@pytest.mark.parametrize("leaf", [torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3), "mode"])
def test_views_change_images_and_leave_what_are_none(view: View, leaf: Any) -> None:
    images = pictures()
    before = images.clone()
    found, same = view([images, leaf])
    assert same is leaf
    assert (found.shape, found.dtype) == (images.shape, images.dtype)
    assert not torch.equal(found, images)
    assert torch.equal(images, before)


def test_a_cropped_view_is_the_images_moved_by_an_eighth_at_most_and_perhaps_mirrored() -> None:
    image = torch.arange(1.0, 257).view(1, 1, 16, 16)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    places = [padded[..., i : i + 16, j : j + 16] for i in range(5) for j in range(5)]
    for _ in range(20):
        found = crop_and_flip(image)
        assert any(torch.equal(found, p) or torch.equal(found, p.flip(3)) for p in places)


@pytest.mark.parametrize("channels", [1, 3])
def test_warped_views_stay_images_and_near_to_what_they_show(channels: int) -> None:
    images = 0.25 + 0.5 * (torch.arange(20) >= 10).expand(4, channels, 16, 20).float()
    for _ in range(10):
        found = jitter_and_warp(images)
        assert 0 <= found.min() <= found.max() <= 1
        left, right = sorted([found[..., :6].mean().item(), found[..., -6:].mean().item()])
        assert right - left > 0.1
        assert found.std((0,)).max() < 0.05  # all images of a batch alike, but for the noise


@pytest.mark.parametrize("images", [pictures() - 0.5, pictures() + 0.5])
def test_warped_views_of_normalised_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images in \[0, 1\], got values in \["):
        jitter_and_warp(images)


def test_what_is_drawn_depends_on_seed_and_step_alone_and_the_generator_comes_back() -> None:
    def drawn(seed: int, step: int) -> Tensor:
        torch.manual_seed(7)
        with drawn_by(seed, step, [pictures(), "mode"]):
            found = torch.rand(3)
        after = torch.rand(3)
        torch.manual_seed(7)
        assert torch.equal(after, torch.rand(3))
        torch.manual_seed(8)
        with drawn_by(seed, step):
            assert torch.equal(found, torch.rand(3))
        return found

    places = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0), (2**40, 3)]
    assert len({tuple(drawn(*place).tolist()) for place in places}) == len(places)
