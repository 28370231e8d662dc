"""The command line. Its commands are one table, ``_commands``; each group of them is a file that returns text."""

from jmp_lite.cli._main import main as main

__all__ = ["main"]
