"""Ends each executed page with a link to it as a Jupyter notebook."""

from sphinx.application import Sphinx

LINK = "\n\n---\n\nDownload this page as {{nb-download}}`a notebook <{name}.ipynb>`.\n"


def add_link(app: Sphinx, page: str, source: list[str]) -> None:
    """Appends the link to the source of a page that holds cells."""
    if source[0].startswith("---\nfile_format: mystnb"):
        source[0] += LINK.format(name=page.rpartition("/")[2])


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the links."""
    app.connect("source-read", add_link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
