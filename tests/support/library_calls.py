"""A table of calls of JAX's own functions: linear algebra, signals, statistics, images, random numbers.

Some of them are made of matmuls, though none was asked for. Contractions are of 9 and more.
"""

import jax
import jax.numpy as jnp
import jax.scipy.interpolate
import jax.scipy.optimize
import jax.scipy.sparse.linalg
import jax.scipy.spatial.transform
import numpy as np

from support.library_calls_common import (
    GENERAL,
    IMAGE,
    QUATERNIONS,
    ROWS,
    TALL,
    A,
    M,
    N,
    U,
    V,
    array,
    count,
    key,
    named,
    normal,
    of,
    signal,
    stiff,
    unit,
)
from support.library_calls_numbers import NUMBERS

# --- Linear algebra ---

NUMPY_LINALG = {
    "cholesky": of(A),
    "cond": of(A),
    "cond, fro": of(A, "fro"),
    "cross": of(normal(N, 3), normal(N, 3)),
    "det": of(A),
    "diagonal": of(M),
    "eig": stiff(GENERAL),
    "eigh": of(A),
    "eigvals": of(GENERAL),
    "eigvalsh": of(A),
    "inv": of(GENERAL),
    "lstsq": of(TALL, normal(ROWS, 2)),
    "lstsq, vector": of(TALL, normal(ROWS)),
    "matrix_norm": of(M),
    "matrix_norm, 2": of(TALL, ord=2),
    "matrix_power": of(GENERAL, 5),
    "matrix_power, inverse": of(GENERAL, -3),
    "matrix_rank": stiff(TALL),
    "matrix_transpose": of(M),
    "norm": of(M),
    "norm, 2": of(TALL, 2),
    "norm, nuclear": of(TALL, "nuc"),
    "pinv": of(TALL),
    "pinv, hermitian": of(A, hermitian=True),
    "qr": of(TALL),
    "slogdet": of(A),
    "solve": of(GENERAL, M),
    "solve, vector": of(GENERAL, V),
    "svd": of(TALL, full_matrices=False),
    "svdvals": of(TALL),
    "tensorinv": of(GENERAL, through=lambda f, a: f(a.reshape(3, 3, N))),
    "tensorsolve": of(GENERAL, V),
    "trace": of(M),
    "vector_norm": of(V),
}

SCIPY_LINALG = {
    "block_diag": of(M, TALL),
    "cho_factor": of(A, through=lambda f, a: f(a)[0]),
    "cho_solve": of(A, M, through=lambda f, a, b: f((jnp.linalg.cholesky(a), True), b)),
    "cholesky": of(A),
    "circulant": of(V),
    "companion": of(U),
    "convolution_matrix": of(V, N),
    "det": of(A),
    "dft": of(N),
    "eigh": of(A),
    "eigh_tridiagonal": stiff(V, normal(N - 1), eigvals_only=True),
    "expm": of(GENERAL),
    "expm, large": of(GENERAL, through=lambda f, a: f(8 * a)),
    "expm, triangular": of(GENERAL, upper_triangular=True),
    "expm, many": of(normal(2, N, N)),
    "expm_frechet": of(GENERAL, M),
    "fiedler": of(V),
    "fiedler_companion": of(U),
    "funm": stiff(GENERAL, through=lambda f, a: f(a, jnp.exp, disp=False)),
    "hadamard": of(8),
    "hankel": of(V, V),
    "helmert": of(N),
    "hessenberg": stiff(GENERAL, calc_q=True),
    "hilbert": of(N),
    "inv": of(GENERAL),
    "invhilbert": of(N),
    "invpascal": of(N),
    "leslie": of(V, normal(N - 1)),
    "lu": of(GENERAL),
    "lu, permuted": of(GENERAL, permute_l=True),
    "lu_factor": of(GENERAL),
    "lu_solve": of(GENERAL, M, through=lambda f, a, b: f(jax.scipy.linalg.lu_factor(a), b)),
    "pascal": of(N),
    "polar": stiff(GENERAL),
    "polar, svd": of(GENERAL, method="svd"),
    "qr": of(TALL, mode="economic"),
    "qr, pivoting": of(TALL, mode="economic", pivoting=True),
    "qr_multiply": stiff(GENERAL, M),
    "rsf2csf": stiff(GENERAL, M, through=lambda f, a, b: f(*jax.scipy.linalg.schur(a))),
    "schur": stiff(GENERAL),
    "schur, complex": stiff(GENERAL, output="complex"),
    "solve": of(GENERAL, M),
    "solve, positive": of(A, M, assume_a="pos"),
    "solve_sylvester": stiff(GENERAL, A, M),
    "solve_sylvester, eigen": stiff(GENERAL, A, M, method="eigen"),
    "solve_triangular": of(GENERAL, M),
    "sqrtm": stiff(A),
    "svd": of(TALL, full_matrices=False),
    "toeplitz": of(V, V),
}

