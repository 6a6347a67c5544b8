"""Report of the idempotence distances: histograms, line by line, and tables of what they say."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from it3_lightning.benchmark.distance_lines import (
    LEVEL,
    Distances,
    Line,
    limit,
    lines,
    names,
    pooled,
)
from it3_lightning.benchmark.distances import ADAPTED, SOURCE, STATISTICS
from it3_lightning.benchmark.intervals import Cell
from it3_lightning.benchmark.rendering import as_html, as_markdown, svg
from it3_lightning.benchmark.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Edges = NDArray[np.float64]
_TITLE = "Idempotence distance of training, validation and test samples"
_CAPTION = (
    "One histogram a line, each as high as its highest bin; a severity has equally many samples of "
    "every shift, and seeds are pooled. An upright stroke marks the median. The distance is on a "
    "logarithmic axis; what lies beyond its ends, exact zeros too, is in the outermost bins."
)
_BEYOND = (
    "Samples whose distance exceeds that of 95 % of the validation samples, with the same weights, "
    "in percent."
)
_SMALL = 1e-4  # distances below it are written with a power of ten
_BINS = 48
_HEIGHT = 0.86  # of a line's highest bin; lines are 1 apart
_ENDS = (0.005, 0.995)  # the quantiles at the ends of the axis
_BLACK, _GREY = "#222222", "#777777"
_STYLES: Mapping[str, Mapping[str, Any]] = MappingProxyType(  # colours of Okabe and Ito
    {
        SOURCE: {"label": "as trained", "color": _BLACK, "lw": 1.1},
        STATISTICS: {
            "label": "batch statistics, weights as trained",
            "color": "#D55E00",
            "lw": 1.1,
            "ls": (0, (3, 1.5)),
        },
        ADAPTED: {
            "label": f"adapted ({ADAPTED})",
            "color": "#0072B2",
            "alpha": 0.35,
            "fill": True,
        },
    }
)


def picture(results: Results) -> str | None:
    """Return the histograms as SVG; None where nothing was measured, or without matplotlib."""
    if not results.distances:
        return None
    try:
        return svg(figure(results.distances, unit=_distance(results)))
    except ImportError:
        return None


def as_text(results: Results) -> list[str]:
    """Return titles and tables in Markdown, a part each; none where nothing was measured."""
    return [f"{title}\n\n{as_markdown(rows)}" for title, rows in _tables(results)]


def as_page(results: Results) -> str:
    """Return the histograms and the tables in HTML; nothing where nothing was measured."""
    tables = _tables(results)
    if not tables:
        return ""
    drawn = picture(results) or "<p>Install <code>it3_lightning[plots]</code> for the plot.</p>"
    shown = "".join(
        f"<p>{html.escape(title)}</p><div class='wide small'>{as_html(rows)}</div>"
        for title, rows in tables
    )
    return f"<h2>{_TITLE}</h2><p>{_CAPTION}</p><div class=plot>{drawn}</div>{shown}"


def median_table(found: Sequence[Line]) -> list[list[str]]:
    """Return the medians, two digits of each, with titles."""
    return _table(found, lambda line: _two_digits(line.median))


def beyond_table(found: Sequence[Line]) -> list[list[str]]:
    """Return the samples beyond the usual distances, in percent, with titles."""
    return _table(found, lambda line: f"{line.beyond:.1f}")


def figure(distances: Sequence[Distances], *, unit: str = "") -> Figure:
    """Return histograms of all lines, a column for each training, with the same bins in a column.

    Each line is as high as its highest bin; an upright stroke in its colour and style marks the
    median. What lies beyond the axis, exact zeros too, is in its outermost bins.

    Args:
        distances: of a benchmark; seeds, and the shifts of a severity, are pooled.
        unit: name of the distance, for the axis.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    order, groups = names(distances), pooled(distances)
    columns = list(dict.fromkeys(each.training for each in distances))
    drawn = Figure(figsize=(10, 1.4 + 0.52 * len(order)), layout="constrained")
    grid = drawn.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axes, training in zip(grid, columns, strict=True):
        mine = {(r, n): [*chain(*v.values())] for (t, r, n), v in groups.items() if t == training}
        edges = bins([value for values in mine.values() for value in values])
        for place, name in enumerate(order):
            values = {row: mine[row, name] for row in _STYLES if (row, name) in mine}
            _line(axes, values, edges, -place)
        _limit(axes, mine.get((SOURCE, "validation"), ()))
        _finish(axes, order, f"{training}: idempotence distance {unit}".strip())
        _ticks(axes, edges)
    _legend(drawn, grid)
    return drawn


