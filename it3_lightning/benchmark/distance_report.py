"""Shows the idempotence distances of a benchmark: histograms, and tables of what they say."""

from __future__ import annotations

import html

from it3_lightning.benchmark.distance_figure import figure
from it3_lightning.benchmark.distance_table import beyond_table, lines, median_table
from it3_lightning.benchmark.results import Results
from it3_lightning.display import as_html, as_markdown, svg

_TITLE = "Idempotence distance of training, validation and test samples"
_CAPTION = (
    "One histogram a line, each as high as its highest bin; a severity has equally many samples of "
    "every shift, and seeds are pooled. An upright stroke marks the median. The distance is on a "
    "logarithmic axis; what lies beyond its ends, exact zeros too, is in the outermost bins."
)
_BEYOND = (
    "Samples whose distance exceeds that of 95 % of the validation samples, with the same weights, "
    "in percent."
)


def picture(results: Results) -> str | None:
    """Return the histograms as SVG; None where nothing was measured, or without matplotlib."""
    if not results.distances:
        return None
    try:
        return svg(figure(results.distances, unit=_distance(results)))
    except ImportError:
        return None


def as_text(results: Results) -> list[str]:
    """Return titles and tables in Markdown, a part each; none where nothing was measured."""
    return [f"{title}\n\n{as_markdown(rows)}" for title, rows in _tables(results)]


def as_page(results: Results) -> str:
    """Return the histograms and the tables in HTML; nothing where nothing was measured."""
    tables = _tables(results)
    if not tables:
        return ""
    drawn = picture(results) or "<p>Install <code>it3_lightning[plots]</code> for the plot.</p>"
    shown = "".join(
        f"<p>{html.escape(title)}</p><div class='wide small'>{as_html(rows)}</div>"
        for title, rows in tables
    )
    return f"<h2>{_TITLE}</h2><p>{_CAPTION}</p><div class=plot>{drawn}</div>{shown}"


def _tables(results: Results) -> list[tuple[str, list[list[str]]]]:
    """Return the tables with their titles."""
    found = lines(results.distances)
    if not found:
        return []
    rows, power = median_table(found)
    unit = "" if power == "1" else f", in units of {power}"
    median = f"Median idempotence distance{_distance(results, ' ({})')}{unit}."
    return [(median, rows), (_BEYOND, beyond_table(found))]


def _distance(results: Results, form: str = "({})") -> str:
    """Return the name of the distance, as it stands in the settings."""
    settings = results.about.get("settings", {}).get("benchmark", {})
    name = settings.get("recipe", {}).get("distance")
    return form.format(name) if name else ""
