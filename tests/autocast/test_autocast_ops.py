"""The table of primitives: complete, without contradictions, and open to users."""

import math
import operator
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.custom_derivatives import linear_call
from jax.experimental import checkify, pallas, xla_metadata  # noqa: F401  their primitives are looked for as well
from jax.extend.core import Primitive  # noqa: TID251
from jax.extend.core.primitives import closed_call_p, tanh_p  # noqa: TID251
from jax.sharding import PartitionSpec as P
from support.autocast_cases_common import mesh

import jmp_lite as jmp
from jmp_lite._compat import program, scan_counts
from jmp_lite.autocast import _ops
from jmp_lite.autocast._api import HANDLERS
from jmp_lite.autocast._programs import PROGRAMS, inputs, programs_of

#: Parts of a GPU kernel, which autocast never sees: it leaves the call of the kernel as it is.
KERNEL_PACKAGES = ("jax._src.pallas.mosaic", "jax._src.pallas.triton", "jax.experimental.mosaic", "jax._src.tpu")


#: Pieces of transformations, of meshes and of asynchronous communication, sparse arrays, experiments: they run in the
#: dtypes that they were written for, as what is not in the table does.
RIGHT_AS_WRITTEN = """
after_all all_gather_done all_gather_reduced_start all_gather_start all_to_all_done all_to_all_start
assert_consumed_value axis_index bcoo_dot_general bcoo_dot_general_sampled bcoo_extract bcoo_fromdense
bcoo_sort_indices bcoo_spdot_general bcoo_sum_duplicates bcoo_todense bcoo_transpose bcsr_dot_general bcsr_extract
bcsr_fromdense bcsr_todense buffer_callback call compute_on consume coo_fromdense coo_matmat coo_matvec coo_spmm
coo_spmv coo_todense core_call create_linear create_token csr_fromdense csr_matmat csr_matvec csr_spmm csr_spmv
csr_todense custom_fusion custom_jvp_call_jaxpr dce_sink delay dim_as_value dimension_size einshape_lo fused_call
fusible global_array_to_host_local_array host_local_array_to_global_array multiple_of num_programs pack_dtype
pbroadcast_done pbroadcast_dynamic pbroadcast_start platform_index ppermute_done ppermute_start precv program_id
program_order psend psum_done psum_invariant_start psum_start ragged_all_to_all reciprocal reduce_scatter_done
reduce_scatter_start remat_opt rnn_bwd rnn_fwd run_scoped semaphore_read semaphore_signal semaphore_wait
shape_assertion shard_alike spsolve stage thunky.all_gather thunky.all_reduce thunky.all_to_all thunky.async_done
thunky.async_start thunky.call_jax thunky.call_thunky_nested thunky.collective_group thunky.collective_permute
thunky.cond thunky.copy thunky.custom_call thunky.inline_constant thunky.memset thunky.memzero thunky.ptx_kernel
thunky.reduce_scatter thunky.while tie todense unpack_dtype unreachable unreduced_psum_start
unreduced_reduce_scatter_start xla_metadata_value
"""


def primitives_of_this_jax():
    """Every primitive that a loaded module of JAX names."""
    modules = [m for name, m in sys.modules.items() if name.startswith("jax") and not name.startswith(KERNEL_PACKAGES)]
    values = [value for module in modules for value in vars(module).values()]
    return sorted({value.name for value in values if isinstance(value, Primitive)})


def test_every_primitive_of_this_jax_has_a_class():
    names = primitives_of_this_jax()
    assert len(names) > 250
    unknown = [name for name in names if not _ops.is_known(name) and name not in RIGHT_AS_WRITTEN.split()]
    assert not unknown, f"give these a family in jmp_lite/autocast/_ops.py, or a place above: {unknown}"


def test_a_primitive_has_one_family():
    names = [name for family in _ops.FAMILIES for name in family.primitives.split()]
    assert len(names) == len(set(names))


def test_what_holds_programs_has_a_row_a_handler_and_a_class():
    """What is handled is in the table of programs, and what is in the table is handled."""
    nested = {name for f in _ops.FAMILIES if f.op_class is jmp.OpClass.NESTED for name in f.primitives.split()}
    assert set(PROGRAMS) == set(HANDLERS) == nested


def holding(fun):
    """An equation that holds programs: the first of a function that does."""
    [eqn, *_] = [eqn for eqn in jax.make_jaxpr(fun)(jnp.ones((8, 8))).jaxpr.eqns if programs_of(eqn).bodies]
    return eqn


def steps(x, row):
    """A loop whose test and whose body close over arrays of different shapes."""
    step = lambda c: (c[0] + 1, c[1] @ x, c[2] + row)  # noqa: E731
    return jax.lax.while_loop(lambda c: c[1][0, 0] + c[0] < row[0], step, (0, x, row))


def closed_call(fun):
    """Calls a program by a primitive that no function of JAX stands for."""

    def call(x):
        params = {"call_jaxpr": jax.make_jaxpr(fun)(x)}
        return closed_call_p.bind(x, **closed_call_p.get_bind_params(params))

    return call


