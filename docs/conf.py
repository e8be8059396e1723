"""Sphinx: MyST pages, and the API from the docstrings. Built by `make docs` with warnings as errors."""

from __future__ import annotations

import tilewise

project = "tilewise"
author = "the tilewise authors"
copyright = "the tilewise authors, Apache-2.0"
version = release = tilewise.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tilewise {version}"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False
