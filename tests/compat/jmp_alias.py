"""A pytest plugin (`-p jmp_alias`) under which `import jmp` gives jmp_lite.

The alias is put in place by a hook, never at import: the collector of doctests imports this file
too.
"""

import sys
import types

import pytest

ALIASES = ("jmp", "jmp._src", "jmp._src.policy", "jmp._src.loss_scale")


def alias() -> types.ModuleType:
    """A module named jmp that hands out the names of jmp_lite."""
    import jmp_lite

    module = types.ModuleType("jmp")
    module.__getattr__ = lambda name: getattr(jmp_lite, name)
    module.__path__ = []  # a package: pytest imports the real one over anything else
    module._src = module.policy = module.loss_scale = module
    return module


def pytest_configure() -> None:
    """Replaces jmp before anything imports it."""
    early = [name for name in ("haiku", *ALIASES) if name in sys.modules]
    if early:
        msg = f"{early} imported before the alias was in place"
        raise pytest.UsageError(msg)
    sys.modules.update(dict.fromkeys(ALIASES, alias()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes sure that the tests about to run see jmp_lite and not jmp."""
    for item in items:
        if getattr(item.module, "jmp", None) is not sys.modules["jmp"]:
            msg = f"{item.nodeid} does not use the alias"
            raise pytest.UsageError(msg)
