"""The README keeps its word: its Python blocks run in order, its commands name what exists."""

import pathlib
import re
import subprocess
import sys

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


def test_files_named_in_the_readme_exist():
    links = re.findall(r"\]\((?!\w+:|#)([^)#]+)", README.read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
