"""Pictures of samples: the label, what the source and what the adapted row make of it."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.benchmark_runs import benchmark, digits, make_model
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from it3_lightning import ClassPrior, LabelsPrior, MaskPrior, ValuePrior
from it3_lightning.benchmark import Results
from it3_lightning.benchmark.page import page
from it3_lightning.benchmark.pictures import (
    Shown,
    as_figures,
    as_plain,
    from_plain,
    shown_of,
    shown_shifts,
)


def pixels(address: str) -> NDArray[np.uint8]:
    data = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def addresses(text: str) -> list[str]:
    return re.findall(r"data:image/png;base64,[^']+", text)


def some(prior: Any, inputs: Any, outputs: Tensor, target: Tensor) -> Shown:
    found = shown_of(prior, inputs, outputs, target)
    assert found is not None
    return found


def test_classes_are_shown_with_both_predictions() -> None:
    images = torch.rand(11, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.arange(11) % 3
    source = some(ClassPrior(3), images, torch.eye(3)[target] * 9, target)
    rows = [0, 2, 4, 6, 8, 10]
    assert source.target.tolist() == source.found.tolist() == target[rows].tolist()
    adapted = replace(source, found=(source.target + 1) % 3, images=None)
    text = as_figures(source, adapted, source.images, "0")
    shown = [pixels(each)[..., 0] for each in addresses(text)]
    assert np.array_equal(shown, (images[rows, 0] * 255).round().numpy())
    assert [int(n) for n in re.findall(r"label (\d)", text)] == target[rows].tolist()
    assert re.findall(r"class=(\w+)>(\w+) (\d)", text)[:2] == [
        ("right", "source", "0"),
        ("wrong", "adapted", "1"),
    ]


def test_large_images_are_made_small_and_others_than_in_0_to_1_are_stretched() -> None:
    images = torch.linspace(-2, 2, 200).expand(2, 3, 100, 200)
    found = some(ClassPrior(2), images, torch.eye(2), torch.tensor([0, 1])).images
    assert found is not None
    assert found.shape == (2, 3, 32, 64)
    assert found[0, 0, 0].tolist() == sorted(found[0, 0, 0].tolist())
    assert found.min() <= 2
    assert found.max() >= 253


def test_masks_lie_over_the_image_once_for_each_prediction() -> None:
    image, mask = torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    source = some(MaskPrior(), image, 20 * (1 - mask) - 10, mask)
    adapted = some(MaskPrior(), image, 20 * mask - 10, mask)
    own, *over = addresses(as_figures(source, adapted, source.images, "0"))
    assert np.array_equal(pixels(own)[..., :3], np.full((8, 8, 3), 128))
    label, wrong, right = (pixels(each)[..., 3] > 0 for each in over)
    assert np.array_equal(label, mask[0, 0].numpy() > 0)
    assert np.array_equal(wrong, ~label)
    assert np.array_equal(right, label)


def test_values_are_dots_of_predicted_against_true() -> None:
    target = torch.tensor([[0.0], [10.0], [float("nan")]])
    source = some(ValuePrior(1), torch.zeros(3, 2), torch.tensor([[10.0], [0.0], [1.0]]), target)
    adapted = some(ValuePrior(1), torch.zeros(3, 2), torch.tensor([[0.0], [10.0], [1.0]]), target)
    text = as_figures(source, adapted, None, "0")
    dots = re.findall(r"cx='([\d.]+)' cy='([\d.]+)' r='2' fill='(#\w+)'", text)
    grey, blue = (
        [(float(x), float(y)) for x, y, colour in dots if colour == own]
        for own in ("#777777", "#0072B2")
    )
    assert grey == [(30, 10), (180, 160)]
    assert blue == [(30, 160), (180, 10)]


def test_nothing_is_kept_of_what_no_page_can_show() -> None:
    rows, image = torch.zeros(2, 3), torch.zeros(2, 1, 4, 4)
    assert shown_of(ClassPrior(2), rows, torch.eye(2), torch.tensor([0, 1])) is None
    assert shown_of(LabelsPrior(2), image, torch.eye(2), torch.eye(2)) is None
    assert (
        shown_of(ClassPrior(2), image.expand(2, 5, 4, 4), torch.eye(2), torch.tensor([0, 1]))
        is None
    )


def test_what_is_kept_comes_back_and_damage_is_named() -> None:
    given = Shown("class", torch.tensor([1]), torch.tensor([2]), torch.zeros(1, 1, 2, 2).byte())
    saved = as_plain({"fog": given})
    assert vars(from_plain(saved)["fog"]) == vars(given)
    saved["fog"]["found"] = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="as many labels, predictions and images"):
        from_plain(saved)


def test_few_shifts_are_shown() -> None:
    assert shown_shifts(["clean", "a", "b"]) == ["clean", "a", "b"]
    assert len(shown_shifts(["clean", *map(str, range(90))])) == 5


def test_a_benchmark_shows_its_samples_and_keeps_them(
    with_distances: tuple[Path, Results],
) -> None:
    folder, results = with_distances
    assert {(stream, seed) for _, _, stream, seed, _ in results.shown} == {("equal", 0)}
    data = digits()
    states = torch.load(folder / "models" / "seed_0.ckpt", weights_only=True)["states"]
    model = make_model()
    model.load_state_dict(states["joint"])
    rows = [0, 20, 40, 59, 79, 99]
    for shift, loader in zip(data.test_names, data.test_dataloader(), strict=True):
        images, labels = next(iter(loader))
        own = results.shown["joint", "source", "equal", 0, shift]
        assert own.target.tolist() == labels[rows].tolist()
        with torch.no_grad():
            assert own.found.tolist() == model.eval()(images)[rows].argmax(1).tolist()
        assert own.images is not None
        assert torch.equal(own.images, (images[rows] * 255).round().byte())
        assert results.shown["joint", "batch statistics", "equal", 0, shift].images is None
    shown = page(results)
    assert len(addresses(shown)) == 12
    assert len(shown) < 1_000_000
    again = benchmark(folder, distance_samples=60).run(make_model, digits())  # from its files
    assert addresses(page(again)) == addresses(shown)
    assert again.shown.keys() == results.shown.keys()