LAX_LINALG = {
    "cholesky": of(A),
    "cholesky_update": stiff(A, V),
    "eig": stiff(GENERAL),
    "eigh": of(A),
    "hessenberg": stiff(GENERAL),
    "householder_product": stiff(GENERAL, U),
    "lu": of(GENERAL),
    "lu_pivots_to_permutation": stiff(array(range(N)), through=lambda f, p: f(p.astype(jnp.int32), N)),
    "ormqr": stiff(GENERAL, U, M),
    "qdwh": stiff(GENERAL),
    "qr": of(TALL, full_matrices=False),
    "schur": stiff(GENERAL),
    "svd": of(TALL, full_matrices=False),
    "triangular_solve": of(GENERAL, M, left_side=True),
    "tridiagonal": stiff(A),
    "tridiagonal_solve": of(V, array(np.full(N, 9.0)), V, M),
}

# --- Signals, images, interpolation, statistics of data ---

SIGNAL = {
    "convolve": of(signal(), V),
    "convolve, planes": of(M, M),
    "convolve, fft": of(M, M, method="fft"),
    "convolve2d": of(M, M),
    "correlate": of(signal(), V),
    "correlate2d": of(M, M),
    "csd": of(signal(), normal(64), nperseg=16),
    "detrend": of(signal()),
    "detrend, parts": of(signal(), bp=(0, 20)),
    "fftconvolve": of(M, M),
    "istft": of(normal(N, N), nperseg=16, through=lambda f, x: f(jax.lax.complex(x, x), nperseg=16)),
    "stft": of(signal(), nperseg=16),
    "stft, detrended": of(signal(), nperseg=16, detrend="linear"),
    "welch": of(signal(), nperseg=16),
    "welch, detrended": of(signal(), nperseg=16, detrend="linear"),
}

IMAGES = {
    "resize": of(IMAGE, (17, 17, 3), "linear"),
    "resize, smaller": of(IMAGE, (5, 5, 3), "lanczos3"),
    "resize, nearest": of(IMAGE, (17, 17, 3), "nearest"),
    "scale_and_translate": of(IMAGE, (17, 17, 3), (0, 1), array([1.7, 2.1]), array([0.5, -0.5]), "cubic"),
}


def _density(of_kde, *args):
    return of(normal(N, ROWS), *args, through=lambda f, data, *args: of_kde(f(data), *args))


