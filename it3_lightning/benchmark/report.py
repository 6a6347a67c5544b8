"""Reports: what a benchmark prints and writes, several benchmarks compared, and tuning."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table

from it3_lightning.benchmark.advice import advice, callback_yaml, lines
from it3_lightning.benchmark.distance_report import as_text, picture
from it3_lightning.benchmark.intervals import Cell
from it3_lightning.benchmark.page import COMPARISON, comparison, page
from it3_lightning.benchmark.rendering import as_markdown, console
from it3_lightning.benchmark.results import Results
from it3_lightning.benchmark.tables import (
    BY_STREAM,
    TOLD,
    by_shift,
    by_stream,
    markdown,
    separation,
    terminal,
)
from it3_lightning.benchmark.tune import Tuned
from it3_lightning.benchmark.tune_rules import Verdict, is_clean
from it3_lightning.utils.files import read_json, write, write_json

_FILES = ("distances.svg", "page.html", "results.csv", "results.json", "table.md", "tensorboard")
_STREAMS = ("equal", "unequal")
_OURS = ".it3"  # at the end of the scalars that are written here, and replaced


def show(results: Results, folder: Path) -> None:
    """Print the verdict and the tables; write them, and all that they are made of, into the folder.

    Files are ``table.md``, ``page.html`` and ``distances.svg``; ``tensorboard`` where that is
    installed.
    """
    verdict, paste = _verdict(results, folder)
    shown = console()
    for about, text in verdict:
        shown.print(Padding(f"{about}: {text}" if about else text, (0, 0, 0, 2 * bool(about))))
    if paste:
        shown.print(Padding(f"paste into your configuration:\n{paste}", (0, 0, 0, 2)))
    shown.print(*terminal(results), sep="\n")
    listed = "\n".join(f"- {about}: {text}" for about, text in verdict[1:])
    parts = [f"**{verdict[0][1]}**", listed, f"```yaml\n{paste}```"] if verdict else []
    parts = [part for part in parts if part not in ("", "```yaml\n```")]
    parts += [f"{results.title}; a gain is an improvement.", markdown(results)]
    if len(results.streams) > 1:
        parts.append(f"{BY_STREAM}\n\n{as_markdown(by_stream(results))}")
    parts += [f"Gain by shift, stream {s}:\n\n{by_shift(results, s)}" for s in results.streams]
    if told := separation(results):
        parts.append(f"{TOLD}\n\n{as_markdown(told)}")
    parts += as_text(results)
    write(folder / "table.md", "\n\n".join(parts) + "\n")
    write(folder / "page.html", page(results, verdict, paste))
    if drawn := picture(results):
        write(folder / "distances.svg", drawn)
    write_scalars(results, folder)
    files = sorted(name for name in _FILES if (folder / name).exists())
    shown.print(f"Written to {folder}: {', '.join(files)}")


def write_scalars(results: Results, folder: Path) -> bool:
    """Write scores by seed and gains into ``tensorboard``; return whether it is installed.

    ``tensorboard --logdir FOLDER/tensorboard`` shows the rows beside each other: ``STREAM/SHIFT``
    has the score of each seed as a step, ``gain/STREAM`` the mean gain over the shifts.

    Args:
        results: of a benchmark.
        folder: of its output.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return False
    place = folder / "tensorboard"
    for former in place.glob(f"*/events.out.tfevents.*{_OURS}"):
        former.unlink()
    for row in results.rows:
        name = f"{row.training}, {row.name}".replace("/", "_")
        with SummaryWriter(str(place / name), filename_suffix=_OURS) as writer:
            for record in results.records:
                if (record.training, record.row) == (row.training, row.name):
                    tag = f"{record.stream.replace('/', ' ')}/{record.shift.replace('/', ' ')}"
                    writer.add_scalar(tag, record.score, record.seed)
            for stream in results.streams:
                gain = results.gain(row, stream) if results.has(row, stream) else None
                if gain is not None:
                    tag = f"gain/{stream.replace('/', ' ')}"
                    writer.add_scalar(tag, gain.mean, 0)
    return True


