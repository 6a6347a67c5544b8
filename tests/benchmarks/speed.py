"""Times the engine and the layers against others: ``python tests/benchmarks/speed.py``.

Writes ``results.json`` and ``page.html``. Needs ``pip install it3_lightning[benchmarks]``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from costs import (
    against_peer,
    alone,
    curves,
    fast_paths,
    sequence_layers,
    tables,
    under_trainer,
)
from costs.extent import FULL, QUICK, Extent
from costs.items import Item, Job
from costs.page import page
from costs.results import Results, machine
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from it3_lightning.benchmark.scoring import threads


def jobs(extent: Extent, device: torch.device) -> list[Job]:
    """Return all comparisons and curves."""
    parts = against_peer, under_trainer, alone, fast_paths, sequence_layers, curves
    return [job for part in parts for job in part.jobs(extent, device)]


def measured(todo: Sequence[Job]) -> list[Item]:
    """Run the jobs one after the other, with a progress bar."""
    found: list[Item] = []
    with Progress(
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    ) as bar:
        task = bar.add_task("", total=len(todo))
        for job in todo:
            bar.update(task, description=job.label)
            found += job.run()
            bar.advance(task)
        bar.update(task, description="done")
    return found


def run(extent: Extent, device: torch.device, *, number: int) -> Results:
    """Measure everything on a number of threads."""
    started = time.perf_counter()
    with threads(number):
        found = measured(jobs(extent, device))
    minutes = (time.perf_counter() - started) / 60
    cpu = extent.plan.clock is time.process_time
    about = {
        **machine(device, number),
        "times": "CPU seconds of the process" if cpu else "seconds passed",
        "extent": extent.name,
        "measured in": f"{minutes:.1f} minutes",
    }
    return Results.of(found, about)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON and a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="everything tiny, in a minute")
    parser.add_argument("--device", default="cpu", type=torch.device, help="cpu, cuda, cuda:1")
    parser.add_argument("--threads", default=1, type=int, help="that PyTorch has on the CPU")
    parser.add_argument("--cpu-time", action="store_true", help="on a busy machine, without a GPU")
    parser.add_argument("--output", default=Path("results/speed"), type=Path, help="folder")
    given = parser.parse_args(arguments)
    if given.cpu_time and given.device.type == "cuda":
        parser.error("expected --cpu-time without a GPU, whose time it does not see; drop one")
    extent = QUICK if given.quick else FULL
    given.output.mkdir(parents=True, exist_ok=True)
    extent = extent.by_cpu_time() if given.cpu_time else extent
    results = run(extent, given.device, number=given.threads)
    results.save(given.output / "results.json")
    (given.output / "page.html").write_text(page(results))
    tables.show(results, f"{results.summary} Written to {given.output}: page.html, results.json")


if __name__ == "__main__":
    main()
