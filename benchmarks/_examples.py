"""Modules of `examples/`, which are scripts and no package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

_FOLDER = str(Path(__file__).parents[1] / "examples")


def module(name: str) -> Any:
    """Imports a module of the examples, such as `_gpt_data`."""
    if _FOLDER not in sys.path:
        sys.path.insert(0, _FOLDER)
    return importlib.import_module(name)
