"""How Sphinx makes the site of these pages: `make docs`."""

from __future__ import annotations

from zfabric.version import __version__

project = "zfabric"
author = "The zfabric authors"
copyright = author  # noqa: A001 — Sphinx calls it so
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinxcontrib.mermaid",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["**/.*"]
root_doc = "index"
# Single backticks in docstrings are code.
default_role = "code"

# Headings are called in links as they are on GitHub, where the pages are read too.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "fieldlist"]
myst_fence_as_directive = ["mermaid"]

html_theme = "furo"
html_title = f"zfabric {release}"
html_show_copyright = False
html_extra_path = ["monitoring"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
