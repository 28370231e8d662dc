"""The only file that knows about versions of JAX and about libraries that may or may not be there."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def register_flax_serialization(
    cls: type[T], to_state: Callable[[T], dict[str, Any]], from_state: Callable[[T, dict[str, Any]], T]
) -> None:
    """Teaches ``flax.serialization`` a class, if Flax is loaded.

    Flax keeps its own registry and is not imported by this library, so this is called whenever an object of the class
    is
    made: by then a program that serialises with Flax has imported it.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        serialization.register_serialization_state(cls, to_state, from_state, override=True)


def leaves_are_local() -> bool:
    """Whether arrays at this point of a trace are known to live whole on one device.

    True with a single device and inside ``pmap`` and ``shard_map`` over all mesh axes; False under ``jit`` on several
    devices, where the compiler may have sharded them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names:
        return len(mesh.manual_axes) == len(mesh.axis_names)
    return jax.device_count() == 1
