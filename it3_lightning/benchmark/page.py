"""Page of a benchmark: the verdict, gains as dots with their intervals, tables, what it is of."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import yaml

from it3_lightning.benchmark.distance_report import as_page
from it3_lightning.benchmark.intervals import Interval
from it3_lightning.benchmark.pictures import STYLE, Shown, as_figures, titled
from it3_lightning.benchmark.rendering import as_html, document
from it3_lightning.benchmark.results import Results
from it3_lightning.benchmark.rows import Row
from it3_lightning.benchmark.stream_curves import STYLE as CURVES
from it3_lightning.benchmark.stream_curves import along_streams
from it3_lightning.benchmark.tables import BY_STREAM, TOLD, by_stream, for_page, separation

Verdict = Sequence[tuple[str, str]]
"""What each line is about, and what it says; the first says what to do."""
Columns = Mapping[str, tuple[str, str | None]]
"""Stream and shift of each panel by its title; a shift of ``None``: mean of all."""
_STYLE = """
.verdict { border-left: 4px solid #0072B2; padding: .2rem 1rem; background: var(--soft); }
.verdict > p { font-size: 1.15rem; font-weight: 600; margin: .6rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.plot { overflow-x: auto; } .dots svg { width: auto; font: 11px system-ui, sans-serif; }
.dots svg { max-width: none; fill: #222; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.wide table { font-size: .8rem; } .wide th, .wide td { padding: .25rem .4rem; }
.wide th { white-space: normal; }
.wide td:first-child { white-space: normal; min-width: 7.5rem; }
body { max-width: 78rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; padding: 0 .7rem; } h1 { font-size: 1.25rem; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; }
}
"""
_COLOURS: Mapping[str, str] = MappingProxyType(  # of Okabe and Ito
    {"ordinary": "#555555", "joint": "#D55E00", "post-hoc": "#0072B2"}
)
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SHARE = 0.05  # of the unadapted score that an axis shows at least: less is no finding
_MOST = 4  # times that; what lies beyond is written at the edge
_CAPTION = (
    "Gain over the same training's unadapted row, with its 95 % interval over seeds and samples. "
    "All panels have one axis, at least 5 % of the unadapted score to either side; what lies beyond"
    " it is written as a number."
)
_NOTHING = Interval(0.0, 0.0, 0.0)
_LINE, _PANEL, _LETTER = 16, 90, 6.1  # pixels: height of a line, width of a panel and of a letter


def page(results: Results, verdict: Verdict = (), paste: str = "") -> str:
    """Return one HTML page that needs nothing else.

    Args:
        results: of a benchmark.
        verdict: lines that stand on top.
        paste: lines of a configuration below them.
    """
    return document(
        "IT3 benchmark",
        f"<h1>IT3 benchmark: {html.escape(results.title)}</h1>"
        f"{_verdict(verdict, paste)}{_explained(results)}"
        f"<div class=wide>{as_html(for_page(results), sections=True)}</div>"
        f"{_of_streams(results)}{_by_shift(results)}{along_streams(results)}"
        f"{_samples(results)}{_told(results)}{as_page(results)}"
        f"<h2>Made with</h2>{_definitions(made_with(results))}{_settings(results)}",
        style=_STYLE + STYLE + CURVES,
    )


def made_with(results: Results) -> list[tuple[str, str]]:
    """Return what the results were made with: what each line is about, and what it says."""
    about = results.about
    settings, made = about.get("settings", {}), about.get("made", {})
    model, data = settings.get("model", {}), settings.get("data", {})
    own = settings.get("benchmark", {})
    weights = sum(math.prod(shape) for shape in model.get("parameters", {}).values())
    found = {
        "model": str(model.get("layers", "")).partition("(")[0],
        "parameters": f"{weights:,}" if weights else "",
        **{name: _spec(part) for name, part in zip(_PARTS, model.get("parts", ()), strict=False)},
        "data": data.get("class", ""),
        "seeds": ", ".join(map(str, results.seeds)),
        "epochs": f"{own['epochs']} joint, {own['posthoc_epochs']} post-hoc" if own else "",
        "hardware": made.get("hardware", ""),
        "date": made.get("date", ""),
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()),
    }
    return [(name, text) for name, text in found.items() if text]


_PARTS = ("prior", "conditioning")
_SOURCE = "source"


def _verdict(verdict: Verdict, paste: str) -> str:
    if not verdict:
        return ""
    (_, first), *others = verdict
    pasted = f"<p>Paste into your configuration</p><pre>{html.escape(paste)}</pre>" if paste else ""
    said = _definitions(others)
    return f"<div class=verdict><p>{html.escape(first)}</p>{said}{pasted}</div>"


def _definitions(pairs: Sequence[tuple[str, str]]) -> str:
    lines = (f"<dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd>" for a, b in pairs)
    return f"<dl>{''.join(lines)}</dl>"


def _explained(results: Results) -> str:
    shifts = html.escape(", ".join(s for s in results.shifts if s != "clean"))
    return (
        "<h2>All rows</h2>"
        f"<p>Stream {html.escape(results.streams[0])}; scores are means ± standard deviations over "
        f"seeds {', '.join(map(str, results.seeds))}. <em>shifts</em>: mean over {shifts}. "
        "<em>gain</em>: the improvement over the same model with batch statistics (its source where"
        " it has no BatchNorm or each sample is by itself), on the mean of the shifts, with its "
        "95 % interval over seeds and samples. <em>worst case</em>: the smallest gain in any shift,"
        " clean samples, stream and size of batches; <em>harmed</em>: how many of these have an "
        "interval below zero. <em>ECE</em>: expected calibration error, in percent. "
        "<em>passes</em>: forward + backward, for a batch, or a sample by itself.</p>"
    )


def _of_streams(results: Results) -> str:
    columns = {stream: (stream, None) for stream in results.streams}
    shown = f"<h2>Gain by stream</h2><p>{_CAPTION}</p>{dots(results, columns)}"
    if len(results.streams) > 1:
        rows = as_html(by_stream(results), sections=True)
        shown += f"<p>{BY_STREAM}</p><div class=wide>{rows}</div>"
    return shown


def _by_shift(results: Results) -> str:
    parts = []
    for stream in results.streams:
        shifts = ["clean", *results.shifts_of(stream)]
        columns = {shift: (stream, shift) for shift in shifts}
        opened = " open" * (stream == results.streams[0])
        title = html.escape(f"Stream {stream}")
        drawn = dots(results, columns)
        parts.append(f"<details{opened}><summary>{title}</summary>{drawn}</details>")
    return f"<h2>Gain by shift</h2>{''.join(parts)}"


def _told(results: Results) -> str:
    told = separation(results)
    return f"<h2>{TOLD}</h2><div class=wide>{as_html(told, sections=True)}</div>" if told else ""


def _samples(results: Results) -> str:
    """Return a few samples with what the source and the row that gains most make of them."""
    cells: dict[tuple[str, str], dict[str, Shown]] = {}
    for (training, name, *_, shift), shown in results.shown.items():
        cells.setdefault((training, name), {})[shift] = shown
    images = {s: e.images for own in cells.values() for s, e in own.items() if e.images is not None}
    stream = results.streams[0] if results.streams else ""
    rows = [r for r in results.rows if {(r.training, r.name), (r.training, _SOURCE)} <= {*cells}]
    gains = [(g.mean, r) for r in rows if r.settings and (g := results.gain(r, stream)) is not None]
    if not gains:
        return ""
    _, row = max(gains, key=lambda pair: pair[0])
    source, adapted = cells[row.training, _SOURCE], cells[row.training, row.name]
    drawn = "".join(
        titled(shift, as_figures(source[shift], adapted[shift], images.get(shift), str(number)))
        for number, shift in enumerate(source)
        if shift in adapted
    )
    if not drawn:
        return ""
    said = html.escape(f"{row.training}, {row.name}")
    return (
        f"<h2>Samples</h2><p>Some of the first batch of seed {results.seeds[0]}, stream "
        f"{html.escape(stream)}. <em>source</em>: the prediction of the network as trained; "
        f"<em>adapted</em>: that of {said}, which gains most under shift. They illustrate; the "
        f"tables measure.</p>{drawn}"
    )


def _settings(results: Results) -> str:
    settings = results.about.get("settings")
    if not settings:
        return ""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return f"<details><summary>All settings</summary><pre>{html.escape(text)}</pre></details>"


def _spec(part: Any) -> str:
    """Return a prior or a conditioning in words.

    >>> _spec({"class_path": "it3_lightning.ClassPrior", "init_args": {"num_classes": 3}})
    'ClassPrior, num_classes 3'
    """
    if not isinstance(part, Mapping):
        return str(part or "")
    args = part.get("init_args", {}).items()
    given = [f"{k} {', '.join(v) if isinstance(v, list) else v}" for k, v in args if v is not None]
    return ", ".join([str(part["class_path"]).rpartition(".")[2], *given])


def dots(results: Results, columns: Columns) -> str:
    """Return gains as dots with their intervals, a panel for each column, a line for each row.

    Args:
        results: of the rows; those that gain nothing anywhere, as they take no step, are left out.
        columns: the panels.
    """
    names = [row.training for row in results.rows]
    lines = [
        Line(row.training, row.name, _colour(names, row.training), _gains(results, row, columns))
        for row in results.rows
    ]
    scores = [r.score for r in results.records if r.row == _SOURCE]
    return panels(lines, list(columns), statistics.fmean(scores or [1.0]), results.decimals)


@dataclass(frozen=True)
class Line:
    """A line of dots.

    Args:
        training: lines of one stand below its name.
        name: at its left.
        colour: of the dots.
        gains: one for each panel; ``None``: there is none.
    """

    training: str
    name: str
    colour: str
    gains: Sequence[Interval | None]


def panels(lines: Sequence[Line], titles: Sequence[str], level: float, decimals: int) -> str:
    """Return lines of dots on one axis as SVG.

    Args:
        lines: those whose gains are all nothing are left out.
        titles: of the panels.
        level: the unadapted score, of which the axis shows a share at least.
        decimals: of gains.
    """
    shown = [line for line in lines if any(g and g != _NOTHING for g in line.gains)]
    half = _half(level, [gain for line in shown for gain in line.gains if gain])
    left = 12 + _LETTER * max((len(line.name) for line in shown), default=0)
    parts, y, before = [], float(_LINE), ""
    parts += [
        _text(left + (place + 0.5) * _PANEL, y, title, "middle", bold=True)
        for place, title in enumerate(titles)
    ]
    for line in shown:
        if line.training != before:
            y += 1.3 * _LINE
            parts.append(_text(4, y, line.training, bold=True))
        before, y = line.training, y + _LINE
        parts.append(_text(10, y, line.name))
        for place, gain in enumerate(line.gains):
            if gain is not None:
                centre = left + (place + 0.5) * _PANEL
                parts.append(_dot(gain, centre, y - 4, half, line.colour, decimals))
    bottom = y + 0.6 * _LINE
    parts += [_axis(left + place * _PANEL, bottom, half) for place in range(len(titles))]
    width, height = left + len(titles) * _PANEL + 4, bottom + 1.5 * _LINE
    return (
        f"<div class='plot dots'><svg xmlns='http://www.w3.org/2000/svg' width='{width:.0f}' "
        f"height='{height:.0f}' viewBox='0 0 {width:.0f} {height:.0f}'>{''.join(parts)}</svg></div>"
    )


def _gains(results: Results, row: Row, columns: Columns) -> list[Interval | None]:
    """Return a row's gains; without an interval, as one of no width."""
    found: list[Interval | None] = []
    for stream, shift in columns.values():
        gain = results.gain(row, stream, shift) if results.has(row, stream) else None
        known = None if gain is None else results.interval(row, stream, shift)
        alone = None if gain is None else Interval(gain.mean, gain.mean, gain.mean)
        found.append(known or alone)
    return found


def _half(level: float, gains: Sequence[Interval]) -> float:
    """Return the end of the axis: as far as gains reach, but neither too little nor too much."""
    least = _SHARE * abs(level) or 1.0
    reach = max((max(-each.low, each.high) for each in gains), default=0.0)
    half = min(max(1.08 * reach, least), _MOST * least)
    unit = 10.0 ** (math.floor(math.log10(half)) - 1)
    return math.ceil(half / unit - 1e-9) * unit  # two digits


def _dot(gain: Interval, centre: float, y: float, half: float, colour: str, decimals: int) -> str:
    """Return a dot with its interval; beyond the axis, a number at its end."""
    style, scale = f".{decimals}f", 0.46 * _PANEL / half
    said = f"<title>{gain:{style}}</title>"
    if abs(gain.mean) > half:
        sign = math.copysign(1, gain.mean)
        number = f"◂ {gain.mean:+{style}}" if sign < 0 else f"{gain.mean:+{style}} ▸"
        anchor = "start" if sign < 0 else "end"
        x = centre + sign * 0.48 * _PANEL
        return f"<g fill='{colour}'>{said}{_text(x, y + 4, number, anchor)}</g>"
    low, high = (centre + scale * max(min(end, half), -half) for end in (gain.low, gain.high))
    return (
        f"<g stroke='{colour}' fill='{colour}'>{said}<path stroke-width='1.6' "
        f"d='M{low:.1f} {y:.1f}H{high:.1f}'/>"
        f"<circle cx='{centre + scale * gain.mean:.1f}' cy='{y:.1f}' r='2.8' stroke='none'/></g>"
    )


def _axis(left: float, bottom: float, half: float) -> str:
    """Return a panel's zero, its ends, and their numbers."""
    centre, reach = left + 0.5 * _PANEL, 0.46 * _PANEL
    lines = "".join(
        f"<path d='M{centre + side * reach:.1f} {1.4 * _LINE:.1f}V{bottom:.1f}' "
        f"stroke='{'#000' if side == 0 else '#ccc'}' stroke-width='0.8'/>"
        for side in (-1, 0, 1)
    )
    ends = (
        _text(centre + s * 0.34 * _PANEL, bottom + 12, f"{s * half:+.2g}", "middle")
        for s in (-1, 1)
    )
    return f"{lines}{''.join(ends)}{_text(centre, bottom + 12, '0', 'middle')}"


def _text(x: float, y: float, text: str, anchor: str = "start", *, bold: bool = False) -> str:
    weight = " font-weight='600'" * bold
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'{weight}>{html.escape(text)}</text>"
    )


def _colour(trainings: Sequence[str], training: str) -> str:
    """Return the colour of a training among others."""
    others = [name for name in dict.fromkeys(trainings) if name not in _COLOURS]
    if training in _COLOURS:
        return _COLOURS[training]
    return _OTHERS[others.index(training) % len(_OTHERS)]


def comparison(
    tables: Mapping[str, Sequence[Sequence[str]]], read: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return one HTML page of several benchmarks that needs nothing else.

    Args:
        tables: rows of cells by training, the head first.
        read: content of ``results.json`` by the name of its benchmark.
    """
    shown = "".join(
        f"<h2>{html.escape(training)}</h2><div class=wide>{as_html(rows)}</div>"
        for training, rows in tables.items()
    )
    drawn = "".join(
        f"<h3>{html.escape(name)}: {html.escape(str(found['metric']))}</h3>{_dots_of(found)}"
        for name, found in read.items()
    )
    return document(
        COMPARISON,
        f"<h1>{COMPARISON}</h1><p>A table for each training, a line for each benchmark and stream. "
        "Unadapted ways have their scores on the shifted samples, others their gain over the "
        "strongest unadapted way of the same model; a gain is an improvement. ± are standard "
        f"deviations over seeds.</p>{shown}<h2>Gain by benchmark</h2>"
        f"<p>{_CAPTION.replace('All panels have', 'Each benchmark has')}</p>{drawn}",
        style=_STYLE,
    )


COMPARISON = "IT3 comparison"


def _dots_of(found: Mapping[str, Any]) -> str:
    """Return the gains in saved results, a panel for each stream."""
    table = found["table"]
    streams = [name for name, each in table[0].items() if isinstance(each, Mapping)]
    streams = [name for name in streams if "gain" in table[0][name]]
    trainings = [entry["training"] for entry in table]
    lines = [
        Line(
            entry["training"],
            entry["row"],
            _colour(trainings, entry["training"]),
            [_saved_gain(entry.get(stream)) for stream in streams],
        )
        for entry in table
    ]
    sources = [e[s]["shifted"]["mean"] for e in table for s in streams if s in e]
    return panels(lines, streams, statistics.fmean(sources or [1.0]), found.get("decimals", 1))


def _saved_gain(cell: Mapping[str, Any] | None) -> Interval | None:
    if cell is None or cell["gain"] is None:
        return None
    mean = cell["gain"]["mean"]
    known = cell.get("interval")
    return Interval(**known) if known else Interval(mean, mean, mean)