def bins(values: Sequence[float]) -> Edges:
    """Return the edges of bins that are equally wide on a logarithmic axis.

    >>> edges = bins([0.01, 0.1, 1.0])
    >>> len(edges), [round(float(edge), 4) for edge in (edges[0], edges[-1])]
    (49, [0.0109, 0.991])
    """
    known = np.asarray([value for value in values if value > 0], dtype=np.float64)
    low, high = np.quantile(known, _ENDS) if known.size else (0.1, 1.0)
    return np.geomspace(low, max(high, 1.1 * low), _BINS + 1)


def counted(values: Sequence[float], edges: Edges) -> Edges:
    """Return the share of the values in each bin; the outermost hold what lies beyond them too.

    >>> counted([0.0, 1.5, 1.6, 9.0], np.array([1.0, 2.0, 3.0]))
    array([0.75, 0.25])
    """
    inside = np.clip(values, edges[0], edges[-1])
    shares: Edges = np.histogram(inside, edges)[0] / len(values)
    return shares


def _tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Return the tables with their titles."""
    found = lines(results.distances)
    if not found:
        return []
    median = f"Median idempotence distance{_distance(results, ' ({})')}."
    return [(median, median_table(found)), (_BEYOND, beyond_table(found))]


def _distance(results: Results, form: str = "({})") -> str:
    """Return the name of the distance, as it stands in the settings."""
    settings = results.about.get("settings", {}).get("benchmark", {})
    name = settings.get("recipe", {}).get("distance")
    return form.format(name) if name else ""


def _table(found: Sequence[Line], cell: Callable[[Line], str]) -> list[list[str]]:
    order = list(dict.fromkeys(line.name for line in found))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for line in found:
        rows.setdefault((line.training, line.row), {})[line.name] = cell(line)
    body = [[*key, *(cells.get(name, "") for name in order)] for key, cells in rows.items()]
    return [["training", "at test time", *order], *body]


def _two_digits(cell: Cell) -> str:
    """Return a mean with two digits, and its spread with as many decimals.

    >>> [_two_digits(Cell(mean, mean / 9)) for mean in (0.0129404, 12.94, 0.0000129, 0.0)]
    ['0.013 ± 0.001', '13 ± 1', '1.3e-05 ± 1.4e-06', '0 ± 0']
    """
    if 0 < abs(cell.mean) < _SMALL:
        return f"{cell:.1e}"
    decimals = 1 - math.floor(math.log10(abs(cell.mean))) if cell.mean else 0
    return f"{cell:.{max(decimals, 0)}f}"


def _line(axes: Axes, values: Mapping[str, Sequence[float]], edges: Edges, base: float) -> None:
    """Draw the histograms of a line above a base, the adapted one behind, and their medians."""
    shares = {row: counted(given, edges) for row, given in values.items()}
    largest = max((share.max() for share in shares.values()), default=1.0)
    axes.axhline(base, color=_BLACK, lw=0.5)
    for row, share in reversed(shares.items()):
        style = _STYLES[row]
        axes.stairs(base + _HEIGHT * share / largest, edges, baseline=base, **style)
        median = np.clip(np.median(values[row]), edges[0], edges[-1])
        colour, way = style["color"], style.get("ls", "-")
        axes.plot([median, median], [base, base + _HEIGHT], color=colour, ls=way, lw=1.8)


def _limit(axes: Axes, validation: Sequence[float]) -> None:
    """Mark what most validation samples lie within, with the weights as trained."""
    if validation:
        text = f"{100 * LEVEL:.0f} % of validation samples, as trained, lie to the left"
        axes.axvline(limit(validation), color=_GREY, ls=":", lw=1.4, label=text)


def _finish(axes: Axes, order: Sequence[str], title: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_yticks([0.3 - place for place in range(len(order))], order)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(0.95 - len(order), 1.0)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _ticks(axes: Axes, edges: Edges) -> None:
    """Label as many places of the axis as can be read: powers of ten, or numbers between them."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    if edges[-1] < 100 * edges[0]:
        narrow = edges[-1] < 5 * edges[0]
        axes.xaxis.set_major_locator(MaxNLocator(4) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")


def _legend(drawn: Figure, grid: Sequence[Axes]) -> None:
    pairs = [pair for axes in grid for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {text: handle for handle, text in pairs}
    words = [str(style["label"]) for style in _STYLES.values()]
    order = sorted(handles, key=lambda text: words.index(text) if text in words else len(words))
    shown = [handles[text] for text in order]
    drawn.legend(shown, order, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