def custom(decorator, rule):
    function = decorator(jnp.sin)
    rule(function)
    return function


RULES = {
    "custom_jvp_call": custom(jax.custom_jvp, lambda f: f.defjvp(lambda p, t: (jnp.sin(p[0]), t[0]))),
    "custom_vjp_call": custom(jax.custom_vjp, lambda f: f.defvjp(lambda x: (x, x), lambda x, g: (g * x,))),
    "custom_vmap_call": custom(
        jax.custom_batching.custom_vmap, lambda f: f.def_vmap(lambda n, b, x: (jnp.sin(x), True))
    ),
}
HOLDING = {
    **RULES,
    "jit": jax.jit(lambda x: (x > 0, x[0])),
    closed_call_p.name: closed_call(lambda x: (x > 0, x[0])),
    "remat2": jax.checkpoint(lambda x: (x > 0, jnp.sin(x[0]))),
    "composite": jax.lax.composite(lambda x: (jnp.sin(x), x[0]), name="test.sine"),
    "linear_call": lambda x: linear_call(lambda r, t: r * t, lambda r, t: r * t, jnp.sum(x), x[0]),
    "cond": lambda x: jax.lax.cond(x[0, 0] > 0, lambda i, x: (x + 1, i), lambda i, x: (x * 2, i + 1), 3, x),
    "scan": lambda x: jax.lax.scan(lambda c, a: ((c[0] + x[0], c[1] + 1), (a[:2] > 0, a)), (x[0], 0), x),
    "while": lambda x: steps(x, x[0]),
    "shard_map": jax.shard_map(
        lambda x: (x > 0, x.sum(0)), mesh=mesh(), in_specs=P("d", None), out_specs=(P("d", None), P("d"))
    ),
    "run_state": lambda x: pallas.run_state(lambda refs: operator.setitem(refs[0], ..., refs[1][0] + 1))((x[0], x)),
}
if hasattr(xla_metadata, "xla_metadata_call"):  # from jax 0.11 on
    HOLDING["xla_metadata_call"] = xla_metadata.xla_metadata_call(lambda x: (x > 0, x[0]), tag="test")


def kind(v, *, name, is_iterated=False):
    """Shape and dtype as a program sees them: of a reference those of its content, of a sequence those of a step."""
    aval = getattr(v.aval, "inner_aval", v.aval)
    shape = aval.shape[1:] if is_iterated else aval.shape
    return (math.prod(shape) if name == "shard_map" else shape), aval.dtype


@pytest.mark.parametrize("name", HOLDING)
def test_rows_say_where_operands_go_and_results_come_from(name):
    """Every program has inputs and results of the shapes and dtypes of what they are mapped to."""
    eqn = holding(HOLDING[name])
    assert eqn.primitive.name == name
    programs = programs_of(eqn)
    n_consts, n_carry = scan_counts(eqn.params) if name == "scan" else (len(eqn.invars), len(eqn.outvars))
    outside = [kind(v, name=name, is_iterated=i >= n_consts + n_carry) for i, v in enumerate(eqn.invars)]
    results = [kind(v, name=name, is_iterated=i >= n_carry) for i, v in enumerate(eqn.outvars)]
    if name == "shard_map":  # each device sees its part
        outside, results = ([(size // 8, dtype) for size, dtype in kinds] for kinds in (outside, results))
    for body in programs.bodies:
        assert [kind(v, name=name) for v in inputs(body)] == [outside[i] for i in body.operands]
        if body.results is not None:
            outvars = program(body.jaxpr)[0].outvars
            assert [kind(v, name=name) for v in outvars] == [results[i] for i in body.results]
    assert [outside[i] for i in programs.carried] == [results[i] for i in programs.carried.values()]
    assert len(programs.carried) == {"scan": n_carry, "while": len(eqn.outvars)}.get(name, 0)
    assert (programs.choice is None) == (name != "cond")


def test_every_row_that_this_jax_has_is_tested():
    others = {"eval_jaxpr", "closed_call", "checkpoint", "xla_metadata_call"}  # names of other versions
    assert set(PROGRAMS) - others <= set(HOLDING)


@pytest.mark.parametrize("name", HOLDING)
def test_programs_return_what_they_did(name):
    """Every row is rebuilt under autocast: same values, to a rounding, and same kinds."""
    x = jnp.linspace(-1, 1, 64).reshape(8, 8)
    found, expected = jmp.autocast(HOLDING[name], "mixed_bfloat16")(x), HOLDING[name](x)
    assert jax.tree.map(jax.typeof, found) == jax.tree.map(jax.typeof, expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7), found, expected)


def test_every_family_says_why():
    assert all(family.reason for family in _ops.FAMILIES)
    assert _ops.family("a primitive of tomorrow").op_class is jmp.OpClass.AS_WRITTEN


def dtypes_of(fun, primitive, *args, **options):
    records = jmp.explain(fun, "mixed_bfloat16", **options)(*args)
    return {dtype for record in records if record.primitive == primitive for dtype in record.in_dtypes}


X, W = jax.ShapeDtypeStruct((2, 8), jnp.float32), jax.ShapeDtypeStruct((8, 6), jnp.float32)


@pytest.mark.parametrize(
    ("power", "dtype"), [(1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"), (4, "float32"), (-1, "float32")]
)
def test_small_powers_follow_and_large_ones_run_in_float32(power, dtype):
    assert dtypes_of(lambda x, w: jax.lax.integer_pow(x @ w, power) @ w.T, "integer_pow", X, W) == {dtype}


def test_a_product_without_contraction_is_left_in_float32():
    positions, frequencies = jax.ShapeDtypeStruct((64,), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.float32)
    assert dtypes_of(lambda p, f: jnp.einsum("i,j->ij", p, f), "dot_general", positions, frequencies) == {"float32"}


# --- What users add ---


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(jmp.OpClass.ALLOW, "bfloat16"), (jmp.OpClass.DENY, "float32"), (jmp.OpClass.AS_WRITTEN, "float32")],
)
def test_ops_reclassify_a_primitive_for_one_function(op, dtype):
    assert dtypes_of(lambda x, w: jnp.tanh(x @ w) @ w.T, "tanh", X, W, ops={"tanh": op}) == {dtype}
    assert dtypes_of(lambda x, w: jnp.tanh(x @ w) @ w.T, "tanh", X, W) == {"bfloat16"}


def test_a_function_takes_the_place_of_a_primitive(rng):
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)
    seen = []

    def sine(operand, **params):
        seen.append((operand.dtype, params))
        return operand * 2

    result = jmp.autocast(jnp.sin, "mixed_bfloat16", ops={"sin": sine})(x)
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, x.astype(jnp.bfloat16).astype(jnp.float32) * 2)
    ((dtype, params),) = seen
    assert dtype == jnp.bfloat16
    assert params == jax.make_jaxpr(jnp.sin)(x).eqns[0].params


