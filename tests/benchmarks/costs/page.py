"""The results as one HTML page: tables, pictures, and how they were made."""

from __future__ import annotations

from html import escape

from costs import plots, tables
from costs.items import Row
from costs.results import Results
from costs.tables import Sheet
from it3_lightning.benchmark.rendering import document

_STYLE = """
table.named th:nth-child(2), table.named td:nth-child(2) { text-align: right; }
table.figures th, table.figures td { text-align: right !important; }
table.figures { width: auto; }
.ok { color: #1a7f37; font-weight: 600; } .missed { color: #c62f3e; font-weight: 600; }
small { display: block; opacity: .65; white-space: normal; max-width: 23rem; }
.wide td:first-child { white-space: normal; } .wide th, .wide td { padding: .3rem .5rem; }
"""

_HOW = """<p>Medians over rounds; in every round each of the compared has its turn, in one process.
Calls under 50 ms are made twice in a turn, and the second counts. The ratio is the median of those
within a round, so not quite that of the medians; beside it stand its quartiles. Of adaptation: the
published objective, one step of Adam with the same learning rate on the same network and batch,
the final prediction included, nothing measured besides. Of layers over sequences: microseconds a
token.</p>
<p><em>torch-ttt</em> adapts all weights, with live weights in both passes, on a copy of the network
that it makes for every batch; its embedder is built before anything is timed. <em>Its passes</em>:
the first forward, the second from where the prior enters, the distance, the backward, the final
forward without a graph; <em>with update</em>: the same and one pass through the memory of weights,
gradients and new weights. <em>A plain loop</em>: all of that in one go, as written by hand.
<em>Activations</em>: what autograd keeps of both passes.</p>"""


def page(results: Results) -> str:
    """Return the page."""
    body = [
        "<h1>What adaptation costs</h1>",
        f"<p><strong>{results.summary}</strong> {_busy(results)}</p>{_HOW}",
        "<h2>Times faster than torch-ttt</h2>",
        f"<div class=plot>{plots.speedups(results)}</div>",
    ]
    sections = zip(tables.comparisons(results), results.sections().values(), strict=True)
    body += [_table(sheet, rows) for sheet, rows in sections]
    body += ["<h2>Time over size</h2>", f"<div class=plot>{plots.curves(results)}</div>"]
    body += [_table(sheet, kind="figures") for sheet in tables.curves(results)]
    body.append(_table(tables.deeds(results)))
    about = "\n".join(f"{name}: {value}" for name, value in results.about.items())
    body.append(f"<h2>Made with</h2><pre>{escape(about)}</pre>")
    return document("What adaptation costs", "\n".join(body), style=_STYLE)


def _busy(results: Results) -> str:
    if results.running > 0.95:
        return ""
    return (
        f"The machine was busy: in one of the comparisons the process had {results.running:.0%} "
        "of the time, so run this again before you believe a figure."
    )


def _table(sheet: Sheet, rows: list[Row] | None = None, *, kind: str = "") -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in sheet.headers)
    body = []
    for index, cells in enumerate(sheet.rows):
        note = f"<small>{escape(rows[index].note)}</small>" if rows and rows[index].note else ""
        first, *others = cells
        line = f"<td>{escape(first)}{note}</td>" + "".join(map(_cell, others))
        body.append(f"<tr class=first>{line}</tr>")
    return (
        f"<h2>{escape(sheet.title)}</h2><div class=wide><table class='{kind}'><thead><tr>{titles}"
        f"</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    kind = f" class={text}" if text in ("ok", "missed") else ""
    return f"<td{kind}>{escape(text)}</td>"
