"""What the tables of autocast cases are made of: a case, its arguments, its modes and its tolerances."""

import contextlib
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# The modes: autocast called as it is, under jit, under eval_shape; its gradient; autocast of the gradient.
EAGER, JIT, SHAPE, GRAD_OF, OF_GRAD = "eager", "jit", "eval_shape", "grad(autocast)", "autocast(grad)"
VALUES = (EAGER, JIT, SHAPE)
MODES = (*VALUES, GRAD_OF, OF_GRAD)

ULP = 2.0**-8  # of bfloat16: rounding moves a number by half of it at most
# One layer rounds two operands, a matmul and what is done with it: four halves of an ulp. Independent errors add up
# more slowly, and the sums in between are exact, so this is an upper limit for numbers that do not cancel.
LAYER = 2 * ULP
EVERY = range(1000)
NOWHERE = ()


@dataclasses.dataclass(frozen=True)
class Case:
    """A function in float32 and what autocast may do to it.

    Attributes:
        fun: The function, of arrays.
        args: Its arguments, made by a NumPy generator.
        kwargs: Settings that are not arrays.
        modes: The modes that apply: those of ``VALUES`` where there is no gradient.
        depth: Layers that errors pass through: the output may be off by so many times ``LAYER``, relative to the
            largest element.
        grad_depth: The same for gradients; by default twice as many, since errors go forward and backward.
        whole: Whether errors of gradients are relative to the norm of all gradients instead of each array's maximum.
        exact: Outputs that must not lose a bit. With all of them exact, so are the gradients.
        low: The modes in which every matmul in float32 has to run in the compute dtype; ``NOWHERE`` for what is exact.
        context: What the case runs in, such as a mesh.
    """

    fun: Callable
    args: Callable = None
    kwargs: dict = dataclasses.field(default_factory=dict)
    modes: tuple = MODES
    depth: float = 4
    grad_depth: float | None = None
    whole: bool = False
    exact: range | tuple = ()
    low: tuple = MODES
    context: Callable = contextlib.nullcontext

    def __post_init__(self):
        if self.args is None:
            object.__setattr__(self, "args", x_and_w)
        if self.grad_depth is None:
            object.__setattr__(self, "grad_depth", 2 * self.depth)


# --- Arguments ---


def normal(*shapes, dtype=jnp.float32):
    """Normal deviates of these shapes, those of matrices divided by the root of what is summed over."""

    def make(rng):
        scales = [1.0, *(1 / math.sqrt(np.prod(shape[:-1])) if len(shape) > 1 else 1.0 for shape in shapes[1:])]
        return tuple(
            jnp.asarray(s * rng.standard_normal(shape), dtype) for s, shape in zip(scales, shapes, strict=True)
        )

    return make


x_and_w = normal((8, 16), (16, 16))


def apart(rng):
    """Rows of numbers that differ by 1/8 and stay away from zero, and a permutation: for what is not smooth.

    Rounding a matmul of the two changes no order and no sign, so that a derivative has no jump to take.
    """
    rows = np.stack([rng.permutation(np.linspace(-1, 1, 16)) for _ in range(8)])
    return jnp.asarray(rows, jnp.float32), jnp.asarray(np.eye(16)[rng.permutation(16)], jnp.float32)


def well_conditioned(rng):
    """A right-hand side and a symmetric positive matrix with eigenvalues around 1: solving amplifies errors by 2."""
    a = rng.standard_normal((16, 16)) / 4
    spd = np.eye(16) + 0.05 * (a @ a.T)
    return jnp.asarray(rng.standard_normal((8, 16)), jnp.float32), jnp.asarray(spd, jnp.float32)


def with_key(make=x_and_w):
    """The arguments behind a key."""
    return lambda rng: (jax.random.key(int(rng.integers(2**31))), *make(rng))


def mesh(explicit=False):
    """The eight simulated devices along one axis, by name 'd'."""
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    return jax.make_mesh((8,), ("d",), axis_types=(kind,))
