"""Report of a benchmark: an aligned table, an HTML page with plots, several results compared."""

from __future__ import annotations

import html
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from it3_lightning.benchmark.distance_report import as_page, as_text, picture
from it3_lightning.benchmark.intervals import Cell
from it3_lightning.benchmark.rendering import as_html, as_markdown, document, fitting, svg
from it3_lightning.benchmark.results import Results
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.tune import Tuned
from it3_lightning.benchmark.tune_rules import Verdict, is_clean
from it3_lightning.utils.files import read_json, write

_TOLD = "Telling shifted from clean samples: area under the ROC curve, in percent; 50 is chance."
_BY_STREAM = "Mean gain over the shifts by stream; of unadapted rows the score."
_FILES = ("distances.svg", "page.html", "results.csv", "results.json", "table.md")
_STREAMS = ("equal", "unequal")


def show(results: Results, folder: Path) -> None:
    """Print the tables; write ``table.md``, ``page.html``, ``distances.svg`` into the folder."""
    shown = [table(results)]
    parts = [f"{results.title}; a gain is an improvement.", markdown(results)]
    if len(results.streams) > len(_detailed(results)):
        shown.append(_as_table(by_stream(results), _BY_STREAM))
        parts.append(f"{_BY_STREAM}\n\n{as_markdown(by_stream(results))}")
    console = fitting(*shown)
    console.print(*shown)
    parts += [f"Gain by shift, {s} classes:\n\n{by_shift(results, s)}" for s in results.streams]
    if told := separation(results):
        parts.append(f"{_TOLD}\n\n{as_markdown(told)}")
    parts += as_text(results)
    write(folder / "table.md", "\n\n".join(parts) + "\n")
    write(folder / "page.html", page(results))
    if drawn := picture(results):
        write(folder / "distances.svg", drawn)
    files = sorted(name for name in _FILES if (folder / name).is_file())
    console.print(f"Written to {folder}: {', '.join(files)}")


def page(results: Results) -> str:
    """Return one HTML page: the table, a plot by shift, and what it was made with."""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in headers(results))
    body, before = "", ""
    for row in results.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in line(results, row))
        body += f"<tr{' class=first' if row.training != before else ''}>{cells}</tr>\n"
        before = row.training
    plots = ""
    if len(results.streams) > len(_detailed(results)):
        plots = f"<h2>{_BY_STREAM}</h2><div class=wide>{as_html(by_stream(results))}</div>"
    plots += "".join(
        f"<h2>Gain by shift, {html.escape(stream)} classes</h2>"
        f"<div class=plot>{_plot(results, stream)}</div>"
        for stream in results.streams
    )
    if told := separation(results):
        plots += f"<h2>{_TOLD}</h2><div class=wide>{as_html(told)}</div>"
    plots += as_page(results)
    about = html.escape("\n".join(f"{k}: {v}" for k, v in _facts(results).items()))
    return document(
        "IT3 benchmark",
        f"<h1>IT3 benchmark: {html.escape(results.title)}</h1>"
        f"<p>Mean ± standard deviation over seeds {results.seeds}. <em>shifts</em>: mean over "
        f"{html.escape(', '.join(s for s in results.shifts if s != 'clean'))}. <em>gain</em>: the "
        "improvement over the same model with batch statistics (its source where it has no "
        "BatchNorm or each sample is by itself), on the mean of the shifts; <em>worst shift</em>: "
        "the smallest such gain.</p>"
        f"<div class=wide><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
        f"</div>{plots}<h2>Made with</h2><pre>{about}</pre>",
    )


def table(results: Results) -> Table:
    """Return the aligned table of all rows; gains are over the same model's batch statistics."""
    rows = [headers(results), *(line(results, row) for row in results.rows)]
    return _as_table(rows, f"{results.title}, mean ± std over seeds {results.seeds}")


