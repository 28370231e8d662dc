"""Text for people and pipes: tables, the bar on standard error, help, and commands as rows."""

import io
import re
import subprocess
import sys

import pytest

from jmp_lite import cli
from jmp_lite._text import table
from jmp_lite.cli import _commands, _progress, _text

TABLE = ("A title", ["name", "count"], [["[red]a[/red]", "1"], ["b", "22"]])


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_columns_are_aligned_to_their_sides():
    """Numbers end together, words begin together, no line ends in spaces."""
    assert table(["name", "n"], [["a", "1"], ["bcdef", "22"]], is_right=[False, True]).splitlines() == [
        "name    n",
        "a       1",
        "bcdef  22",
    ]


def test_table_for_a_pipe_is_plain():
    """No escape sequence reaches a file."""
    assert _text.titled(*TABLE, is_right=[False, True]).splitlines()[:3] == ["A title", "", "name          count"]


def test_table_for_a_terminal_is_drawn(monkeypatch):
    """By rich, which takes nothing in a cell for markup."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    drawn = _text.titled(*TABLE, is_right=[False, True])
    assert "\x1b[" in drawn
    assert "[red]a[/red]" in re.sub(r"\x1b\[[0-9;]*m", "", drawn)


def test_table_for_a_terminal_without_rich_is_plain(monkeypatch):
    """Rich is optional."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    for name in ("rich", "rich.box"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "\x1b[" not in _text.titled(*TABLE, is_right=[False, True])


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("has_rich", [True, False])
def test_bar_is_drawn_on_a_terminal_with_rich(monkeypatch, is_terminal, has_rich):
    """Elsewhere nothing is."""
    stream = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    if not has_rich:
        for name in ("rich", "rich.console"):
            monkeypatch.setitem(sys.modules, name, None)
    with _progress.progress(2) as begin:
        begin("first part")
        begin("second part")
    assert ("second part" in stream.getvalue()) == (is_terminal and has_rich)


@pytest.mark.parametrize("command", _commands.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_help_in_sentences(capsys, command):
    """Its line is in the list of all, and opens its own page; every argument says what it is for."""
    pages = []
    for arguments in (["--help"], [command.name, "--help"]):
        with pytest.raises(SystemExit) as exit_:
            cli.main(arguments)
        assert exit_.value.code == 0
        pages.append(" ".join(capsys.readouterr().out.split()))
    assert f"{command.name} {command.help}" in pages[0]
    assert f"{command.help[0].upper()}{command.help[1:]}." in pages[1]
    assert all(argument.settings["help"] for argument in command.arguments)


def test_import_of_the_library_leaves_the_command_line_alone():
    """Nor does a command that needs no optimizer bring Optax."""
    program = "import sys, jmp_lite\nassert 'jmp_lite.cli' not in sys.modules\nimport jmp_lite.cli\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"optax", "matplotlib", "rich"} & set(done.stdout.split()) == set()
