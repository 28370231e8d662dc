"""The rules of quantization, one setting, text, format or leaf at a time: what is taken, refused, written, chosen."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.jaxprs import equations
from support.lowbit import MATMUL

from jmp_lite import errors, quant
from jmp_lite.quant import DotRecipe, QuantSpec, _batches, _calibrate, _tiles
from jmp_lite.quant._spec import parse_spec

# --- Specs ----------------------------------------------------------------------------------------

LARGEST = float(np.finfo(np.float32).max)
#: Texts, and the settings that they stand for.
TEXTS = {
    "e4m3": {},
    "e5m2:pow2": {"pow2": True},
    "int8:channel": {"granularity": "channel"},
    "int8:margin64": {"margin": 64},
    "int8:margin-64:stochastic": {"margin": -64, "stochastic": True},
    "int4:tile128": {"tile": 128},
    "e2m1:tile16:margin1:scale_e4m3": {"tile": 16, "margin": 1, "scale_dtype": "e4m3"},
    "int8:channel:margin-1:stochastic": {"granularity": "channel", "margin": -1, "stochastic": True},
    f"e4m3:amax{2.0**-126}": {"amax": 2.0**-126},
    f"e4m3:amax{LARGEST}": {"amax": LARGEST},
}


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_specs(text):
    spec = QuantSpec(text.partition(":")[0], **TEXTS[text])
    assert str(spec) == text
    assert parse_spec(text) == spec
    assert parse_spec(f"{text}:tensor" if "granularity" not in TEXTS[text] else text) == spec
    assert spec.granularity == ("channel" if "tile" in text or "channel" in text else "tensor")


MAGNITUDES = [2, 2.0, np.float16(2), np.int32(2), np.array(2.0), jnp.float32(2)]


@pytest.mark.parametrize("amax", MAGNITUDES, ids=repr)
def test_a_magnitude_may_be_a_number_of_any_kind(amax):
    spec = QuantSpec("e4m3", amax=amax)
    assert type(spec.amax) is float
    assert spec.amax == 2


NO_SPECS = {
    "margin": ({"margin": 65}, "at most 64, got 65"),
    "negative margin": ({"margin": -65}, "at most 64, got -65"),
    "margin of a bool": ({"margin": True}, "at most 64, got True"),
    "tiny magnitude": ({"amax": 2.0**-127}, "positive number, got 5.87747175"),
    "large magnitude": ({"amax": 2.0**128}, "positive number, got 3.40282366"),
    "magnitudes": ({"amax": np.ones(1)}, "positive number, got array"),
    "a magnitude for a tile": ({"amax": 2.0, "tile": 8}, "amax=2.0 is one number, and 'tile8' asks for several"),
    "a scale dtype without a tile": ({"scale_dtype": "e4m3"}, "scale_dtype='e4m3' must be 'e4m3', with a tile"),
    "a scale dtype of e5m2": ({"scale_dtype": "e5m2", "tile": 8}, "scale_dtype='e5m2' must be 'e4m3', with a tile"),
}


@pytest.mark.parametrize("case", NO_SPECS)
def test_settings_of_specs_beyond_the_limits(case):
    settings, message = NO_SPECS[case]
    with pytest.raises(errors.InvalidRecipeError, match=re.escape(message)):
        QuantSpec("e4m3", **settings)


# --- Recipes --------------------------------------------------------------------------------------

E4M3, INT8 = "lhs=e4m3,rhs=e4m3", "lhs=int8,rhs=int8"
READ = {
    E4M3: DotRecipe("e4m3", "e4m3"),
    f" lhs = e4m3 , rhs = e4m3 ": DotRecipe("e4m3", "e4m3"),  # noqa: F541
    "rhs=int8,lhs=none": DotRecipe(None, "int8"),
    f"{E4M3},grad=e5m2": DotRecipe("e4m3", "e4m3", "e5m2"),
    f"{E4M3},axis_name=data": DotRecipe("e4m3", "e4m3", axis_name="data"),
    f"{E4M3},axis_name=data+model": DotRecipe("e4m3", "e4m3", axis_name=("data", "model")),
    f"{E4M3},products=all": DotRecipe("e4m3", "e4m3", products="all"),
    f'{E4M3},sites={{"a/b": "{INT8}"}}': DotRecipe("e4m3", "e4m3", sites=(("a/b", DotRecipe("int8", "int8")),)),
    f'{E4M3},sites={{"a": "fp8"}}': DotRecipe("e4m3", "e4m3", sites=(("a", quant.FP8),)),
}


@pytest.mark.parametrize("text", READ)
def test_texts_of_recipes_are_read(text):
    assert quant.get_recipe(text) == READ[text]


@pytest.mark.parametrize(
    "text",
    [
        *(f"{E4M3},axis_name=", f"{E4M3},products=", "lhs=,rhs=e4m3", "rhs=e4m3", "lhs=e4m3,grad=e4m3", f"{E4M3},"),
        *(f"{E4M3},sites={{", f"{E4M3},sites=3", f"{E4M3},lhs=e4m3", "   ", "=e4m3,rhs=e4m3"),
    ],
)
def test_what_is_nearly_the_text_of_a_recipe_is_unknown(text):
    with pytest.raises(errors.InvalidRecipeError, match=r"^Unknown recipe "):
        quant.get_recipe(text)


@pytest.mark.parametrize("name", ["json", "DotRecipe", "scaled_conv", "__name__"])
def test_other_names_of_the_module_are_no_recipes(name):
    """The message lists the names that are."""
    with pytest.raises(errors.InvalidRecipeError) as caught:
        quant.get_recipe(name)
    listed = str(caught.value).partition("Accepted: ")[2].partition(", or a text")[0].split(", ")
    assert set(listed) == {name.lower() for name in quant.__all__ if isinstance(getattr(quant, name), DotRecipe)}


TURNED = {
    "the weight on the right": (quant.W8A8_STATIC, (False, True), False),
    "the weight on the left": (quant.W8A8_STATIC, (True, False), True),
    "two weights": (quant.W8A8_STATIC, (True, True), False),
    "no weight": (quant.W8A8_STATIC, (False, False), False),
    "one spec, the weight on the right": (quant.W8A16, (False, True), False),
    "one spec, the weight on the left": (quant.W8A16, (True, False), True),
    "the only spec on the left": (DotRecipe("int8:channel", None), (True, False), False),
    "the only spec on the left, and the weight not": (DotRecipe("int8:channel", None), (False, True), True),
}


@pytest.mark.parametrize("case", TURNED)
def test_the_spec_of_the_weight_is_for_the_weight(case):
    recipe, are_weights, is_turned = TURNED[case]
    expected = dataclasses.replace(recipe, lhs=recipe.rhs, rhs=recipe.lhs) if is_turned else recipe
    assert recipe.turned(are_weights) == expected


@pytest.mark.parametrize(("products", "has_weight", "takes"), [("weights", 1, 1), ("weights", 0, 0), ("all", 0, 1)])
def test_which_products_a_recipe_takes(products, has_weight, takes):
    assert DotRecipe("int8", "int8", products=products).takes(has_weight=bool(has_weight)) == bool(takes)


def test_sites_have_recipes_of_their_own():
    plain, own = DotRecipe("int8", "int8:channel"), DotRecipe("int8:amax3", "int8:channel")
    recipe = dataclasses.replace(plain, sites=(("a", own), ("b/c", plain)))
    assert [plain.depends_on_scope, recipe.depends_on_scope] == [False, True]
    assert [plain.scopes, recipe.scopes] == [frozenset(), {"a", "b/c"}]
    assert [recipe.at(scope) for scope in ("a", "b/c", "c", "")] == [own, plain, plain, plain]
    assert plain.at("a") is plain
    changed = recipe.replace(products="all")
    assert [site.products for site in (changed, changed.at("a"), changed.at("c"))] == ["all"] * 3
    assert changed.at("a").lhs == own.lhs
    assert recipe.replace(sites=()) == plain
    assert recipe.static(lhs=2.0) == DotRecipe("int8:amax2.0", "int8:channel")
    assert recipe.static() == plain


@pytest.mark.parametrize("side", ["lhs", "rhs", "grad"])
def test_one_magnitude_is_fixed_at_a_time(side):
    recipe = DotRecipe("int8", "int8", "int8").static(**{side: 3})
    assert {name: getattr(recipe, name).amax for name in ("lhs", "rhs", "grad")} == {
        **dict.fromkeys(("lhs", "rhs", "grad")),
        side: 3.0,
    }
    with pytest.raises(errors.InvalidRecipeError, match=f"{side}=3 was given, and recipe .* does not quantize it"):
        DotRecipe(*[None if side == name else "int8" for name in ("lhs", "rhs")]).static(**{side: 3})


ALLOWED = {
    "lhs=e5m2,rhs=e4m3": (False, "e5m2", "e4m3"),
    "lhs=e4m3,rhs=e5m2": (False, "e4m3", "e5m2"),
    "lhs=e5m2,rhs=e4m3,grad=e4m3": (False, "e5m2", "e4m3"),
    "lhs=e4m3,rhs=e4m3,grad=e5m2": (False, "e4m3", "e4m3"),
    "lhs=none,rhs=e5m2": (False, "none", "e5m2"),
    "lhs=int8,rhs=none": (False, "int8", "none"),
    "lhs=int8:tile8,rhs=e4m3": (True, "none", "none"),
    "lhs=e4m3,rhs=e4m3,grad=e4m3:tile8": (True, "none", "none"),
    "lhs=none,rhs=int4:tile8": (True, "none", "none"),
}


@pytest.mark.parametrize("text", ALLOWED)
def test_which_formats_go_together(text):
    """And what residuals are kept in: with tiles, they are not quantized."""
    recipe = quant.get_recipe(text)
    found = recipe.is_tiled, *(str(recipe.kept(side) or "none") for side in (0, 1))
    assert found == ALLOWED[text]
    assert [recipe.spec(0), recipe.spec(1)] == [recipe.lhs, recipe.rhs] == list(recipe.operands)
    assert recipe.of_gradients == recipe.grad


REFUSED = {
    "two of e5m2": ("lhs=e5m2,rhs=e5m2,grad=none", "No device multiplies e5m2 by e5m2"),
    "e5m2 in the backward pass": ("lhs=e4m3,rhs=e5m2,grad=e5m2", "No device multiplies e5m2 by e5m2"),
    "gradients beside one operand": ("lhs=e4m3,rhs=none,grad=e4m3", "only if both operands are"),
    "gradients of a tiled operand": ("lhs=none,rhs=int4:tile8,grad=int8:tile8", "only if both operands are"),
    "formats": ("lhs=int8,rhs=int8,grad=e4m3", "int8 and float8 cannot be multiplied"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_which_formats_do_not_go_together(case):
    text, message = REFUSED[case]
    with pytest.raises(errors.InvalidRecipeError, match=message):
        quant.get_recipe(text)


def test_what_stands_for_a_primitive():
    """Tiles are for matmuls only."""
    for recipe, others in ((quant.FP8, True), (quant.MXFP8, False), (quant.W4A16, False)):
        assert recipe.instead_of("dot_general") is recipe
        assert recipe.instead_of("conv_general_dilated") == (recipe.conv if others else None)
        assert recipe.instead_of("ragged_dot_general") == (recipe.ragged_dot if others else None)
        assert recipe.instead_of("add") is None


SPEEDS = {
    "tiles of Blackwell": (quant.MXFP8, "dot_general", ", at the speed of the compute dtype, but on NVIDIA Blackwell"),
    "other tiles": (quant.W4A16, "dot_general", ", at the speed of the compute dtype"),
    "no tiles": (quant.FP8, "dot_general", DotRecipe("e4m3", "e4m3").speed("dot_general")),
    "a convolution": (quant.FP8, "conv_general_dilated", ", at the speed of the compute dtype"),
}


@pytest.mark.parametrize("case", SPEEDS)
def test_how_fast_a_replacement_is(case):
    recipe, primitive, note = SPEEDS[case]
    assert recipe.speed(primitive) == note
    assert (", but on" in note) == (case == "tiles of Blackwell")


MX, NV = "e4m3:tile32:pow2", "e2m1:tile16:scale_e4m3"
KERNELS = {
    (MX, MX): True,
    (MX, "e5m2:tile32:pow2"): True,
    (NV, NV): True,
    (MX, "none"): False,
    ("none", NV): False,
    (MX, NV): False,
    (MX, "e4m3:tile32"): False,
    (MX, "e4m3:tile16:pow2"): False,
    ("e4m3:tile16:pow2", "e4m3:tile16:pow2"): False,
    (MX, "int8:tile32:pow2"): False,
    (NV, "e4m3:tile16:scale_e4m3"): False,
    ("e4m3:tile16:scale_e4m3",) * 2: False,
    ("e2m1:tile32:scale_e4m3",) * 2: False,
    ("e2m1:tile16",) * 2: False,
    ("e2m1:tile32:pow2",) * 2: False,
}


@pytest.mark.parametrize("specs", KERNELS, ids=" by ".join)
def test_which_tiles_a_device_multiplies(specs):
    assert _tiles.has_kernel(*map(parse_spec, specs)) == KERNELS[specs]


@pytest.mark.parametrize("capability", [None, "", "x", "10", "100.0"])
def test_a_device_says_its_capability_or_has_no_units(capability, monkeypatch):
    device = type(
        "Device", (), {"platform": "gpu"} | ({} if capability is None else {"compute_capability": capability})
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert _tiles.has_units() == (capability in ("10", "100.0"))


#: Which operands of a matmul are quantized, by their dtypes and that of the result.
QUANTIZED = [
    ("float32", "float32", None, 2),
    ("bfloat16", "float16", "float32", 2),
    ("float16", "float32", None, 2),
    ("float32", "float32", "bfloat16", 2),
    ("float8_e4m3fn", "bfloat16", None, 0),
    ("bfloat16", "float8_e5m2", None, 0),
    ("int32", "float32", "float32", 0),
    ("float32", "int8", "float32", 0),
    ("float32", "float32", "int32", 0),
    ("complex64", "complex64", None, 0),
    ("float64", "float32", None, 0),
    ("float32", "float64", None, 0),
    ("float32", "float32", "float64", 2),
]


@pytest.mark.parametrize(("lhs", "rhs", "preferred", "count"), QUANTIZED)
def test_which_operands_are_quantized(lhs, rhs, preferred, count):
    """Real floating ones of 16 and 32 bits, if the result is floating."""
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((4, 8), lhs), ((8, 3), rhs))]
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        dot = functools.partial(quant.FP8, dimension_numbers=MATMUL, preferred_element_type=preferred)
        assert len(equations("quantize_to_bits", dot, *arrays)) == count


# --- Data -----------------------------------------------------------------------------------------

BATCHES = {
    "tuples": ([(1,), (2, 3)], None),
    "lists": ([[1], [2]], None),
    "none": ([], "step was given no batches"),
    "an array": ([np.ones(2)], r"step takes a tuple of arguments for each batch, such as \(x,\), got float64\[2\]"),
    "a later dict": ([(1,), {"x": 2}], "step takes a tuple of arguments"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_are_tuples_of_arguments(case):
    batches, message = BATCHES[case]
    if message is None:
        assert list(_batches.checked(iter(batches), "step", {"w": 1.0})) == batches
        return
    with pytest.raises(errors.InvalidRecipeError, match=message):
        list(_batches.checked(iter(batches), "step", {"w": 1.0}))


@pytest.mark.parametrize("where", ["parameters", "batch"])
def test_numbers_that_are_traced_are_none(where):
    def run(x):
        list(_batches.checked([(x if where == "batch" else 1,)], "step", x if where == "parameters" else 1))

    with pytest.raises(errors.InvalidRecipeError, match="step looks at numbers, and there are none while JAX traces"):
        jax.eval_shape(run, np.ones(3))


def test_magnitudes_fall_into_buckets():
    """128 between two powers of two; signs do not count, and nothing is lost."""
    x = np.float32([0.0, 1.0, -1.0, 1.004, 1.0079, 1.99999, 2.0, -0.0, np.inf])
    counts = np.asarray(_calibrate._histogram(jnp.asarray(x).reshape(3, 3)))
    one = int(np.float32(1).view(np.uint32) >> 16)
    assert {int(i): int(counts[i]) for i in np.flatnonzero(counts)} == {
        0: 2,
        one: 3,
        one + 1: 1,
        one + 127: 1,
        one + 128: 1,
        _calibrate._NOT_FINITE: 1,
    }
    ends = _calibrate._upper_ends()
    assert ends.dtype == np.float64
    assert len(ends) == _calibrate._NOT_FINITE
    np.testing.assert_array_equal(ends[[one, one + 127]], np.nextafter(np.float32([1 + 2**-7, 2]), np.float32(0)))


def test_a_journal_keeps_the_largest_of_each_side_and_scope():
    journal = _calibrate._Journal("absmax", 1.0)
    for scope, side, amax in (("a", "lhs", 2.0), ("a", "lhs", 1.0), ("a", "rhs", 5.0), ("b", "lhs", 3.0)):
        journal.add(scope, side, (np.float32(amax), 0))
    found = {(s, side): journal.amax(s, side, QuantSpec("int8")) for s, sides in journal.seen.items() for side in sides}
    assert found == {("a", "lhs"): 2.0, ("a", "rhs"): 5.0, ("b", "lhs"): 3.0}
    amax, counts = journal.measured(jnp.float32([1, -3]))
    assert (float(amax), counts) == (3.0, 0)
    assert np.isnan(journal.measured(jnp.float32([1, np.nan]))[0])


PERCENTILES = {1e-9: True, 100: True, np.float32(99.9): True, 100.1: False, 0: False, -1: False, "99": False}


@pytest.mark.parametrize("percentile", PERCENTILES, ids=repr)
def test_percentiles_are_percents(percentile):
    check = functools.partial(_calibrate._check, quant.W8A8_STATIC, "percentile", percentile)
    if PERCENTILES[percentile]:
        check()
        return
    with pytest.raises(errors.InvalidRecipeError, match=re.escape(f"such as 99.9, got {percentile!r}.")):
        check()


def least_error(counts, ends, steps_of):
    """The definition: of each candidate, number by number."""
    best = None
    for candidate in ends[ends > ends[-1] / 256]:
        step = float(steps_of(candidate))
        error = 0.0
        for count, end in zip(counts, ends, strict=True):
            beyond = max(end - step * 127, 0)
            error += count * (end**2 if end <= step / 2 else beyond**2 or step**2 / 12)
        best = min(best or (error, candidate), (error, candidate))
    return best[1]


def test_the_least_error_is_that_of_its_definition(rng):
    """Rounded to zero, rounded to a step, or clipped; of magnitudes over ten octaves."""
    ends = 2.0 ** (np.arange(-40, 1) / 4)
    spec = QuantSpec("int8")
    steps = dict(zip(ends, np.float64(quant.absmax_scale(jnp.asarray(ends), "int8")), strict=True))
    for _ in range(40):
        counts = rng.integers(1, 10 ** rng.integers(1, 9, ends.size))
        assert _calibrate._least_error(counts, ends, spec, 1.0) == least_error(counts, ends, steps.get)


def test_calibration_waits_for_what_watches(monkeypatch):
    """Of each batch before the next, and of the last before it reads the journal."""
    waited = []
    for name in ("block_until_ready", "effects_barrier"):
        real = getattr(jax, name)
        monkeypatch.setattr(jax, name, lambda *args, n=name, r=real: waited.append(n) or r(*args))
    batches = [(np.ones((1, 4), np.float32),)] * 2
    quant.calibrate(lambda dot: lambda x: dot(x, np.ones((4, 2), np.float32), MATMUL), "w8a8_static", batches)
    assert waited == ["block_until_ready"] * 2 + ["effects_barrier"]