def _as_table(rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return rows, the head first, as a table in which each training is a section."""
    shown = Table(title=title)
    for index, head in enumerate(rows[0]):
        shown.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    before = ""
    for cells in rows[1:]:
        if before and before != cells[0]:
            shown.add_section()
        before = cells[0]
        shown.add_row(*cells)
    return shown


def by_stream(results: Results) -> list[list[str]]:
    """Return a table: the mean gain over the shifts in each stream, and its titles.

    Of an unadapted row it is the score; empty where a row does not go with a stream.
    """
    style = f".{results.decimals}f"
    rows = [["training", "at test time", *results.streams]]
    for row in results.rows:
        cells = [row.training, row.name]
        for stream in results.streams:
            gain = results.gain(row, stream) if results.has(row, stream) else None
            if gain is not None:
                cells.append(format(gain, f"+{style}"))
            elif results.has(row, stream):
                cells.append(format(results.shifted(row, stream), style))
            else:
                cells.append("")
        rows.append(cells)
    return rows


def _detailed(results: Results) -> list[str]:
    """Return the streams of the first table: more than two do not fit in one."""
    return results.streams if len(results.streams) <= 2 else results.streams[:1]


def markdown(results: Results) -> str:
    """Return the table in Markdown."""
    return as_markdown([headers(results), *(line(results, row) for row in results.rows)])


def headers(results: Results) -> list[str]:
    """Return the column titles of the table."""
    per_stream = [
        title
        for stream in _detailed(results)
        for title in (f"{stream}: clean", "shifts", "gain", "worst shift", *_error_title(results))
    ]
    return ["training", "at test time", *per_stream, "passes", "ms/sample"]


def line(results: Results, row: Row) -> list[str]:
    """Return the cells of one row, as text."""
    cells, style = [row.training, row.name], f".{results.decimals}f"
    for stream in _detailed(results):
        if not results.has(row, stream):
            cells += [""] * (4 + len(_error_title(results)))
            continue
        gain, worst = results.gain(row, stream), results.worst(row, stream)
        error = results.corruption_error(row, stream)
        cells += [
            format(results.clean(row, stream), style),
            format(results.shifted(row, stream), style),
            "" if gain is None else format(gain, f"+{style}"),
            "" if worst is None else f"{worst[1]:+{style}} {worst[0]}",
            *([] if error is None else [format(error, style)]),
        ]
    forwards, backwards, time = results.cost(row)
    return [*cells, f"{forwards:.3g} + {backwards:.3g}", f"{time:.2f}"]


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


def separation(results: Results) -> list[list[str]]:
    """Return a table: how well the distance tells each shift from clean samples, and its titles.

    The area under the ROC curve in percent, 50 for not at all, for the distance of the un-adapted
    network and beside it for the confidence of its prediction.
    """
    shifts = list(dict.fromkeys(record.shift for record in results.separations))
    pairs = dict.fromkeys((record.training, record.row) for record in results.separations)
    rows = [[*pair, *(str(results.separation(*pair, s)) for s in shifts)] for pair in pairs]
    return [["training", "score", *shifts], *rows] if rows else []


def overview(folders: Sequence[Path]) -> str:
    """Return what every way to predict gains in several benchmarks, in aligned Markdown.

    One table for each training: a line for each benchmark and stream, a column for each way. Scores
    of the unadapted ways are those on the shifted samples.

    Args:
        folders: outputs of ``it3 benchmark``; a table's lines are named after them, with as many of
            the folders above as tell those of one name apart.

    Raises:
        FileNotFoundError: a folder holds no ``results.json``.
        ValueError: it is damaged, or of another program.
    """
    paths = list(dict.fromkeys(folder.absolute() for folder in folders))
    return _compared({_name_among(paths, path): _results_in(path) for path in paths})


def _name_among(paths: Sequence[Path], path: Path) -> str:
    """Return the shortest end of a path that no other path has."""
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if [other.parts[-count:] for other in paths].count(end) == 1:
            return Path(*end).as_posix()
    return path.as_posix()


def _compared(read: dict[str, dict[str, Any]]) -> str:
    trainings = _in_order(entry["training"] for found in read.values() for entry in found["table"])
    return "\n\n".join(
        f"**{training}**\n\n{as_markdown(_ways(read, training), left=(0,))}"
        for training in trainings
    )


def _error_title(results: Results) -> list[str]:
    """Return the title of the mean corruption error, where there is a baseline for it."""
    return [] if results.baseline_errors is None else ["mCE (lower is better)"]


def _facts(results: Results) -> dict[str, Any]:
    settings = results.about.get("settings", {})
    return {
        **results.about.get("versions", {}),
        **settings.get("benchmark", {}),
        **settings.get("data", {}),
    }


def _plot(results: Results, stream: str) -> str:
    """Return an SVG of gains by shift, a line per row that adapts; a note without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "<p>Install <code>it3_lightning[plots]</code> for the plot.</p>"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", lw=0.8)
    shifts = ["clean", *results.shifts_of(stream)]
    for row in results.rows:
        hidden = row.training == "joint" or "published" in row.name or "tuned" in row.name
        if hidden or not results.has(row, stream):
            continue
        gains = [results.gain(row, stream, shift) for shift in shifts]
        if None not in gains:
            means = [gain.mean for gain in gains if gain is not None]
            style = {"ordinary": ":", "post-hoc": "-"}.get(row.training, "--")
            label = f"{row.training}: {row.name}"
            axes.plot(shifts, means, style, marker="o", ms=3, lw=1.4, label=label)
    axes.set_ylabel("gain over the unadapted model")
    axes.tick_params(axis="x", rotation=30)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return svg(figure)


def _results_in(folder: Path) -> dict[str, Any]:
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected results.json in {folder}, as it3 benchmark writes it, found none. Run it3 "
            f"benchmark with --benchmark.output {folder} first."
        )
    try:
        found = read_json(file)
        _compared({folder.name: found})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected {file} as it3 benchmark writes it, got a damaged or another file "
            f"({type(error).__name__}: {error}). Run it3 benchmark with --benchmark.output "
            f"{folder} again: it keeps finished seeds."
        ) from error
    return found


