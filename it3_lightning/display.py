"""What results are shown in: a console as wide as its tables, a page that needs nothing else."""

from __future__ import annotations

import html
import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
th { border-bottom: 2px solid var(--line); font-weight: 600; vertical-align: bottom; }
tr.first td { border-top: 1px solid var(--line); }
tr:hover { background: var(--soft); }
.wide { overflow-x: auto; } .plot svg { width: 100%; height: auto; background: #fff; }
pre { background: var(--soft); overflow-x: auto; padding: .8rem; }
"""


def fitting(*tables: Table) -> Console:
    """Return a console as wide as the tables need: one that wraps cannot be read."""
    console = Console()
    needed = max(Console(width=400).measure(each).maximum for each in tables)
    return Console(width=needed) if needed > console.width else console


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
        f"<meta name=viewport content='width=device-width'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}{style}</style>{body}</html>"
    )


def svg(figure: Figure) -> str:
    """Return a figure as SVG, ready to stand in a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]
