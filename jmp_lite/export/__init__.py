"""Trained models as one file: the compiled program, its 8-bit or wider weights, and the policy that it computes under.

The file is in the safetensors format: any program that reads it sees the weights under their paths. The program is what
``jax.export`` makes of the function, StableHLO, so serving needs JAX and this chapter (the extra ``jmp_lite[export]``),
but none of the code that the model was written or trained with. Nothing is pickled. A file in which a single bit was
changed is refused; that says nothing about who wrote it, so pin the digest of what comes from elsewhere.

JAX promises that its releases of the next six months can run a program; weights and header stay readable beyond.
"""

from jmp_lite._messages import naming_extra as _naming_extra

with _naming_extra(__name__, "export"):
    from jmp_lite.export._freeze import freeze as freeze
    from jmp_lite.export._load import Served as Served
    from jmp_lite.export._load import load as load

__all__ = ["Served", "freeze", "load"]
