"""Random views of training images: what they show, and that only the seed decides."""

from functools import partial

import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor

from it3_lightning.data import ImageSet
from it3_lightning.data.augmentation import Augmented, DrawSampler, crop_and_flip
from it3_lightning.data.loading import loader


def views(image: Tensor, padding: int) -> list[Tensor]:
    """All crops of a framed image `(C, H, W)` and their mirror images, by slicing."""
    channels, height, width = image.shape
    frame = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
    frame[:, padding : padding + height, padding : padding + width] = image
    places = range(2 * padding + 1)
    crops = [frame[:, y : y + height, x : x + width] for y in places for x in places]
    return [*crops, *(crop.flip(2) for crop in crops)]


def numbered(count: int = 12) -> ImageSet:
    images = torch.rand(count, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    images[:, 0] = torch.arange(count).view(-1, 1, 1) / 100 + 0.2
    return ImageSet(images, torch.arange(count))


def augmented(source: ImageSet) -> Augmented:
    return Augmented(source, partial(crop_and_flip, padding=2))


def epochs(workers: int, count: int = 2, batch_size: int = 5, seed: int = 0) -> list[Tensor]:
    batches = loader(
        augmented(numbered()),
        batch_size,
        generator=torch.Generator().manual_seed(seed),
        shuffle=True,
        num_workers=workers,
    )
    return [torch.cat([images for images, _ in batches]) for _ in range(count)]


def test_draws_reach_every_view_equally_often_and_no_other() -> None:
    image = torch.rand(1, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = views(image[0], 1)
    seen = crop_and_flip(image.expand(36, -1, -1, -1), torch.arange(36), padding=1)
    found = [[k for k, view in enumerate(expected) if torch.equal(view, one)] for one in seen]
    assert sorted(index for indices in found for index in indices) == sorted([*range(18)] * 2)


def test_a_view_depends_on_its_own_draw_alone() -> None:
    images = torch.rand(6, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    draws = torch.tensor([5, 17, 2**31 - 1, 0, 91, 17])
    together = crop_and_flip(images, draws)
    for index in range(6):
        alone = crop_and_flip(images[index : index + 1], draws[index : index + 1])
        assert torch.equal(together[index], alone[0])


def test_the_sampler_shuffles_every_sample_once_with_new_draws() -> None:
    sampler = DrawSampler(7, torch.Generator().manual_seed(0))
    first, second = list(sampler), list(sampler)
    assert len(sampler) == 7
    for codes in (first, second):
        assert sorted(code % 7 for code in codes) == list(range(7))
        assert all(0 <= code // 7 < 2**31 for code in codes)
    assert {code // 7 for code in first}.isdisjoint(code // 7 for code in second)


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_make_the_same_views(workers: int) -> None:
    here, there = epochs(0), epochs(workers)
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_views_are_new_in_every_epoch_and_repeat_with_the_seed() -> None:
    first, second = epochs(0)
    labels = [(epoch[:, 0].amax((1, 2)) * 100 - 20).round().int() for epoch in (first, second)]
    assert [sorted(found.tolist()) for found in labels] == [list(range(12))] * 2
    ordered = [epoch[found.argsort()] for epoch, found in zip((first, second), labels, strict=True)]
    assert (ordered[0] != ordered[1]).flatten(1).any(1).sum() >= 9  # of 12, 1 in 50 by chance
    assert torch.equal(epochs(0)[1], second)
    assert not torch.equal(epochs(0, seed=1)[0], first)


def test_processes_share_the_samples_of_an_epoch_and_their_draws() -> None:
    ranks = [
        DistributedSamplerWrapper(
            DrawSampler(12, torch.Generator().manual_seed(0)), num_replicas=2, rank=rank
        )
        for rank in (0, 1)
    ]
    for _ in range(2):
        first, second = (list(rank) for rank in ranks)
        assert sorted(code % 12 for code in [*first, *second]) == list(range(12))
    alone = DrawSampler(12, torch.Generator().manual_seed(0))
    _, epoch = list(alone), list(alone)
    assert sorted([*first, *second]) == sorted(epoch)


def test_a_plain_index_gives_the_label_of_its_sample() -> None:
    source = augmented(numbered())
    assert [int(source[index][1]) for index in (0, 11)] == [0, 11]
    assert source.__getitems__([3, 8])[1].tolist() == [3, 8]


def test_the_global_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    epochs(0)
    assert torch.equal(torch.get_rng_state(), before)
