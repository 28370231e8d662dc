"""The only file that knows about versions of JAX and about libraries that may or may not be there.

``jax.extend`` brings Pallas along. From jax 0.11 on, importing it inside the first trace changes what JAX keeps
programs by, and the first step is compiled twice: there it is imported at once. Before, it takes longer than all of
this library and is imported where it is used.
"""

import contextlib
import functools
import itertools
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import numpy as np

if jax.__version_info__ >= (0, 11):
    import jax.extend.core.primitives
    import jax.extend.source_info_util

T = TypeVar("T")

#: For XLA on CPUs: compiles several times faster, to programs that are slow.
QUICK_COMPILATION: Mapping[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
}

#: From jax 0.11 on, ``Jaxpr`` is both: a program, and a program with the arrays it closed over.
Jaxpr: TypeAlias = Any
Equation: TypeAlias = Any
Var: TypeAlias = Any
#: An operand: a variable or a literal.
Atom: TypeAlias = Any

#: Name scope that autocast leaves alone.
NO_AUTOCAST = "jmp.no_autocast"


class Primitive(Protocol):
    """What is asked of a ``jax.extend.core.Primitive``."""

    name: str


def register_flax_serialization(
    cls: type[T], to_state: Callable[[T], dict[str, Any]], from_state: Callable[[T, dict[str, Any]], T]
) -> None:
    """Teaches ``flax.serialization`` a class, if Flax is loaded.

    Flax keeps its own registry and is not imported by this library, so this is called whenever an object of the class
    is made: by then a program that serializes with Flax has imported it.
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


def varying_axes(array: Any) -> frozenset[Any]:
    """Returns the manual mesh axes along which an array is known to differ; none where JAX does not keep track."""
    axes: frozenset[Any] = jax.typeof(array).manual_axis_type.varying
    return axes


def varied(tree: T, axes: frozenset[Any]) -> T:
    """Marks the arrays in a tree as different along some manual mesh axes."""

    def mark(array: Any) -> Any:
        missing = tuple(sorted(axes - varying_axes(array), key=str))
        return jax.lax.pcast(array, missing, to="varying") if missing else array

    return jax.tree.map(mark, tree) if axes else tree


def sharding_in_type(aval: Any) -> Any:
    """Returns the sharding that is part of the type of an array, under an explicit mesh; ``None`` elsewhere."""
    if not mesh_is_explicit():
        return None
    mesh = jax.sharding.get_abstract_mesh()
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*[None] * aval.ndim))
    return whole if aval.sharding.mesh.empty else aval.sharding


def mesh_is_explicit() -> bool:
    """Whether shardings are parts of types at this point of a trace."""
    return jax.sharding.AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types


# --- Programs ---


def program(jaxpr: Jaxpr) -> tuple[Any, list[Any]]:
    """Splits a jaxpr, closed or open, into the program and the arrays it closed over."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", None) or ())


def open_jaxpr(closed: Jaxpr) -> tuple[Any, list[Any]]:
    """Turns the arrays that a jaxpr closed over into its first inputs, for primitives that want an open jaxpr."""
    inner, consts = program(closed)
    if not consts:
        return inner, consts
    opened = jax.make_jaxpr(lambda consts, *args: jax.core.eval_jaxpr(inner, consts, *args))(
        consts, *(v.aval for v in inner.invars)
    )
    return program(opened)[0], consts


def is_literal(atom: Atom) -> bool:
    """Whether an operand is a number written into the program."""
    return hasattr(atom, "val")


def run(closed: Jaxpr, *arrays: Any) -> list[Any]:
    """Evaluates a program as it is."""
    from jax.extend.core import jaxpr_as_fun

    return list(jaxpr_as_fun(closed)(*arrays))


def bind(eqn: Equation, operands: Sequence[Any], params: dict[str, Any]) -> list[Any]:
    """Applies the primitive of an equation to other operands, under other parameters."""
    primitive = eqn.primitive
    if not (primitive.multiple_results or eqn.effects):
        with contextlib.suppress(TypeError):  # of parameters that cannot be hashed
            return [_inlined(primitive, tuple(params.items()))(*operands)]
    results = primitive.bind(*operands, **primitive.get_bind_params(params))
    return list(results) if primitive.multiple_results else [results]


#: For ``jax.jit(inline=)``: into the jaxpr that is being traced. Before jax 0.11 there was no other way.
INLINE: Any = getattr(getattr(jax, "Inline", None), "JAX_EARLY", True)


