"""Fails the build if a public name of jmp_lite is missing from the API pages.

Public are the names in ``__all__`` of the modules below (without one: what they define), and the public members of
their classes. A name counts as documented if it, or another public name of the same object, is on a page.
"""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

MODULES = [
    "jmp_lite",
    *(
        f"jmp_lite.{name}"
        for name in ("linen", "nnx", "optim", "distributed", "quant", "checkpoint", "export", "analysis", "errors")
    ),
]


def public_names(module: ModuleType) -> list[str]:
    """Returns the names that a module exports."""
    defined = [
        name
        for name, value in vars(module).items()
        if (inspect.isroutine(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not name.startswith("_")
    ]
    return getattr(module, "__all__", defined)


def public_objects() -> Iterator[tuple[str, Any]]:
    """Yields dotted name and value of everything that users may rely on."""
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        yield module_name, module
        for name in public_names(module):
            value = getattr(module, name)
            yield f"{module_name}.{name}", value
            if inspect.isclass(value):
                yield from public_members(f"{module_name}.{name}", value)


def public_members(class_name: str, cls: type) -> Iterator[tuple[str, Any]]:
    """Yields the public methods and properties that a class defines itself; generated ones come from elsewhere."""
    for name, value in vars(cls).items():
        function = value.fget if isinstance(value, property) else value
        ours = inspect.isroutine(function) and getattr(function, "__module__", None) == cls.__module__
        if ours and not name.startswith("_"):
            yield f"{class_name}.{name}", value


def undocumented(documented: set[str]) -> list[str]:
    """Returns the public names whose objects appear under none of their names."""
    objects = list(public_objects())
    seen = {id(value) for name, value in objects if name in documented}
    return [name for name, value in objects if id(value) not in seen]


def check(app: Sphinx, env: Any) -> None:
    """Raises if something public is not documented."""
    missing = undocumented(set(env.domains["py"].objects))
    if missing:
        raise ExtensionError(f"public names without documentation: {', '.join(missing)}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Registers the check."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
