"""Several benchmarks side by side: what every way to predict gains in each of them.

One table for each training: a line for each benchmark and stream, a column for each way. Scores of
the unadapted ways are those on the shifted samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from it3_lightning.benchmark.cell import Cell
from it3_lightning.display import as_markdown

_STREAMS = ("equal", "unequal")


def overview(folders: Sequence[Path]) -> str:
    """Return the tables of several benchmarks in aligned Markdown.

    Args:
        folders: outputs of ``it3 benchmark``; a table's lines are named after them.

    Raises:
        FileNotFoundError: a folder holds no ``results.json``.
    """
    read = {folder.name: _read(folder) for folder in folders}
    trainings = _in_order(entry["training"] for found in read.values() for entry in found["table"])
    return "\n\n".join(
        f"**{training}**\n\n{as_markdown(_table(read, training), left=(0,))}"
        for training in trainings
    )


def _read(folder: Path) -> dict[str, Any]:
    file = folder / "results.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected results.json in {folder}, as it3 benchmark writes it, found none. Run it3 "
            f"benchmark with --benchmark.output {folder} first."
        )
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def _table(read: dict[str, dict[str, Any]], training: str) -> list[list[str]]:
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
