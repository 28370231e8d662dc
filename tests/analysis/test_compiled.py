"""The counter of bytes: what is not touched does not count, and what runs often counts as often."""

import re

import jax
import jax.numpy as jnp
import pytest

from jmp_lite.analysis._estimation._compiled import _cost, _hlo, _roofline

ROWS = 16 * 64 * 4
STEPS, SLICE = 8, 16 * 64 * 4
INDICES = """
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)"""


def cost_of(text):
    """The cost of one program."""
    return _cost.cost(_hlo.parse(text))


def fused(body, operands, shape):
    """A program that is one fusion; its first parameter is a stack or a table, the second an index or indices."""
    names = ", ".join(f"%p{index}" for index in range(len(operands)))
    parameters = "\n".join(f"  %p{index} = {held} parameter({index})" for index, held in enumerate(operands))
    return f"""HloModule test

%fused (x: f32[]) -> f32[] {{{body}
}}

ENTRY %main (x: f32[]) -> f32[] {{
{parameters}
  ROOT %out = {shape} fusion({names}), kind=kLoop, calls=%fused
}}
"""


STACK = f"f32[{STEPS},16,64]{{2,1,0}}"
ONE = "f32[1,16,64]{2,1,0}"
PLAIN = """HloModule test

ENTRY %main (x: f32[]) -> f32[] {
  %x = f32[16,64]{1,0} parameter(0)
  ROOT %out = f32[16,64]{1,0} negate(%x)
}
"""

# --- Reads ---


@pytest.mark.parametrize(("dtype", "size"), [("f32", 4), ("bf16", 2)])
def test_a_gather_reads_its_rows_alone(dtype, size):
    """Also of a table that the fusion casts first."""
    body = f"""
  %table = {dtype}[1000,64]{{1,0}} parameter(0)
  %cast = f32[1000,64]{{1,0}} convert(%table)
  %i = s32[16,1]{{1,0}} parameter(1)
  ROOT %rows = f32[16,64]{{1,0}} gather(%cast, %i), offset_dims={{1}}, slice_sizes={{1,64}}"""
    text = fused(body, [f"{dtype}[1000,64]{{1,0}}", "s32[16,1]{1,0}"], "f32[16,64]{1,0}")
    assert cost_of(text).bytes == 16 * 64 * size + 16 * 4 + ROWS


def test_an_array_read_whole_as_well_as_in_part_counts_once():
    body = f"""
  %stack = {STACK} parameter(0){INDICES}
  %part = {ONE} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={{1,16,64}}
  %flat = f32[16,64]{{1,0}} bitcast(%part)
  %sum = f32[16,64]{{1,0}} reduce(%stack, %zero), dimensions={{0}}, to_apply=%add
  ROOT %out = f32[16,64]{{1,0}} add(%flat, %sum)"""
    assert cost_of(fused(body, [STACK, "s32[]"], "f32[16,64]{1,0}")).bytes == STEPS * SLICE + 4 + SLICE


def test_two_slices_of_one_array_count_both():
    body = f"""
  %stack = {STACK} parameter(0)
  %a = {ONE} slice(%stack), slice={{[0:1], [0:16], [0:64]}}
  %b = {ONE} slice(%stack), slice={{[1:2], [0:16], [0:64]}}
  ROOT %out = {ONE} multiply(%a, %b)"""
    assert cost_of(fused(body, [STACK], ONE)).bytes == 3 * SLICE


@pytest.mark.parametrize("opcode", ["dynamic-slice", "gather"])
def test_a_slice_outside_a_fusion_reads_what_it_takes(opcode):
    text = f"""HloModule test

ENTRY %main (x: f32[]) -> f32[] {{
  %stack = {STACK} parameter(0)
  %i = s32[] parameter(1)
  ROOT %out = {ONE} {opcode}(%stack, %i)
}}
"""
    assert cost_of(text).bytes == 2 * SLICE + 4


# --- Writes ---


def update(root=""):
    """Lines that put one slice into a stack."""
    return f"""
  %stack = {STACK} parameter(0){INDICES}
  %new = f32[16,64]{{1,0}} parameter(2)
  %one = {ONE} bitcast(%new)
  {root}%updated = {STACK} dynamic-update-slice(%stack, %one, %i, %zero, %zero)"""


