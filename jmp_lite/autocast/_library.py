"""Matmuls that the user did not write: inside library functions that solve, resize, correlate, normalize or compare.

They are recognized by where the library wrote them. The traceback of an equation survives jit, differentiation and
transposition, and its innermost frames are in the function that wrote it.
"""

from jmp_lite._compat import Equation

_JAX = "/jax/_src/"

#: Files that hold such functions, with the functions; ``None`` for all but requests for matmuls.
_FILES: dict[str, frozenset[str] | None] = {
    "/jax/_src/numpy/linalg.py": None,
    "/jax/_src/numpy/polynomial.py": None,
    "/jax/_src/numpy/lax_numpy.py": frozenset({"cov", "corrcoef", "convolve", "correlate", "_conv"}),
    "/jax/_src/scipy/": None,
    "/jax/_src/third_party/scipy/": None,
    "/jax/_src/image/": None,
    "/jax/_src/random": None,
    "/jax/_src/lax/linalg.py": None,
    "/jax/_src/tpu/linalg/": None,
    # Power iterations of SpectralNorm, the only matmuls in these files.
    "/flax/linen/normalization.py": None,
    "/flax/nnx/nn/normalization.py": None,
    "/haiku/_src/spectral_norm.py": None,
    "/optax/losses/": None,
    "/equinox/nn/_spectral_norm.py": None,
}
_REQUESTS = frozenset({"matmul", "tensordot", "vecdot", "outer", "multi_dot"})


def is_of_library(eqn: Equation) -> bool:
    """Whether a matmul is inside a library function that the user did not call for a matmul."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        file = frame.file_name.replace("\\", "/")
        name = frame.function_name.rpartition(".")[2]
        functions = next((functions for part, functions in _FILES.items() if part in file), frozenset[str]())
        if name not in _REQUESTS and (functions is None or name in functions):
            return True
        if _JAX not in file:
            return False
    return False
