"""The results as tables of text: for the terminal, and cell by cell for the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from costs.curves import ENGINES
from costs.items import Row
from costs.results import Results


@dataclass(frozen=True)
class Sheet:
    """A table of text.

    Args:
        title: above it.
        headers: of the columns.
        rows: as many cells each.
        left: number of columns that are aligned left, from the first.
    """

    title: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int = 1


def comparisons(results: Results) -> list[Sheet]:
    """Return a sheet for every section of rows."""
    return [_comparison(title, rows) for title, rows in results.sections().items()]


def curves(results: Results) -> list[Sheet]:
    """Return a sheet for every axis and network: milliseconds of a call, by engine."""
    return [
        Sheet(
            f"{network}: ms a call, over {axis}",
            (axis, *ENGINES),
            tuple(
                (f"{at:,}", *(_figure(engines.get(name, {}).get(at)) for name in ENGINES))
                for at in sorted({at for places in engines.values() for at in places})
            ),
            left=0,
        )
        for (axis, network), engines in results.curves().items()
    ]


def deeds(results: Results) -> Sheet:
    """Return a sheet of what each engine does."""
    headers = ("case", "engine", "weights", "forwards", "backwards", "calls answered")
    rows = tuple(
        (d.case, d.engine, f"{d.weights:,}", *map(str, (d.forwards, d.backwards, d.answered)))
        for d in results.deeds
    )
    return Sheet("What is run in one call", headers, rows, left=2)


def show(results: Results, last: str) -> None:
    """Print all sheets, as wide as they need to be, and a last line."""
    sheets = (*comparisons(results), *curves(results), deeds(results))
    tables = [_table(sheet) for sheet in sheets if sheet.rows]
    console = _fitting(*tables)
    for table in tables:
        console.print(table, "")
    console.print(last)


def _fitting(*tables: Table) -> Console:
    """Return a console as wide as the tables need: one that wraps cannot be read."""
    console = Console(markup=False)
    needed = max(Console(width=400, markup=False).measure(each).maximum for each in tables)
    return Console(width=needed, markup=False) if needed > console.width else console


def _table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify="left")
    for index, title in enumerate(sheet.headers):
        side: Literal["left", "right"] = "left" if index < sheet.left else "right"
        table.add_column(title, justify=side, no_wrap=True)
    for row in sheet.rows:
        table.add_row(*map(_coloured, row))
    return table


def _comparison(title: str, rows: list[Row]) -> Sheet:
    unit, updated = rows[0].unit, any(row.with_update is not None for row in rows)
    most = rows[0].required is not None and rows[0].required.at_most
    ratio = "ours / other" if most else "other / ours"
    headers = ["case", "against", f"ours, {unit}", f"other, {unit}", ratio, "quartiles"]
    headers += ["required", "verdict", *["with update"] * updated]
    return Sheet(title, tuple(headers), tuple(_cells(row, updated) for row in rows), left=2)


def _cells(row: Row, updated: bool) -> tuple[str, ...]:
    quartiles = "" if row.quartiles is None else "{:.2f} to {:.2f}".format(*row.quartiles)
    cells = [row.case, row.against, _figure(row.ours), _figure(row.other), f"{row.ratio:.2f}"]
    cells += [quartiles, "" if row.required is None else str(row.required), row.verdict]
    if updated:
        cells.append("" if row.with_update is None else f"{row.with_update:.2f}")
    return tuple(cells)


def _figure(value: float | None) -> str:
    """Return three digits, or more before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _coloured(cell: str) -> str:
    return {"ok": "[green]ok[/]", "missed": "[red]missed[/]"}.get(cell, cell)
