"""Tables of a benchmark: short ones for a terminal of 100 columns, full ones in Markdown."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table

from it3_lightning.benchmark.rendering import as_markdown
from it3_lightning.benchmark.results import Results
from it3_lightning.benchmark.rows import Row

Lines = list[list[str]]
"""Lines of cells, the titles first; training and row are the first two cells."""
TOLD = "Telling shifted from clean samples: area under the ROC curve, in percent; 50 is chance."
BY_STREAM = "Mean gain over the shifts by stream; of unadapted rows the score."
_LEVEL = "95 % interval over seeds and samples"


def terminal(results: Results) -> list[Table]:
    """Return the tables for a terminal: scores and gains, then costs, then streams."""
    first, more = results.streams[0], len(results.streams) > 1
    of = f", stream {first}" if more else ""
    titles = f"{results.title}{of}; seeds {', '.join(map(str, results.seeds))}"
    shown = [
        as_table(_summary(results), f"{titles}. Gains with their {_LEVEL}"),
        as_table(_details(results), "Calibration error (15 bins, %) and cost"),
    ]
    if more:
        shown.append(as_table(by_stream(results, spread=False), BY_STREAM))
    return shown


def as_table(rows: Lines, title: str) -> Table:
    """Return lines as an aligned table in which each training has a line of its own.

    Long names are wrapped where the console is narrow; numbers are not.
    """
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, head in enumerate(rows[0][1:]):
        words = index == 0 or head == "worst case"
        justify = "left" if words else "right"
        shown.add_column(head, justify=justify, no_wrap=not words)  # type: ignore[arg-type]
    before = ""
    for training, name, *cells in rows[1:]:
        if training != before:
            shown.add_row(training, style="bold")
        before = training
        shown.add_row(Padding(name, (0, 0, 0, 2)), *cells)
    return shown


def _summary(results: Results, *, spread: bool = False) -> Lines:
    """Return what the first table has: the first stream, and harm in all."""
    stream, style = results.streams[0], f".{results.decimals}f"
    rows = [["training", "at test time", "clean", "shifts", "gain", "worst case", "harmed"]]
    for row in results.rows:
        if not results.has(row, stream):
            continue
        scores = [results.clean(row, stream), results.shifted(row, stream)]
        cells = [f"{each if spread else each.mean:{style}}" for each in scores]
        gain = _gain(results, row, stream)
        rows.append([row.training, row.name, *cells, gain, *_harm(results, row)])
    return rows


def _gain(results: Results, row: Row, stream: str) -> str:
    """Return the gain with its interval, or its spread over seeds where there is none."""
    style = f"+.{results.decimals}f"
    gain, interval = results.gain(row, stream), results.interval(row, stream)
    if interval is not None:
        return format(interval, style)
    return "" if gain is None else format(gain, style)


def _harm(results: Results, row: Row) -> list[str]:
    """Return the worst case with its cell, and how many cells are harmed."""
    harm = results.harm(row)
    if harm is None:
        return ["", ""]
    share = f"{harm.harmed} of {harm.cells}" if harm.cells else ""
    return [f"{harm.gain:+.{results.decimals}f} {harm.cell}", share]


def _details(results: Results) -> Lines:
    titles = ["training", "at test time", *_CALIBRATION, *_COSTS]
    return [titles, *([r.training, r.name, *_costs(results, r)] for r in results.rows)]


_CALIBRATION = ("ECE clean", "ECE shifts")
_COSTS = ("passes", "ms/sample", "x source")


def _costs(results: Results, row: Row) -> list[str]:
    """Return calibration errors, passes, and time, of the first stream that a row is scored on."""
    calibration = results.calibration_error(row, results.streams[0])
    errors = ["", ""] if calibration is None else [f"{each.mean:.1f}" for each in calibration]
    forwards, backwards, time = results.cost(row)
    times = results.times_source(row)
    return [
        *errors,
        f"{forwards:.3g} + {backwards:.3g}",
        f"{time:.2f}",
        "" if times is None else f"{times:.1f}",
    ]


def markdown(results: Results) -> str:
    """Return the full table in Markdown."""
    return as_markdown(full(results))


def for_page(results: Results) -> Lines:
    """Return the table of the page: scores in the first stream, harm in all, and costs."""
    costs = {(training, name): cells for training, name, *cells in _details(results)}
    return [[*row, *costs[row[0], row[1]]] for row in _summary(results, spread=True)]


def full(results: Results) -> Lines:
    """Return all columns of all rows."""
    return [headers(results), *(line(results, row) for row in results.rows)]


def detailed(results: Results) -> list[str]:
    """Return the streams of the full table: more than two do not fit in one."""
    return results.streams if len(results.streams) <= 2 else results.streams[:1]


def headers(results: Results) -> list[str]:
    """Return the titles of the full table."""
    per_stream = [
        title
        for stream in detailed(results)
        for title in (f"{stream}: clean", "shifts", "gain", "worst shift", *_error_title(results))
    ]
    last = [*_CALIBRATION, *_COSTS]
    return ["training", "at test time", *per_stream, "worst case", "harmed", *last]


def line(results: Results, row: Row) -> list[str]:
    """Return the cells of one row of the full table."""
    cells, style = [row.training, row.name], f".{results.decimals}f"
    for stream in detailed(results):
        if not results.has(row, stream):
            cells += [""] * (4 + len(_error_title(results)))
            continue
        worst, error = results.worst(row, stream), results.corruption_error(row, stream)
        cells += [
            format(results.clean(row, stream), style),
            format(results.shifted(row, stream), style),
            _gain(results, row, stream),
            "" if worst is None else f"{worst[1]:+{style}} {worst[0]}",
            *([] if error is None else [format(error, style)]),
        ]
    return [*cells, *_harm(results, row), *_costs(results, row)]


def by_stream(results: Results, *, spread: bool = True) -> Lines:
    """Return the mean gain over the shifts in each stream.

    Of an unadapted row it is the score; empty where a row does not go with a stream.

    Args:
        results: of the streams.
        spread: with the standard deviation over seeds.
    """
    style = f".{results.decimals}f"
    rows = [["training", "at test time", *results.streams]]
    for row in results.rows:
        cells = [row.training, row.name]
        for stream in results.streams:
            if not results.has(row, stream):
                cells.append("")
                continue
            gain = results.gain(row, stream)
            value = results.shifted(row, stream) if gain is None else gain
            sign = "" if gain is None else "+"
            cells.append(f"{value if spread else value.mean:{sign}{style}}")
        rows.append(cells)
    return rows


def by_shift(results: Results, stream: str) -> str:
    """Return a table in Markdown: the gain over the baseline on each shift, mean over seeds."""
    shifts = ["clean", *results.shifts_of(stream)]
    rows = [["training", "at test time", *shifts]]
    for row in results.rows:
        if not results.has(row, stream):
            continue
        gains = [results.gain(row, stream, shift) for shift in shifts]
        cells = [f"{gain.mean:+.{results.decimals}f}" for gain in gains if gain is not None]
        if cells:
            rows.append([row.training, row.name, *cells])
    return as_markdown(rows)


def separation(results: Results) -> Lines:
    """Return a table: how well the distance tells each shift from clean samples, and its titles.

    The area under the ROC curve in percent, 50 for not at all, for the distance of the un-adapted
    network and beside it for the confidence of its prediction.
    """
    shifts = list(dict.fromkeys(record.shift for record in results.separations))
    pairs = dict.fromkeys((record.training, record.row) for record in results.separations)
    rows = [[*pair, *(str(results.separation(*pair, s)) for s in shifts)] for pair in pairs]
    return [["training", "score", *shifts], *rows] if rows else []


def _error_title(results: Results) -> list[str]:
    """Return the title of the mean corruption error, where there is a baseline for it."""
    return [] if results.baseline_errors is None else ["mCE (lower is better)"]