@functools.lru_cache(maxsize=4096)
def _inlined(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """JAX remembers the derivative of what is jitted, and works out that of a bare primitive at every equation."""
    return jax.jit(functools.partial(primitive.bind, **dict(params)), inline=INLINE)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many constants and how many carries a scan has."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def manual_axes(params: dict[str, Any]) -> set[Any]:
    """Returns the mesh axes that a shard_map makes manual."""
    name = "newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"
    return set(params[name])


def scope_names(name_stack: Any) -> str:
    """Returns the name scopes of an equation, joined by slashes; marks such as ``jvp`` are not scopes."""
    return "/".join(entry.name for entry in name_stack.stack if type(entry).__name__ == "Scope")


def is_transposed(name_stack: Any) -> bool:
    """Whether an equation belongs to a backward pass."""
    return any(entry.name == "transpose" for entry in name_stack.stack if type(entry).__name__ == "Transform")


#: Packages whose layers users call: their lines are none that users can change.
FRAMEWORKS = ("flax", "haiku", "equinox", "optax")
_OF_LAYERS = re.compile(rf"site-packages[/\\]({'|'.join(FRAMEWORKS)})[/\\]")
_OWN = str(pathlib.Path(__file__).parent)
#: What ``nnx.autocast`` puts around the methods of modules.
_OF_SCOPES = re.compile(rf"^{re.escape(_OWN)}.*scoped_method")
#: So many frames are searched for the line of the user that calls a layer.
_FRAMES = 64


def source_line(eqn: Equation) -> str:
    """Returns the user's file and line that an equation comes from: that of the call for a layer of a framework."""
    from jax.extend import source_info_util

    line = str(source_info_util.summarize(eqn.source_info))
    if not _OF_LAYERS.search(line):
        return line
    frames = reversed(source_info_util.summarize(eqn.source_info, num_frames=_FRAMES).splitlines())
    called = itertools.filterfalse(_OF_SCOPES.search, frames)
    inside = itertools.takewhile(lambda frame: not frame.startswith(_OWN), called)
    return next((frame for frame in inside if not _OF_LAYERS.search(frame)), line)


@contextlib.contextmanager
def as_traced(eqn: Equation) -> Iterator[None]:
    """Gives new equations the name scopes, the source line and the context (mesh, metadata) of an old one."""
    from jax.extend import source_info_util

    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager:
        yield


def with_weak_type(array: Any, aval: Any) -> Any:
    """Converts an array, or the value of a literal, to the dtype of an abstract value and to its weak type."""
    from jax.extend.core.primitives import convert_element_type_p

    if not isinstance(array, jax.Array):
        array = np.asarray(array, aval.dtype)
    elif array.dtype == aval.dtype and array.weak_type == aval.weak_type:
        return array
    return convert_element_type_p.bind(array, new_dtype=aval.dtype, weak_type=aval.weak_type, sharding=None)


def symbolic_zero(aval: Any) -> Any:
    """Returns a cotangent that is known to be zero, as the pullbacks of ``jax.vjp`` take it."""
    from jax.interpreters import ad

    return ad.Zero(aval)


# --- Primitives ---


def bilinear_primitive(
    name: str,
    impl: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
    impls_by_platform: Mapping[str, Callable[..., Any]],
) -> Any:
    """Makes a primitive that is linear in each of its two operands.

    Args:
        name: Name that jaxprs show.
        impl: Computes it: ``impl(lhs, rhs, **params)``.
        transpose: ``transpose(cotangent, lhs, rhs, **params)`` returns the cotangent of the operand that is given as an
            abstract value.
        batch: The rule of ``vmap``: ``batch(operands, dimensions, **params) -> (result, dimension)``.
        impls_by_platform: What is compiled instead of ``impl`` for some platforms.
    """
    from jax.interpreters import ad, mlir

    def of_lhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        return transpose(cotangent, lhs.aval, rhs, **params)

    def of_rhs(cotangent: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
        return transpose(cotangent, lhs, rhs.aval, **params)

    primitive = composed_primitive(name, impl, batch=batch)
    ad.defbilinear(primitive, of_lhs, of_rhs)
    for platform, other in impls_by_platform.items():
        mlir.register_lowering(primitive, mlir.lower_fun(other, multiple_results=False), platform=platform)
    return primitive


def linear_primitive(
    name: str,
    impl: Callable[..., Any],
    transpose: Callable[..., Any],
    batch: Callable[..., Any],
    linear: frozenset[int],
) -> Any:
    """Makes a primitive that is linear in some of its operands together, and has no derivative in the others.

    Args:
        name: Name that jaxprs show.
        impl: Computes it.
        transpose: ``transpose(cotangent, *operands, **params)`` is given abstract values for those that are wanted, and
            returns one cotangent per operand, ``None`` for the others.
        batch: The rule of ``vmap``.
        linear: Positions of the operands in which it is linear.
    """
    from jax.interpreters import ad

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        moved = [
            ad.instantiate_zeros(tangent) if i in linear else primal
            for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True))
        ]
        return primitive.bind(*primals, **params), primitive.bind(*moved, **params)

    def transpose_rule(cotangent: Any, *operands: Any, **params: Any) -> Any:
        if type(cotangent) is ad.Zero:
            return [None] * len(operands)
        return transpose(cotangent, *(x.aval if ad.is_undefined_primal(x) else x for x in operands), **params)

    primitive = composed_primitive(name, impl, jvp=jvp, batch=batch)
    ad.primitive_transposes[primitive] = transpose_rule
    return primitive


def composed_primitive(
    name: str,
    impl: Callable[..., Any],
    *,
    jvp: Callable[..., Any] | None = None,
    batch: Callable[..., Any] | None = None,
) -> Any:
    """Makes a primitive that is compiled as what it is composed of, for one call too; ``jvp``, ``batch``: its rules."""
    from jax.extend.core import Primitive
    from jax.interpreters import ad, batching, mlir

    def abstract_eval(*avals: Any, **params: Any) -> Any:
        [result] = jax.make_jaxpr(functools.partial(impl, **params))(*avals).out_avals
        return result

    primitive = Primitive(name)

    def evaluate(*operands: Any, **params: Any) -> Any:
        with jax.disable_jit(False):
            return _inlined(primitive, tuple(params.items()))(*operands)

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract_eval)
    mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=False))
    if jvp is not None:
        ad.primitive_jvps[primitive] = jvp
    if batch is not None:
        batching.primitive_batchers[primitive] = batch
    return primitive
