"""The README keeps its word: its Python blocks run in order, its commands name what exists."""

import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import _report, readme
from jmp_lite import cli

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"
EXAMPLE_COMMAND = "pip install -e '.[examples]' && python examples/digits.py"
TEST_COMMAND = "pip install -e '.[test]' && pytest"


def python_blocks(text):
    """The program made of all ```python blocks, each line where it stands in the page."""
    lines, inside, blocks = [], False, 0
    for line in text.splitlines():
        fence = line.strip().startswith("```")
        if fence:
            inside = line.strip() == "```python"
            blocks += inside
        lines.append(line if inside and not fence else "")
    return "\n".join(lines) + "\n", blocks


def test_blocks_are_found_in_place():
    text = "a\n```python\nx = 1\n```\n```text\nno\n```\n```python\ny = 2\n```\n"
    assert python_blocks(text) == ("\n\nx = 1\n\n\n\n\n\ny = 2\n\n", 2)


def test_python_blocks_run_in_order_as_one_program(tmp_path):
    program, blocks = python_blocks(README.read_text())
    assert blocks > 0
    script = tmp_path / "README.md"  # lines of a traceback are lines of the page
    script.write_text(program)
    process = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr


def test_quick_start_is_two_commands():
    lines = {line.strip() for line in README.read_text().splitlines()}
    assert {EXAMPLE_COMMAND, TEST_COMMAND} <= lines


# --- Claims ---


def test_figures_are_those_of_the_benchmarks():
    """`python -m benchmarks.readme` writes them again."""
    assert readme.quoted(README.read_text()) == readme.block(_report.RESULTS.read_text())


def test_figure_stands_in_the_table():
    table = readme.Table(["model", "MB", "/ hand", "temp", "/ hand"], [["GPT", "7", "1.5", "2", "0.5"]])
    assert table.cell("GPT", "/ hand") == "1.5"
    assert table.cell("GPT", "temp > / hand") == "0.5"
    assert readme.Claim("bytes", {"a": 2.0, "b": 0.01}, "python -m benchmarks.x --fast").line() == (
        "| bytes | 0.01 (b) | 2.00 (a) | `benchmarks.x` |"
    )


def test_no_figure_stands_outside_of_the_tables():
    text = README.read_text().replace(readme.quoted(README.read_text()), "")
    prose = re.sub(r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)", "", text, flags=re.DOTALL)
    versions = r"(Python|JAX|Flax|jmp|mpx|torch\.amp|Apache) [\d.]+"
    assert re.findall(r"\b\d+\.\d+(?:\.\d+)?\b", re.sub(versions, "", prose)) == []


def test_change_is_the_one_that_the_program_has():
    [change] = re.findall(r"```diff\n(.*?)```", README.read_text(), re.DOTALL)
    program = {line.partition("  #")[0].strip() for line in python_blocks(README.read_text())[0].splitlines()}
    added = [line[1:].strip() for line in change.splitlines() if line.startswith("+")]
    assert len(added) == 3
    assert [line for line in added if line not in program] == []


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`jmp-lite (\w+)", README.read_text()))))
def test_commands_of_the_command_line_exist(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0


def test_benchmarks_named_exist():
    named = set(re.findall(r"python -m (benchmarks\.[\w.]+\w)", README.read_text()))
    named |= {f"benchmarks.{name}" for name in re.findall(r"\| `([\w.]+)` \|$", README.read_text(), re.MULTILINE)}
    assert len(named) > 5
    assert [name for name in named if importlib.util.find_spec(name) is None] == []


# --- Links ---


def slug(heading):
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(file):
    text = re.sub(r"```.*?```", "", (ROOT / file).read_text(), flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def test_places_that_links_name_exist():
    links = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", README.read_text())
    assert links
    assert [link for link in links if link[1] not in anchors(link[0])] == []


def test_files_named_in_the_readme_exist():
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
