"""Scores along a stream as curves: rows that carry weights, beside their unadapted row."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from it3_lightning.benchmark.results import Results
from it3_lightning.benchmark.rows import Row

Curve = tuple[NDArray[Any], NDArray[Any]]
"""Samples seen, and the score of the last ones."""
LEAST = 1000  # samples of a stream: below, a curve shows chance
_WINDOW, _SHARE, _STEPS, _POINTS = 500, 10, 5, 200
STYLE = """
.curves { display: grid; gap: .8rem 1.2rem; }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
.curves figure { margin: 0; max-width: 36rem; min-width: 0; }
.curves svg { width: 100%; height: auto; background: #fff; fill: #222; }
.curves svg { font: 11px system-ui, sans-serif; }
.curves figcaption { font-weight: 600; } .curves ul { list-style: none; margin: 0; padding: 0; }
.curves li { display: inline-block; margin-right: 1rem; font-size: .85rem; }
.curves li svg { width: 1.8rem; height: .7rem; margin-right: .35rem; vertical-align: middle; }
"""
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito
_DASHES = ("", "6 3", "2 2", "8 3 2 3")  # for more rows than colours
_UNADAPTED = "#222"
_SIZE = 360, 190  # pixels, of a panel
_EDGES: Mapping[str, int] = MappingProxyType({"left": 40, "right": 8, "top": 6, "bottom": 32})
_CAPTION = (
    "Rows that carry weights along the stream, and in black the unadapted row that they are "
    "compared with: the score of the last samples (a tenth of the stream, 500 at most), mean over "
    "seeds and shifts, each of which begins anew but in a continual or mixed stream. What rises or "
    "falls with the black line is the stream itself; what leaves it is what adaptation has come to."
)


@dataclass(frozen=True)
class Panel:
    """Curves of one training on one stream.

    Args:
        training: its name.
        still: the unadapted row.
        lines: curves by the name of the row, the unadapted one first.
    """

    training: str
    still: str
    lines: dict[str, Curve]


def carries(row: Row) -> bool:
    """Whether a row carries weights, or what its method has seen, from batch to batch."""
    settings = row.settings
    return settings is not None and not settings.episodic and settings.reset != "weights"


def running_mean(scores: NDArray[Any], window: int, step: int) -> Curve:
    """Return how many samples were seen, and the mean score of the last ``window`` of them.

    Args:
        scores: of the samples in their order, ``(N,)``, ``N >= window``.
        window: number of samples in each mean.
        step: from one mean to the next; the last one ends with the last sample.

    >>> running_mean(np.array([0.0, 1.0, 1.0, 0.0, 1.0]), 2, 2)
    (array([3, 5]), array([1. , 0.5]))
    """
    ends = np.arange(len(scores), window - 1, -step)[::-1]
    sums = np.concatenate([[0.0], np.cumsum(scores, dtype=np.float64)])
    return ends, (sums[ends] - sums[ends - window]) / window


def panels(results: Results, stream: str) -> list[Panel]:
    """Return what is drawn of a stream; nothing where no row carries weights, or it is too short.

    Scores are in the units of the results, means over seeds and over the shifts, which are cut to
    the shortest one; shifts of fewer than 1,000 samples are left out.
    """
    online = [row for row in results.rows if carries(row) and results.has(row, stream)]
    found: list[Panel] = []
    for row in online:
        still = results.baseline(row)
        pair = None if still is None else _pair(results, row, still, stream)
        if still is None or pair is None:
            continue
        same = [p for p in found if (p.training, p.still) == (row.training, still.name)]
        if not same:
            found.append(Panel(row.training, still.name, {still.name: pair[1]}))
        (same[0] if same else found[-1]).lines[row.name] = pair[0]
    return found


def _pair(results: Results, row: Row, still: Row, stream: str) -> tuple[Curve, Curve] | None:
    """Return the curves of a row and of its unadapted one, on the shifts that both have."""
    both = [_scores(results, each, stream) for each in (row, still)]
    shared = [key for key in both[0] if key in both[1] and len(both[0][key]) == len(both[1][key])]
    if not shared:
        return None
    size = min(len(both[0][key]) for key in shared)
    window = min(_WINDOW, size // _SHARE)
    step = max(window // _STEPS, size // _POINTS)
    mean, other = (
        running_mean(np.mean([own[key][:size] for key in shared], axis=0), window, step)
        for own in both
    )
    return mean, other


def _scores(results: Results, row: Row, stream: str) -> dict[tuple[int, str], NDArray[Any]]:
    """Return the scores of samples by seed and shift, of streams that are long enough.

    Where one is not finite, nor would be the mean of any window after it: they are left out.
    """
    found = {
        (seed, shift): (100 if results.percent else 1) * scores.astype(np.float64)
        for (*names, seed, shift), scores in results.samples.items()
        if names == [row.training, row.name, stream] and shift != "clean" and len(scores) >= LEAST
    }
    return {key: scores for key, scores in found.items() if np.isfinite(scores).all()}


def along_streams(results: Results) -> str:
    """Return the curves of all streams as HTML; nothing where there are none."""
    parts: list[str] = []
    for stream in results.streams:
        if found := panels(results, stream):
            low, high = _range(found)
            drawn = "".join(_figure(panel, low, high, results.decimals) for panel in found)
            title = html.escape(f"Stream {stream}")
            parts.append(
                f"<details{' open' * (not parts)}><summary>{title}</summary>"
                f"<div class=curves>{drawn}</div></details>"
            )
    if not parts:
        return ""
    return (
        f"<h2>Along the stream: {html.escape(results.title)}</h2><p>{_CAPTION}</p>{''.join(parts)}"
    )


def _range(found: Sequence[Panel]) -> tuple[float, float]:
    """Return lowest and highest value of all curves, a little apart."""
    values = np.concatenate([curve[1] for panel in found for curve in panel.lines.values()])
    low, high = float(values.min()), float(values.max())
    apart = 0.04 * (high - low) or 0.01 * abs(high) or 1.0
    return low - apart, high + apart


def _figure(panel: Panel, low: float, high: float, decimals: int) -> str:
    """Return a panel with its legend."""
    styles = {name: _style(place) for place, name in enumerate(panel.lines)}
    last = max(int(curve[0][-1]) for curve in panel.lines.values())
    drawn = _axes(low, high, last)
    for name, (seen, scores) in panel.lines.items():  # the unadapted one lies below, and is wider
        points = " ".join(
            f"{_x(a, last):.1f},{_y(b, low, high):.1f}" for a, b in zip(seen, scores, strict=True)
        )
        said = f"{name}: {scores[0]:.{decimals}f} to {scores[-1]:.{decimals}f}"
        drawn += (
            f"<polyline fill='none' {styles[name]} points='{points}'>"
            f"<title>{html.escape(said)}</title></polyline>"
        )
    legend = "".join(
        f"<li><svg viewBox='0 0 28 10'><path d='M0 5H28' {style}/></svg>{html.escape(name)}</li>"
        for name, style in styles.items()
    )
    return (
        f"<figure><figcaption>{html.escape(panel.training)}</figcaption>"
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_SIZE[0]} {_SIZE[1]}'>{drawn}</svg>"
        f"<ul>{legend}</ul></figure>"
    )


def _style(place: int) -> str:
    """Return the stroke of a line; the first is the unadapted row's."""
    if place == 0:
        return f"stroke='{_UNADAPTED}' stroke-width='3.2'"
    dash = _DASHES[(place - 1) // len(_COLOURS) % len(_DASHES)]
    colour = _COLOURS[(place - 1) % len(_COLOURS)]
    return f"stroke='{colour}' stroke-width='1.5'" + (f" stroke-dasharray='{dash}'" if dash else "")


def _axes(low: float, high: float, last: int) -> str:
    """Return lines at round scores, and numbers at both axes."""
    left, right = _EDGES["left"], _SIZE[0] - _EDGES["right"]
    bottom = _SIZE[1] - _EDGES["bottom"]
    drawn = ""
    for score in _ticks(low, high):
        y = _y(score, low, high)
        drawn += (
            f"<path d='M{left} {y:.1f}H{right}' stroke='#ddd' stroke-width='0.8'/>"
            f"<text x='{left - 5}' y='{y + 4:.1f}' text-anchor='end'>{score:g}</text>"
        )
    for seen in _ticks(0, last):
        anchor = "start" if seen == 0 else "middle"
        anchor = "end" if _x(seen, last) > right - 20 else anchor
        drawn += (
            f"<text x='{_x(seen, last):.1f}' y='{bottom + 14}' text-anchor='{anchor}'>"
            f"{seen:,.0f}</text>"
        )
    centre = (left + right) / 2
    return (
        f"{drawn}<path d='M{left} {bottom}H{right}' stroke='#222' stroke-width='0.8'/>"
        f"<text x='{centre}' y='{bottom + 28}' text-anchor='middle'>samples seen</text>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return two to six round numbers within.

    >>> _ticks(0, 4000), _ticks(61.2, 68.9)
    ([0.0, 1000.0, 2000.0, 3000.0, 4000.0], [62.0, 64.0, 66.0, 68.0])
    """
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough * (1 - 1e-9))
    first, end = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(place * step, 10) for place in range(first, end + 1)]


def _x(seen: float, last: int) -> float:
    return _EDGES["left"] + seen / last * (_SIZE[0] - _EDGES["left"] - _EDGES["right"])


def _y(score: float, low: float, high: float) -> float:
    height = _SIZE[1] - _EDGES["top"] - _EDGES["bottom"]
    return _EDGES["top"] + (high - score) / (high - low) * height
