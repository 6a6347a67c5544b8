"""Sample pictures: what is kept of a few samples as they are tested, and how a page shows them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from it3_lightning.priors import ClassPrior, MaskPrior, Prior, ValuePrior
from it3_lightning.priors.classes import both

What = Literal["class", "mask", "value"]
STYLE = """
.samples { display: flex; flex-wrap: wrap; gap: .6rem 1rem; margin: .4rem 0 1rem; }
.samples figure { margin: 0; font-size: .8rem; line-height: 1.35; }
.samples :is(img, svg.mask) { height: 72px; display: block; image-rendering: pixelated; }
.samples .masks { display: flex; gap: 2px; } .samples figcaption { margin-top: .15rem; }
.right { color: #00785a; } .wrong { color: #c04a00; }
@media (prefers-color-scheme: dark) { .right { color: #3ddba8; } .wrong { color: #ff9b5e; } }
.samples .scatter { width: 230px; max-width: 100%; background: #fff; fill: #222; }
.scatter { font: 9px system-ui, sans-serif; }
"""
_SHIFTS = 5  # of which samples are kept, the clean ones among them
_SAMPLES: dict[What, int] = {"class": 6, "mask": 4, "value": 64}  # of each
_SIDE = 64  # pixels of a picture, at most
_GREY, _BLUE, _ORANGE = "#777777", "#0072B2", (213, 94, 0)


@dataclass(frozen=True)
class Shown:
    """What is kept of a few samples ``(K,)`` under a shift.

    Args:
        what: classes ``(K,)``, maps of classes ``(K, H, W)``, or values ``(K,)``.
        target: the label.
        found: the prediction.
        images: uint8 ``(K, C, H, W)`` of one or three channels; ``None``: they are none, or are
            kept of another row.
    """

    what: What
    target: Tensor
    found: Tensor
    images: Tensor | None = None


def shown_shifts(names: Sequence[str]) -> list[str]:
    """Return the shifts of which samples are shown: the first, and some of the others.

    >>> shown_shifts(["clean", *"abcdefgh"])
    ['clean', 'a', 'c', 'e', 'g']
    """
    others = names[1:]
    step = max(1, -(-len(others) // (_SHIFTS - 1)))
    return [*names[:1], *others[::step]]


def shown_of(prior: Prior, inputs: Any, outputs: Tensor, target: Any) -> Shown | None:
    """Return what is kept of a batch: a few samples, evenly spaced; ``None`` of other targets.

    Args:
        prior: knows what outputs and targets mean.
        inputs: of the network.
        outputs: of the network, ``(B, ...)``.
        target: of the batch.
    """
    found, true = prior.from_output(outputs.float()).detach(), prior.from_target(target)
    images = inputs if isinstance(inputs, Tensor) and _is_shown(inputs) else None
    if isinstance(prior, MaskPrior) and found.ndim == 4 and images is not None:
        if found.shape[1] == 1:
            found, true = both(found), both(true)
        rows = _some(len(found), "mask")
        maps = [_small(x[rows].argmax(1, keepdim=True).float(), "nearest") for x in (true, found)]
        label, most = (each[:, 0].byte().cpu() for each in maps)
        return Shown("mask", label, most, _pixels(images[rows]))
    if isinstance(prior, ClassPrior) and found.ndim == 2 and images is not None:
        rows = _some(len(found), "class")
        label, most = (x[rows].argmax(1).cpu() for x in (true, found))
        return Shown("class", label, most, _pixels(images[rows]))
    if isinstance(prior, ValuePrior) and isinstance(target, Tensor):
        if outputs.numel() != target.numel():
            return None
        rows = _some(len(outputs), "value")
        values = (x.detach().float().reshape(len(outputs), -1)[rows, 0] for x in (target, outputs))
        return Shown("value", *(x.cpu() for x in values))
    return None


def _is_shown(images: Tensor) -> bool:
    kind = images.is_floating_point() or images.dtype == torch.uint8
    return images.ndim == 4 and images.shape[1] in (1, 3) and kind


def _some(count: int, what: What) -> Tensor:
    most = min(count, _SAMPLES[what])
    return torch.linspace(0, count - 1, most).round().long()


def _small(maps: Tensor, mode: str) -> Tensor:
    """Return maps ``(K, C, H, W)`` whose sides are at most 64."""
    sides = maps.shape[-2:]
    scale = _SIDE / max(sides)
    size = [max(1, round(scale * side)) for side in sides]
    return maps if scale >= 1 else F.interpolate(maps, size=size, mode=mode)


def _pixels(images: Tensor) -> Tensor:
    """Return images as bytes; those beyond [0, 1] are stretched to it, each by itself."""
    values = images.detach().float().cpu() / (255 if images.dtype == torch.uint8 else 1)
    low, high = (f(dim=(1, 2, 3), keepdim=True) for f in (values.amin, values.amax))
    inside = (low >= 0) & (high <= 1)
    stretched = (values - low) / (high - low).clamp_min(1e-12)
    return (_small(torch.where(inside, values, stretched), "area") * 255).round().byte()


def as_figures(source: Shown, adapted: Shown, images: Tensor | None, key: str) -> str:
    """Return the samples of a shift as HTML.

    Args:
        source: labels, and predictions of the source.
        adapted: predictions of the same samples after adaptation.
        images: of these samples.
        key: that no other shift of the page has.
    """
    if source.what == "value":
        return f"<div class=samples>{_scatter(source, adapted)}</div>"
    if images is None:
        return ""
    draw = _classes if source.what == "class" else _masks
    return f"<div class=samples>{draw(source, adapted, images, key)}</div>"


def _classes(source: Shown, adapted: Shown, images: Tensor, key: str) -> str:
    drawn = ""
    for row, image in enumerate(images):
        label, *found = (int(each[row]) for each in (source.target, source.found, adapted.found))
        said = "".join(
            f"<br><span class={'right' if each == label else 'wrong'}>{name} {each} "
            f"{'✓' if each == label else '✗'}</span>"
            for name, each in zip(("source", "adapted"), found, strict=True)
        )
        drawn += (
            f"<figure><img alt='sample {row}' src='{_png(_as_image(image))}'>"
            f"<figcaption>label {label}{said}</figcaption></figure>"
        )
    return drawn


def _masks(source: Shown, adapted: Shown, images: Tensor, key: str) -> str:
    """Return each image three times, under its label and under both predictions."""
    drawn = ""
    for row, image in enumerate(images):
        height, width = image.shape[-2:]
        name, tiles = f"sample-{key}-{row}", ""
        size = f"width='{width}' height='{height}'"
        own = f"<image id='{name}' {size} href='{_png(_as_image(image))}'/>"
        for place, mask in enumerate((source.target, source.found, adapted.found)):
            over = f"<image {size} href='{_overlay(mask[row])}'/>"
            below = own if place == 0 else f"<use href='#{name}'/>"
            tiles += f"<svg class=mask viewBox='0 0 {width} {height}'>{below}{over}</svg>"
        drawn += (
            f"<figure><div class=masks>{tiles}</div>"
            "<figcaption>label, source, adapted</figcaption></figure>"
        )
    return drawn


def _overlay(mask: Tensor) -> str:
    """Return a map of classes as a picture that is seen through: class 0 is nothing."""
    colours = [(0, 0, 0), _ORANGE, (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0)]
    picture = Image.fromarray(((mask - 1) % 5 + 1).where(mask > 0, mask).byte().numpy(), mode="P")
    picture.putpalette([value for colour in colours for value in colour])
    return _png(picture, transparency=bytes([0, *[150] * (len(colours) - 1)]))


def _as_image(image: Tensor) -> Image.Image:
    values = image.numpy()
    return Image.fromarray(values[0] if len(values) == 1 else values.transpose(1, 2, 0))


def _png(picture: Image.Image, **options: Any) -> str:
    """Return a picture as an address that holds it."""
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True, **options)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _scatter(source: Shown, adapted: Shown) -> str:
    """Return predicted against true values, of the source and after adaptation."""
    values = torch.cat([source.target, source.found, adapted.found])
    known = values[values.isfinite()]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    width = (high - low) or 1.0

    def place(value: Tensor) -> float:
        return 150 * (float(value) - low) / width

    dots = "".join(
        f"<circle cx='{30 + place(x):.1f}' cy='{160 - place(y):.1f}' r='2' fill='{colour}' "
        "fill-opacity='.7'/>"
        for each, colour in ((source, _GREY), (adapted, _BLUE))
        for x, y in zip(each.target, each.found, strict=True)
        if bool(torch.stack([x, y]).isfinite().all())
    )
    ends = (
        f"<text x='30' y='172'>{low:.3g}</text>"
        f"<text x='180' y='172' text-anchor='end'>{high:.3g}</text>"
        f"<text x='27' y='160' text-anchor='end'>{low:.3g}</text>"
        f"<text x='27' y='17' text-anchor='end'>{high:.3g}</text>"
        "<text x='105' y='172' text-anchor='middle'>true</text>"
        "<text x='34' y='17'>predicted</text>"
    )
    names = (
        f"<circle cx='194' cy='20' r='3' fill='{_GREY}'/><text x='200' y='23'>source</text>"
        f"<circle cx='194' cy='34' r='3' fill='{_BLUE}'/><text x='200' y='37'>adapted</text>"
    )
    axes = "<path d='M30 160L180 10M30 10V160H180' stroke='#bbb' fill='none'/>"
    return f"<svg class=scatter viewBox='0 0 238 178'>{axes}{dots}{ends}{names}</svg>"


def as_plain(shown: Mapping[str, Shown]) -> dict[str, dict[str, Any]]:
    """Return what is kept by shift as plain data for a file."""
    return {name: dict(vars(each)) for name, each in shown.items()}


def from_plain(saved: Mapping[str, Mapping[str, Any]]) -> dict[str, Shown]:
    """Return what :func:`as_plain` was given.

    Raises:
        ValueError: it is damaged.
    """
    found = {name: Shown(**each) for name, each in saved.items()}
    for each in found.values():
        sizes = {
            len(each.target),
            len(each.found),
            len(each.target if each.images is None else each.images),
        }
        if each.what not in _SAMPLES or len(sizes) != 1:
            raise ValueError("Expected as many labels, predictions and images, got others.")
    return found


def titled(name: str, figures: str) -> str:
    """Return the samples of a shift under its name."""
    return f"<h3>{html.escape(name)}</h3>{figures}" if figures else ""
