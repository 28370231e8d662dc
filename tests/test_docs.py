"""The manual fits its pages: cells are no wider than a page, names of commands and files exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
COLUMNS = 88  # what a cell shows in a window of 1300 pixels


def cells(text):
    return re.findall(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_there_are_cells_to_look_at():
    assert sum(len(cells(page.read_text())) for page in PAGES) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_cells_need_no_scroll_bar(page):
    lines = [line for cell in cells(page.read_text()) for line in cell.splitlines()]
    assert [line for line in lines if len(line) > COLUMNS] == []


@pytest.mark.parametrize("script", sorted((ROOT / "docs/quickstart").glob("*.py")), ids=lambda script: script.name)
def test_scripts_need_no_scroll_bar(script):
    assert [line for line in script.read_text().splitlines() if len(line) > COLUMNS] == []
