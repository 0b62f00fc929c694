"""The documentation as a site: `sphinx-build -W -c docs . output/docs`, then open its `index.html`.

The pages are the repository's own files, where they lie, so that a link leads to the same place on
the site and in a checkout. `docs/make_keys.py` and `tract-det bench paper` write those that are
generated, and tests hold them to it.
"""

from tract_det.version import __version__

project = "tract_det"
author = "the tract_det authors"
copyright = author
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/*.ipynb",
    "benchmarks/*.md",
    "benchmarks/results/*/*.md",
    "tract_det/d2/README.md",
]
nitpicky = False

nb_execution_mode = "off"  # the notebook is shown as it is kept; a test runs it
myst_heading_anchors = 3  # as code hosts make them

napoleon_use_ivar = True  # attributes are described in their class, once
default_role = "code"  # single backticks in docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = f"tract_det {release}"
html_extra_path = ["site"]  # index.html, which leads to the first page
html_show_sphinx = False
