"""How Sphinx builds the documentation: sphinx-build -W -b html docs build/docs."""

from importlib.metadata import version as _version

project = "it3_lightning"
version = release = _version("it3_lightning")
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["*.py"]
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
