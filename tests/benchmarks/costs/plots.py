"""The results as pictures: how many times faster than the peer, and time over size."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from costs.curves import ENGINES
from costs.results import Results
from it3_lightning.benchmark.rendering import svg

_COLOURS = dict(zip(ENGINES, ("#1f6fb4", "#d1495b", "#2a9d6f", "#e39a2d"), strict=True))
_VERDICTS = {"ok": "#1f6fb4", "missed": "#d1495b", "": "#8a94a0"}
_COLUMNS = 3


def speedups(results: Results) -> str:
    """Return bars of how many times faster we are than the peer, with what is required of each."""
    rows = [row for row in results.rows if row.against == "torch-ttt" and row.unit == "ms"]
    figure = Figure(figsize=(10, 0.6 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    colours = [_VERDICTS[row.verdict] for row in rows]
    axes.barh(places, [row.ratio for row in rows], color=colours, height=0.66)
    bounds = [row.required.bound if row.required else float("nan") for row in rows]
    axes.scatter(bounds, places, marker="|", s=170, color="black", lw=2, label="required", zorder=3)
    for place, row, bound in zip(places, rows, bounds, strict=True):
        clear = bound if row.ratio < bound < 1.3 * row.ratio else row.ratio  # of the mark
        axes.annotate(f"  {row.ratio:.1f}", (clear, place), va="center", fontsize=8)
    axes.set_yticks(places, [row.case for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("times faster than torch-ttt; red misses what is required, of grey nothing is")
    axes.axvline(1, color="black", lw=0.8)
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return svg(figure)


def curves(results: Results) -> str:
    """Return time against batch size, steps and parameters, a panel for each and each network."""
    panels = results.curves()
    lines = -(-len(panels) // _COLUMNS)
    figure = Figure(figsize=(10, 3.1 * lines), layout="constrained")
    grid = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes, ((axis, network), engines) in zip(grid, panels.items(), strict=False):
        _panel(axes, engines)
        axes.set_title(network, fontsize=9)
        axes.set_xlabel(axis, fontsize=8)
    for axes in grid[len(panels) :]:
        axes.axis("off")
    grid[0].set_ylabel("ms a call", fontsize=8)
    handles = {label: h for a in grid for h, label in zip(*a.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=4, frameon=False)
    return svg(figure)


def _panel(axes: Axes, engines: dict[str, dict[int, float]]) -> None:
    for name, found in engines.items():
        axes.plot(*zip(*found.items(), strict=True), "o-", ms=3, c=_COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    places = sorted({at for line in engines.values() for at in line})
    axes.set_xticks(places, [_short(at) for at in places])
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _short(number: int) -> str:
    """Return a number in three digits where it is large, as ``13.7k``."""
    for size, letter in ((10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
