"""Saves and restores a whole train state: parameters, optimizer state with its loss scale, PRNG keys, policy.

Two forms: bytes through ``flax.serialization``, and directories through Orbax, one by one or managed. Both need the
extra ``jmp_lite[checkpoint]``. The restored state is bit-identical, so a resumed run continues as if it had never
stopped. The policy is saved with the state, because the same weights under another policy would silently give different
results.
"""

from jmp_lite._messages import naming_extra as _naming_extra

with _naming_extra(__name__, "checkpoint"):
    from jmp_lite.checkpoint._bytes import from_bytes as from_bytes
    from jmp_lite.checkpoint._bytes import to_bytes as to_bytes
    from jmp_lite.checkpoint._directory import restore as restore
    from jmp_lite.checkpoint._directory import save as save
    from jmp_lite.checkpoint._manager import CheckpointManager as CheckpointManager

__all__ = ["CheckpointManager", "from_bytes", "restore", "save", "to_bytes"]