SCIPY = {
    "cluster.vq.vq": of(TALL, normal(4, N)),
    "fft.dct": of(M),
    "fft.dctn": of(M),
    "fft.idct": of(M),
    "fft.idctn": of(M),
    "integrate.trapezoid": of(V, V),
    "interpolate.RegularGridInterpolator": of(
        M, unit(N, 2), through=lambda f, table, x: f((jnp.arange(9.0), jnp.arange(9.0)), table)(8 * x)
    ),
    "ndimage.map_coordinates": of(M, U, U, through=lambda f, a, x, y: f(a, [8 * x, 8 * y], order=1)),
    "optimize.minimize": stiff(V, through=lambda f, x: f(lambda y: jnp.sum(y**4 + y), x, method="BFGS").x),
    "sparse.linalg.bicgstab": of(A, V),
    "sparse.linalg.cg": of(A, V),
    "sparse.linalg.gmres": of(A, V),
    "spatial.transform.Rotation": of(
        QUATERNIONS, normal(ROWS, 3), through=lambda f, q, x: (f.from_quat(q).apply(x), f.from_quat(q).mean().as_quat())
    ),
    "spatial.transform.Slerp": of(
        QUATERNIONS,
        U,
        through=lambda f, q, t: f.init(jnp.arange(12.0), jax.scipy.spatial.transform.Rotation.from_quat(q))(
            t
        ).as_quat(),
    ),
    "stats.gaussian_kde": _density(lambda kde, x: kde(x), normal(N, ROWS)),
    "stats.gaussian_kde, logpdf": _density(lambda kde, x: kde.logpdf(x), normal(N, ROWS)),
    "stats.gaussian_kde, gaussian": _density(lambda kde, m, c: kde.integrate_gaussian(m, c), V, A),
    "stats.gaussian_kde, itself": _density(lambda kde: kde.integrate_kde(kde)),
    "stats.gaussian_kde, draws": _density(lambda kde, key: kde.resample(key, (5,)), key),
    "stats.mode": stiff(count(ROWS)),
    "stats.rankdata": stiff(V),
    "stats.sem": of(V),
}

NUMPY = {
    "average": of(TALL, 0, unit(ROWS)),
    "convolve": of(signal(), V),
    "corrcoef": of(TALL),
    "correlate": of(signal(), V),
    "cov": of(TALL),
    "cov, weighted": of(normal(N, ROWS), unit(ROWS), through=lambda f, x, w: f(x, aweights=w)),
    "gradient": of(V),
    "interp": of(U, array(np.linspace(0, 1, N)), V),
    "poly": of(U),
    "poly, matrix": of(GENERAL),
    "polydiv": of(U, unit(4)),
    "polyfit": of(unit(ROWS), normal(ROWS), 4),
    "polyfit, covariance": of(unit(ROWS), normal(ROWS), 2, cov=True),
    "polymul": of(V, V),
    "polyval": of(V, V),
    "roots": of(U, strip_zeros=False),
    "trapezoid": of(V, V),
    "unwrap": of(V),
    "vander": of(U),
}

ARRAYS = (
    named("jax.numpy.linalg", NUMPY_LINALG)
    | named("jax.scipy.linalg", SCIPY_LINALG)
    | named("jax.lax.linalg", LAX_LINALG)
    | named("jax.scipy.signal", SIGNAL)
    | named("jax.image", IMAGES)
    | named("jax.scipy", SCIPY)
    | named("jax.numpy", NUMPY)
)
CALLS = ARRAYS | NUMBERS

#: Public functions that are not in the table, by reason.
LEFT_OUT = {
    "ask for a product": """jax.numpy.linalg.matmul jax.numpy.linalg.multi_dot jax.numpy.linalg.outer
    jax.numpy.linalg.tensordot jax.numpy.linalg.vecdot jax.lax.linalg.symmetric_product jax.numpy.dot jax.numpy.einsum
    jax.numpy.inner jax.numpy.kron jax.numpy.matmul jax.numpy.matvec jax.numpy.outer jax.numpy.tensordot jax.numpy.vdot
    jax.numpy.vecdot jax.numpy.vecmat""",
    "make keys or take them apart, without floats": """jax.random.Key jax.random.PRNGKey jax.random.clone
    jax.random.fold_in jax.random.key jax.random.key_data jax.random.key_dtype jax.random.key_impl jax.random.split
    jax.random.wrap_key_data""",
    "settings and results, not functions": """jax.image.ResizeMethod jax.lax.linalg.EigImplementation
    jax.lax.linalg.EighImplementation jax.lax.linalg.SvdAlgorithm jax.scipy.optimize.OptimizeResults""",
}
