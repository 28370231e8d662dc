"""Sphinx configuration: every page is executed, nothing is fetched, warnings are meant to be fatal (``-W``).

A cell that fails or runs out of time is a warning that shows the cell; the other pages are written all the same.
"""

import os
import pathlib
import sys

DOCS = pathlib.Path(__file__).parent
sys.path.insert(0, str(DOCS / "ext"))

# Pages and doctests run on the CPU, wherever they are built.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"

import jmp_lite  # noqa: E402

project = "jmp_lite"
author = "the jmp_lite authors"
project_copyright = author
version = release = jmp_lite.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
    "coverage_check",
    "notebook_links",
]
exclude_patterns = ["_build", "jupyter_execute"]

# --- Pages ---

nb_execution_mode = "force"
nb_execution_show_tb = True
nb_execution_timeout = 120  # seconds for one cell
nb_merge_streams = True
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# --- API ---

autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
add_module_names = False
maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# --- Look: the theme brings its own scripts and uses the fonts of the reader's system ---

html_theme = "furo"
html_title = f"jmp_lite {version}"
html_static_path = ["_static"]
html_css_files = ["jmp_lite.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
html_theme_options = {"navigation_with_keys": True}
copybutton_selector = "div:not(.output) > div.highlight pre"