def _ways(read: dict[str, dict[str, Any]], training: str) -> list[list[str]]:
    """Return a table's lines of cells, the head first."""
    of_training = {
        name: {entry["row"]: entry for entry in found["table"] if entry["training"] == training}
        for name, found in read.items()
    }
    ways = _in_order(way for entries in of_training.values() for way in entries)
    lines = [["benchmark", "score", "clean", *ways]]
    for name, entries in of_training.items():
        decimals = read[name].get("decimals", 1)
        for stream in _STREAMS:
            if stream not in next(iter(entries.values()), {}):
                continue
            clean = _cell(entries["source"][stream]["clean"])
            cells = [_shown(entries.get(way), stream, decimals) for way in ways]
            label = name if stream == "equal" else f"{name}, {stream}"
            lines.append([label, read[name]["metric"], f"{clean:.{decimals}f}", *cells])
    return lines


def _shown(entry: dict[str, Any] | None, stream: str, decimals: int) -> str:
    """Return the gain of a way, or its score where it adapts nothing."""
    if entry is None:
        return ""
    gain = entry[stream]["gain"]
    if gain is None:
        return f"{_cell(entry[stream]['shifted']):.{decimals}f}"
    return f"{_cell(gain):+.{decimals}f}"


def _cell(saved: dict[str, float]) -> Cell:
    return Cell(saved["mean"], saved["std"])


def _in_order(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


_TITLES = ("at test time", "gain", "clean", "least", "on", "verdict")


def tuning_table(tuned: Tuned) -> Table:
    """Return the aligned table of all candidates, those that may be chosen first."""
    shown = Table(title=f"{tuned.title}: {_against(tuned)}")
    for index, title in enumerate(_TITLES):
        justify = "left" if index in (0, 4, 5) else "right"
        shown.add_column(title, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for cells in _lines(tuned):
        shown.add_row(*cells)
    return shown


def tuning_markdown(tuned: Tuned) -> str:
    """Return the report in Markdown."""
    ruler = ["---" if index in (0, 4, 5) else "---:" for index in range(len(_TITLES))]
    rows = [list(_TITLES), ruler, *_lines(tuned)]
    listed = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return "\n\n".join(
        [
            f"{tuned.title}; {_against(tuned)}. A gain is an improvement.",
            f"Seeds {list(tuned.seeds)}; validation samples, clean and under "
            f"{', '.join(tuned.shifts)}. A loss of {tuned.tolerated:.{tuned.decimals + 1}f} on any "
            "of these is tolerated.",
            listed,
            f"Chosen: {_chosen(tuned)}.",
            f"```yaml\n{tuned.yaml()}```",
        ]
    )


def show_tuning(tuned: Tuned, folder: Path) -> None:
    """Print the table and the lines to paste, and write ``tuning.md`` into the folder."""
    shown = tuning_table(tuned)
    console = fitting(shown)
    console.print(shown)
    console.print(f"Chosen: {_chosen(tuned)}.")
    console.print(tuned.yaml(), markup=False, highlight=False)
    write(folder / "tuning.md", tuning_markdown(tuned) + "\n")
    console.print(f"Written to {folder}: tuning.md")


def _against(tuned: Tuned) -> str:
    style = f".{tuned.decimals}f"
    clean, shifted = (_mean(tuned, wanted) for wanted in (True, False))
    return (
        f"gains over {tuned.training}, {tuned.base.name}: clean {clean:{style}}, "
        f"shifts {shifted:{style}}"
    )


def _mean(tuned: Tuned, clean: bool) -> Cell:
    """Return the mean of the unadapted scores over clean or over shifted samples."""
    wanted = [values for name, values in tuned.before.items() if is_clean(name) == clean]
    return Cell.of(statistics.fmean(values) for values in zip(*wanted, strict=True))


def _lines(tuned: Tuned) -> list[list[str]]:
    style = f"+.{tuned.decimals}f"
    return [
        [
            candidate.name,
            format(verdict.gain, style),
            format(verdict.clean, style),
            format(-verdict.loss, style),
            verdict.worst,
            "chosen" if candidate is tuned.chosen else _said(verdict),
        ]
        for candidate, verdict in tuned.ranked
    ]


def _said(verdict: Verdict) -> str:
    if not verdict.harmless:
        return "harms"
    return "gains" if verdict.gains else "no gain"


def _chosen(tuned: Tuned) -> str:
    return "no adaptation" if tuned.chosen is None else tuned.chosen.name