OPERANDS = [STACK, "s32[]", "f32[16,64]{1,0}"]


@pytest.mark.parametrize(
    "body",
    [
        update("ROOT "),
        update() + f"\n  ROOT %out = {STACK} bitcast(%updated)",
    ],
    ids=["root", "behind a bitcast"],
)
def test_an_update_in_place_writes_the_slice_alone(body):
    assert cost_of(fused(body, OPERANDS, STACK)).bytes == 2 * SLICE + 4


def test_one_of_several_results_may_be_updated_in_place():
    body = update() + f"\n  ROOT %out = ({STACK}, f32[16,64]{{1,0}}) tuple(%updated, %new)"
    assert cost_of(fused(body, OPERANDS, f"({STACK}, f32[16,64]{{1,0}})")).bytes == 3 * SLICE + 4


def test_an_update_of_what_the_fusion_computes_writes_it_whole():
    """There is nothing in place to update."""
    body = update("ROOT ").replace("(%stack, %one", "(%twice, %one")
    body = body.replace("%i = s32[]", f"%twice = {STACK} add(%stack, %stack)\n  %i = s32[]")
    assert cost_of(fused(body, OPERANDS, STACK)).bytes == (2 * STEPS + 1) * SLICE + 4


def test_an_update_that_is_used_further_is_not_in_place():
    body = update() + f"\n  ROOT %out = {STACK} negate(%updated)"
    assert cost_of(fused(body, OPERANDS, STACK)).bytes == (2 * STEPS + 1) * SLICE + 4


def test_a_fusion_within_a_fusion_is_seen_through():
    inner = update("ROOT ")
    outer = f"""
  %stack = {STACK} parameter(0)
  %i = s32[] parameter(1)
  %new = f32[16,64]{{1,0}} parameter(2)
  ROOT %out = {STACK} fusion(%stack, %i, %new), kind=kLoop, calls=%inner"""
    text = fused(outer, OPERANDS, STACK)
    text = text.replace("%fused (x", f"%inner (x: f32[]) -> f32[] {{{inner}\n}}\n\n%fused (x", 1)
    assert cost_of(text).bytes == 2 * SLICE + 4


def test_a_scatter_reads_and_writes_the_rows_it_adds_to():
    body = """
  %table = f32[1000,64]{1,0} parameter(0)
  %i = s32[16,1]{1,0} parameter(1)
  %rows = f32[16,64]{1,0} parameter(2)
  ROOT %out = f32[1000,64]{1,0} scatter(%table, %i, %rows), update_window_dims={1}, to_apply=%add"""
    text = fused(body, ["f32[1000,64]{1,0}", "s32[16,1]{1,0}", "f32[16,64]{1,0}"], "f32[1000,64]{1,0}")
    assert cost_of(text).bytes == 3 * ROWS + 16 * 4


def test_an_asynchronous_fusion_counts_like_any_other():
    text = fused(update("ROOT "), OPERANDS, f"(({', '.join(OPERANDS)}), {STACK}, u32[])")
    text = text.replace(" fusion(%p0", " fusion-start(%p0")
    assert cost_of(text).bytes == 2 * SLICE + 4


def test_what_a_library_works_in_is_no_data():
    text = """HloModule test

ENTRY %main (x: f32[]) -> f32[] {
  %a = bf16[128,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  ROOT %out = (bf16[128,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
}
"""
    assert cost_of(text).bytes == 2 * (128 * 64 + 64 * 32 + 128 * 32)


# --- Loops ---


def test_a_launch_reads_and_writes_whole_arrays_otherwise():
    assert cost_of(PLAIN).bytes == 2 * ROWS
    assert cost_of(PLAIN).launches == 1


