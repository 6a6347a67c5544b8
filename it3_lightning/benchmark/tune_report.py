"""Report of tuning: an aligned table, ``tuning.md``, and the lines to put into a configuration."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.table import Table

from it3_lightning.benchmark.rendering import fitting
from it3_lightning.benchmark.results import Cell
from it3_lightning.benchmark.tune import Tuned
from it3_lightning.benchmark.tune_rules import Verdict, is_clean

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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tuning.md").write_text(tuning_markdown(tuned) + "\n")
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
