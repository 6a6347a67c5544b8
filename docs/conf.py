"""How Sphinx builds the documentation: sphinx-build -W -b html docs build/docs."""

import sys
from importlib.metadata import version as _version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from cells import PAGES, page, printed_by, script

project = "it3_lightning"
version = release = _version("it3_lightning")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["*.py", "printed"]
html_theme = "furo"
html_title = "it3_lightning"
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say shapes and units
autodoc_member_order = "bysource"
add_module_names = False
napoleon_use_ivar = True


def _with_cells(app: Any, name: str, source: list[str]) -> None:
    """Put the cells of an example in the place of its page."""
    if name in PAGES:
        source[0] = page(script(name), printed_by(name))


def setup(app: Any) -> None:
    """Read the examples in cells as pages."""
    app.connect("source-read", _with_cells)