def test_registered_ops_hold_everywhere_and_go_after_ops(monkeypatch):
    monkeypatch.setattr(_ops, "_REGISTERED", {})
    jmp.register_op(tanh_p, jmp.OpClass.DENY)
    assert dtypes_of(lambda x, w: jnp.tanh(x @ w) @ w.T, "tanh", X, W) == {"float32"}
    here = {"tanh": jmp.OpClass.FOLLOW}
    assert dtypes_of(lambda x, w: jnp.tanh(x @ w) @ w.T, "tanh", X, W, ops=here) == {"bfloat16"}


@pytest.mark.parametrize("op", ["allow", None, 16, jmp.OpClass.NESTED])
def test_what_cannot_stand_for_a_primitive_is_refused(op):
    with pytest.raises(jmp.errors.InvalidOpError, match="'tanh'"):
        jmp.register_op("tanh", op)
    with pytest.raises(TypeError, match=r"OpClass\.ALLOW"):
        jmp.autocast(jnp.tanh, "mixed_bfloat16", ops={"tanh": op})


def test_a_linear_call_keeps_its_own_transpose():
    """Here twice the transpose, to tell it from JAX's."""
    w = jnp.eye(16)
    fun = lambda x: jnp.sum(linear_call(lambda w, x: x @ w, lambda w, g: 2 * (g @ w.T), w, x) @ w)  # noqa: E731
    slope = jax.grad(jmp.autocast(fun, "mixed_bfloat16"))(jnp.ones((16, 16)))
    assert jnp.array_equal(slope, jax.grad(fun)(jnp.ones((16, 16))))
    assert float(slope[0, 0]) == 2


def test_ops_are_given_by_name():
    with pytest.raises(jmp.errors.InvalidOpError, match="ops must map names"):
        jmp.autocast(jnp.tanh, "mixed_bfloat16", ops=[("tanh", jmp.OpClass.DENY)])


@pytest.mark.parametrize("name", ["pallas_call", "ffi_call", "pure_callback"])
@pytest.mark.parametrize("op", [jmp.OpClass.ALLOW, jmp.OpClass.DENY, jmp.OpClass.FOLLOW])
def test_kernels_and_callbacks_run_as_written_or_are_replaced(name, op):
    """They were traced for the dtypes that they have; a function may take their place."""
    for refuse in (lambda: jmp.autocast(jnp.tanh, "mixed_bfloat16", ops={name: op}), lambda: jmp.register_op(name, op)):
        with pytest.raises(jmp.errors.InvalidOpError, match=rf"OpClass\.{op.name} .*'{name}'.*with_policy"):
            refuse()
    jmp.autocast(jnp.tanh, "mixed_bfloat16", ops={name: jmp.OpClass.AS_WRITTEN})
    jmp.autocast(jnp.tanh, "mixed_bfloat16", ops={name: lambda *operands, **params: operands})