@pytest.mark.parametrize(("known", "times"), [(', backend_config={"known_trip_count":{"n":"8"}}', 8), ("", 1)])
def test_a_loop_counts_as_often_as_it_runs(known, times):
    """Once where XLA does not know."""
    text = f"""HloModule test

%body (x: f32[]) -> f32[] {{
  %in = (s32[], f32[16,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%in), index=0
  %x = f32[16,64]{{1,0}} get-tuple-element(%in), index=1
  %y = f32[16,64]{{1,0}} negate(%x)
  ROOT %tuple = (s32[], f32[16,64]{{1,0}}) tuple(%i, %y)
}}

ENTRY %main (x: f32[]) -> f32[] {{
  %start = (s32[], f32[16,64]{{1,0}}) parameter(0)
  ROOT %out = (s32[], f32[16,64]{{1,0}}) while(%start), condition=%more, body=%body{known}
}}
"""
    cost = cost_of(text)
    assert (cost.bytes, cost.launches) == (times * 2 * ROWS, times)
    assert [(launch.times, launch.bytes) for launch in _cost.launches(_hlo.parse(text))] == [(times, times * 2 * ROWS)]


def test_what_xla_makes_of_a_scan_is_counted_by_its_slices():
    """Every weight is read once and every result written once, however the loop is compiled."""

    def scan(x, weights):
        def step(x, weight):
            x = jnp.tanh(x @ weight)
            return x, x

        return jax.lax.scan(step, x, weights)

    shapes = jax.ShapeDtypeStruct((32, 128), jnp.float32), jax.ShapeDtypeStruct((50, 128, 128), jnp.float32)
    text = jax.jit(scan).lower(*shapes).compile().as_text()
    assert '"known_trip_count":{"n":"50"}' in re.sub(r"\s", "", text)
    weights, states = 50 * 128 * 128 * 4, 50 * 32 * 128 * 4
    counted = cost_of(text).bytes
    # At most: slices of weights copied and read, states written by the matmul, by tanh and into the stack, zeros.
    assert weights + 2 * states <= counted <= 3.5 * weights + 9 * states


# --- FLOPs ---

PRODUCTS = {
    "a product": ("f32[128,32]", "f8e4m3fn[128,64]", "f8e5m2[64,32]", "__cublas$lt$matmul$f8", 128 * 64 * 32, "float8"),
    "a convolution": (
        "bf16[2,8,8,16]",
        "bf16[2,10,10,4]",
        "bf16[16,3,3,4]",
        "__cudnn$convForward",
        4608 * 16,
        "bfloat16",
    ),
    "its input": (
        "f32[2,10,10,4]",
        "f32[2,8,8,16]",
        "f32[16,3,3,4]",
        "__cudnn$convBackwardInput",
        4608 * 16,
        "float32",
    ),
    "its kernel": (
        "f16[16,3,3,4]",
        "f16[2,10,10,4]",
        "f16[2,8,8,16]",
        "__cudnn$convBackwardFilter",
        4608 * 16,
        "float16",
    ),
    "another call": ("f32[4]", "f32[4]", "f32[4]", "other", 0, None),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_flops_of_what_libraries_compute(name):
    """Multiplications, by hand: 2 images of 8 x 8 results, 3 x 3 positions, 4 channels to 16."""
    result, lhs, rhs, target, multiplications, dtype = PRODUCTS[name]
    text = f"""HloModule test

ENTRY %main (x: f32[]) -> f32[] {{
  %a = {lhs} parameter(0)
  %b = {rhs} parameter(1)
  ROOT %out = ({result}, u8[0]) custom-call(%a, %b), dim_labels=b01f_o01i->b01f, custom_call_target="{target}"
}}
"""
    [launch] = _roofline.launches(_hlo.parse(text))
    assert (launch.flops, launch.dtypes) == (2 * multiplications, (dtype,) if dtype else ())
    assert launch.part == ("matmuls" if dtype else "other")


PARTS = {
    "quantize": ("f8e4m3fn[16,64]", "f32[16,64]", "convert(%p0)"),
    "casts": ("bf16[16,64]", "f32[16,64]", "convert(%p0)"),
    "other": ("f32[16,64]", "f32[16,64]", "negate(%p0)"),
}


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_compiled_program(part):
    result, operand, computed = PARTS[part]
    body = f"\n  %p0 = {operand} parameter(0)\n  ROOT %out = {result} {computed}"
    [launch] = _roofline.launches(_hlo.parse(fused(body, [operand], result)))
    assert launch.part == part
