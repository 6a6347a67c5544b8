"""Rendering: a console, Markdown tables, and HTML in a single file."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 100  # of a file or a pipe
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
table.sections :is(th, td):nth-child(2) { text-align: right; }
tr.section th { border: 0; border-top: 1px solid var(--line); padding-top: .5rem; }
tr:hover { background: var(--soft); }
.wide { overflow-x: auto; } .small { font-size: .85rem; }
.small th, .small td { padding: .25rem .4rem; }
.plot svg { width: 100%; height: auto; background: #fff; }
pre { background: var(--soft); overflow-x: auto; padding: .8rem; }
"""


def console() -> Console:
    """Return the console of this terminal; of no terminal, one of 100 columns."""
    found = Console(markup=False, highlight=False)  # names may have square brackets
    given = found.is_terminal or "COLUMNS" in os.environ
    return found if given else Console(markup=False, highlight=False, width=_COLUMNS)


def document(title: str, body: str, *, style: str = "") -> str:
    """Return one HTML page that needs nothing else.

    Args:
        title: of the page.
        body: HTML.
        style: CSS besides that of all pages.

    >>> document("Results", "<h1>None</h1>").count("<h1>None</h1>")
    1
    """
    return (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(title)}</title>"
        f"<style>{_STYLE}{style}</style>{body}</html>"
    )


def as_markdown(rows: Sequence[Sequence[str]], *, left: Collection[int] = (0, 1)) -> str:
    """Return a table in Markdown, its columns aligned; the first row has the titles.

    Args:
        rows: of cells.
        left: indices of the columns of words; those of numbers are aligned to the right.

    >>> print(as_markdown([["at", "test", "score"], ["a", "b", "1.0"]]))
    | at  | test | score |
    | --- | ---- | ----: |
    | a   | b    |   1.0 |
    """
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    ruler = ["-" * w if at in left else "-" * (w - 1) + ":" for at, w in enumerate(widths)]
    return "\n".join(_padded(cells, widths, left) for cells in [rows[0], ruler, *rows[1:]])


def _padded(cells: Sequence[str], widths: Sequence[int], left: Collection[int]) -> str:
    pairs = enumerate(zip(cells, widths, strict=True))
    return f"| {' | '.join(c.ljust(w) if at in left else c.rjust(w) for at, (c, w) in pairs)} |"


def as_html(rows: Sequence[Sequence[str]], *, sections: bool = False) -> str:
    """Return a table in HTML; the first row has the titles.

    Args:
        rows: of cells.
        sections: the first cell is a line of its own where it is another than above.
    """
    skip, body, before = int(sections), "", ""
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in rows[0][skip:])
    for row in rows[1:]:
        if sections and row[0] != before:
            span = len(row) - skip
            body += f"<tr class=section><th colspan={span}>{html.escape(row[0])}</th></tr>\n"
        before = row[0]
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row[skip:])
        body += f"<tr>{cells}</tr>\n"
    kind = " class=sections" * sections
    return f"<table{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def svg(figure: Figure) -> str:
    """Return a figure as SVG, ready to stand in a page; the same figure as the same text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "it3"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
