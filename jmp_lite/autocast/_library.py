"""Matmuls that the user did not write: inside library functions that solve, resize, correlate, normalize or compare.

They are recognized by where the library wrote them. The traceback of an equation survives jit, differentiation and
transposition, and its innermost frames are in the function that wrote it.
"""

from typing import NamedTuple

from jmp_lite._compat import Equation

_JAX = "/jax/_src/"


class Library(NamedTuple):
    """A file, or a folder, with such functions."""

    path: str
    functions: frozenset[str] | None = None
    """Their names; ``None`` for all but requests for matmuls."""
    is_algebra: bool = False
    """Whether results are solutions, which go on into linear algebra, and no data, such as images and samples."""


#: The first whose path fits counts.
_LIBRARIES = (
    Library("/jax/_src/numpy/linalg.py", is_algebra=True),
    Library("/jax/_src/numpy/polynomial.py", is_algebra=True),
    Library("/jax/_src/numpy/lax_numpy.py", frozenset({"cov", "corrcoef", "convolve", "correlate", "_conv"})),
    Library("/jax/_src/scipy/linalg.py", is_algebra=True),
    Library("/jax/_src/scipy/sparse/", is_algebra=True),
    Library("/jax/_src/scipy/optimize/", is_algebra=True),
    Library("/jax/_src/scipy/"),
    Library("/jax/_src/third_party/scipy/linalg.py", is_algebra=True),
    Library("/jax/_src/third_party/scipy/"),
    Library("/jax/_src/image/"),
    Library("/jax/_src/random"),
    Library("/jax/_src/lax/linalg.py", is_algebra=True),
    Library("/jax/_src/tpu/linalg/", is_algebra=True),
    # Power iterations of SpectralNorm, the only matmuls in these files.
    Library("/flax/linen/normalization.py", is_algebra=True),
    Library("/flax/nnx/nn/normalization.py", is_algebra=True),
    Library("/haiku/_src/spectral_norm.py", is_algebra=True),
    Library("/equinox/nn/_spectral_norm.py", is_algebra=True),
    Library("/optax/losses/"),
)
_NONE = Library("", frozenset())
_REQUESTS = frozenset({"matmul", "tensordot", "vecdot", "outer", "multi_dot"})


def library_of(eqn: Equation) -> Library | None:
    """Returns the library whose function a matmul is inside of, if the user did not call that for a matmul."""
    traceback = eqn.source_info.traceback
    for frame in traceback.frames if traceback else ():
        file = frame.file_name.replace("\\", "/")
        name = frame.function_name.rpartition(".")[2]
        library = next((library for library in _LIBRARIES if library.path in file), _NONE)
        if name not in _REQUESTS and (library.functions is None or name in library.functions):
            return library
        if _JAX not in file:
            return None
    return None
