"""Writes the results of a benchmark into a folder: every score in CSV, all of it in JSON."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from it3_lightning.benchmark.distance_table import lines
from it3_lightning.benchmark.record import Record
from it3_lightning.benchmark.rows import Row

if TYPE_CHECKING:
    from it3_lightning.benchmark.results import Results


def write(results: Results, folder: Path) -> None:
    """Write ``results.csv`` and ``results.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Record)])
        writer.writeheader()
        writer.writerows(asdict(record) for record in results.records)
    content = {
        "metric": results.metric,
        "higher_is_better": results.higher_is_better,
        "decimals": results.decimals,
        "about": results.about,
        "table": [_summary(results, row) for row in results.rows],
        "records": [asdict(record) for record in results.records],
        "separations": [asdict(record) for record in results.separations],
        "distances": [asdict(line) for line in lines(results.distances)],
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1))


def _summary(results: Results, row: Row) -> dict[str, Any]:
    summary: dict[str, Any] = {"training": row.training, "row": row.name}
    for stream in results.streams:
        gain, error = results.gain(row, stream), results.corruption_error(row, stream)
        summary[stream] = {
            "clean": asdict(results.clean(row, stream)),
            "shifted": asdict(results.shifted(row, stream)),
            "gain": None if gain is None else asdict(gain),
            **({} if error is None else {"mean_corruption_error": asdict(error)}),
        }
    summary["ms_per_sample"] = results.milliseconds(row)
    return summary
