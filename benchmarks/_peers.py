"""Designs that need libraries which may not be installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

D = TypeVar("D")


def build(wanted: Mapping[str, Callable[[], D]]) -> tuple[dict[str, D], dict[str, str]]:
    """Builds designs; returns them by name, and for each that is missing the reason."""
    designs: dict[str, D] = {}
    missing: dict[str, str] = {}
    for name, make in wanted.items():
        try:
            designs[name] = make()
        except ImportError as error:
            missing[name] = str(error)
    return designs, missing
