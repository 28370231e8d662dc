"""Trained models as one file: the traced program, its 8-bit or wider weights, and its policy.

The file is in the safetensors format: any safetensors reader sees the weights under their paths. The program is
StableHLO from ``jax.export``, so serving needs JAX and this subpackage (the extra ``jmp_lite[export]``), but none of
the code that defined or trained the model. Nothing is pickled. ``load`` rejects a file with a single changed bit; that
does not prove who wrote it, so pin the digest of files from elsewhere.

JAX promises that its releases of the next six months can run a program; weights and header stay readable longer.
"""

from jmp_lite._messages import naming_extra as _naming_extra

with _naming_extra(__name__, "export"):
    from jmp_lite.export._freeze import freeze as freeze
    from jmp_lite.export._load import Served as Served
    from jmp_lite.export._load import load as load

__all__ = ["Served", "freeze", "load"]
