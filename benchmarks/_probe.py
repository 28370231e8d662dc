"""Whether a step compiles within a time limit, tried in a process that can be ended.

XLA on CPU takes many minutes over some designs with hundreds of leaves: it repeats the finite check
of all leaves inside every fused select.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks import _designs


def compiles_within(design: str, tree: str, grad_dtype: str, seconds: float) -> bool:
    """Compiles one design in a fresh process and gives up after `seconds`."""
    command = [sys.executable, "-m", __name__, design, tree, grad_dtype]
    root = Path(__file__).parents[1]
    try:
        subprocess.run(command, cwd=root, timeout=seconds, check=True, stderr=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return False
    return True


def main() -> None:
    """Compiles the design, tree and gradient dtype named on the command line."""
    design, tree, grad_dtype = sys.argv[1:]
    build = _designs.ALL[design]
    _designs.built(build(), *_designs.abstract_trees(tree, grad_dtype))


if __name__ == "__main__":
    main()