def _verdict(results: Results, folder: Path) -> tuple[list[tuple[str, str]], str]:
    """Return the advice in words, with what tuning has chosen, and the lines to paste."""
    found = advice(results)
    if found is None:
        text = "No verdict: one seed, and no scores of single samples. Run several seeds."
        return [("", text), ("it3 tune", _chosen_before(folder))], ""
    said = [*lines(results, found), ("it3 tune", _chosen_before(folder))]
    if found.chosen is not None:
        said.append(("how sure", _CHOSEN_HERE.format(found.judged)))
    return said, callback_yaml(found.row)


_CHOSEN_HERE = (
    "the best of {} on these very test samples, so its gain is a little flattered; it3 tune "
    "chooses on validation samples under other shifts"
)
_TUNED = "tuning.json"


def _chosen_before(folder: Path) -> str:
    """Return what tuning has chosen in a folder, in words."""
    file = folder / _TUNED
    if not file.is_file():
        return "not run in this folder; it chooses on validation samples under other shifts"
    try:
        found = read_json(file)
        return f"chose {found['chosen']} ({found['seeds']} seeds, {found['against']}); tuning.md"
    except (ValueError, KeyError) as error:
        return f"{file} is damaged ({type(error).__name__}: {error}); run it3 tune again"


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
    return _compared(_read(folders))


def write_comparison(folders: Sequence[Path], file: Path) -> str:
    """Write the tables of :func:`overview`, and gains as dots, as one HTML page; return the tables.

    Args:
        folders: see :func:`overview`.
        file: to write; a comparison of before is replaced.

    Raises:
        FileExistsError: there is another file.
    """
    read = _read(folders)
    if file.exists() and f"<title>{COMPARISON}</title>" not in file.read_text(errors="replace"):
        raise FileExistsError(
            f"Expected a new file, or a comparison of before, got another that would be written "
            f"over: {file}. Give another name as --page."
        )
    write(file, comparison({name: _ways(read, name) for name in _trainings(read)}, read))
    return _compared(read)


def _read(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Return the results in folders by their names."""
    paths = list(dict.fromkeys(folder.absolute() for folder in folders))
    return {_name_among(paths, path): _results_in(path) for path in paths}


def _name_among(paths: Sequence[Path], path: Path) -> str:
    """Return the shortest end of a path that no other path has."""
    for count in range(1, len(path.parts)):
        end = path.parts[-count:]
        if [other.parts[-count:] for other in paths].count(end) == 1:
            return Path(*end).as_posix()
    return path.as_posix()


def _compared(read: dict[str, dict[str, Any]]) -> str:
    return "\n\n".join(
        f"**{training}**\n\n{as_markdown(_ways(read, training), left=(0,))}"
        for training in _trainings(read)
    )


def _trainings(read: dict[str, dict[str, Any]]) -> list[str]:
    return _in_order(entry["training"] for found in read.values() for entry in found["table"])


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
    title = f"{tuned.title}: {_against(tuned)}"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, title in enumerate(_TITLES):
        justify = "left" if index in (0, 4, 5) else "right"
        shown.add_column(title, justify=justify, no_wrap=bool(index))  # type: ignore[arg-type]
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
    shown = console()
    shown.print(tuning_table(tuned))
    shown.print(f"Chosen: {_chosen(tuned)}.")
    shown.print(tuned.yaml())
    write(folder / "tuning.md", tuning_markdown(tuned) + "\n")
    chosen = {"chosen": _chosen(tuned), "seeds": len(tuned.seeds), "against": _against(tuned)}
    write_json(folder / _TUNED, {**chosen, "yaml": tuned.yaml()})
    shown.print(f"Written to {folder}: tuning.md")


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
