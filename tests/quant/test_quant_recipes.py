"""Recipes as values: texts, equality, and what is refused."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.lowbit import MATMUL, RECIPES

import jmp_lite as jmp
from jmp_lite import quant
from jmp_lite.quant import DotRecipe, QuantSpec, get_recipe

NAMES = ("fp8", "fp8_rowwise", "int8_qat", "int8_train", "w8a16", "w8a8", "w8a8_static", "w4a16", "mxfp8", "nvfp4")


def random_spec(rng, formats, *, tiles):
    tile = int(rng.integers(1, 300)) if tiles else None
    scale_dtype = "e4m3" if tiles and rng.integers(2) else None
    return QuantSpec(
        str(rng.choice(formats)),
        ("tensor", "channel")[rng.integers(2)],
        tile=tile,
        margin=int(rng.integers(-3, 4)),
        pow2=bool(rng.integers(2)) and scale_dtype is None,
        scale_dtype=scale_dtype,
        stochastic=bool(rng.integers(2)),
    )


def random_recipe(rng):
    """A recipe that is allowed."""
    tiles, is_int = rng.integers(4) == 0, bool(rng.integers(2))
    formats = [["int8"]] * 3 if is_int else [["e4m3"], ["e4m3"], ["e4m3", "e5m2"]]
    if tiles:
        formats = [["int8", "int4", "e4m3", "e2m1"]] * 3
    lhs, rhs, grad = (random_spec(rng, names, tiles=tiles) for names in formats)
    if rng.integers(2):
        grad = None
        if rng.integers(2):
            lhs, rhs = (None, rhs) if rng.integers(2) else (lhs, None)
    axes = (None, "data", ("data", "model"))[rng.integers(3)]
    recipe = DotRecipe(lhs, rhs, grad, axis_name=axes)
    sides = [s for s in ("lhs", "rhs", "grad") if getattr(recipe, s) and getattr(recipe, s).granularity == "tensor"]
    return recipe.static(**{side: float(rng.lognormal(0, 20)) for side in sides if rng.integers(2)})


def test_every_name_is_a_recipe_and_every_text_reads_back():
    for name in NAMES:
        recipe = get_recipe(name)
        assert recipe is getattr(quant, name.upper())
        assert get_recipe(f"  {name.upper()} ") == recipe
        assert get_recipe(str(recipe)) == recipe
        assert get_recipe(recipe) is recipe
    assert set(RECIPES) <= set(NAMES)


def test_texts_of_random_recipes_read_back(rng):
    for _ in range(300):
        recipe = random_recipe(rng)
        again = get_recipe(str(recipe))
        assert again == recipe
        assert hash(again) == hash(recipe)
        assert (str(again), repr(again)) == (str(recipe), repr(recipe))
        assert pickle.loads(pickle.dumps(recipe)) == recipe  # noqa: S301
        for side in ("lhs", "rhs", "grad"):
            spec = getattr(recipe, side)
            if spec is not None:
                assert dataclasses.replace(recipe, **{side: str(spec)}) == recipe


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (quant.FP8, "lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2"),
        (quant.FP8.static(lhs=3, grad=1e-20), "lhs=e4m3:pow2:amax3.0,rhs=e4m3:pow2,grad=e5m2:pow2:amax1e-20"),
        (quant.W4A16, "lhs=none,rhs=int4:tile128,grad=none"),
        (quant.MXFP8, "lhs=e4m3:tile32:pow2,rhs=e4m3:tile32:pow2,grad=e4m3:tile32:pow2"),
        (quant.NVFP4, ",".join(f"{side}=e2m1:tile16:scale_e4m3" for side in ("lhs", "rhs", "grad"))),
        (quant.W8A16, "lhs=none,rhs=int8:channel,grad=none"),
        (
            dataclasses.replace(quant.FP8, axis_name=("data", "model")),
            "lhs=e4m3:pow2,rhs=e4m3:pow2,grad=e5m2:pow2,axis_name=data+model",
        ),
    ],
)
def test_texts(recipe, text):
    assert str(recipe) == text


def test_formats_have_many_names():
    for name, dtype in (("e4m3", jnp.float8_e4m3fn), ("e5m2", jnp.float8_e5m2), ("int8", np.int8)):
        specs = {QuantSpec(form) for form in (name, dtype, np.dtype(dtype), np.dtype(dtype).name)}
        assert len(specs) == 1


def test_recipes_are_values():
    recipe, same = DotRecipe("e4m3:pow2", "e4m3:pow2", "e5m2:pow2"), quant.FP8
    assert recipe == same
    assert {recipe: 1}[same] == 1
    assert recipe != dataclasses.replace(recipe, axis_name="data")
    for value, field in ((recipe, "lhs"), (recipe.lhs, "margin")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, None)
    dot = jax.jit(quant.scaled_dot_general, static_argnames=("dimension_numbers", "recipe"))
    x = jnp.ones((2, 2))
    for _ in range(3):
        dot(x, x, MATMUL, recipe=DotRecipe("e4m3:pow2", "e4m3:pow2", "e5m2:pow2"))
    assert dot._cache_size() == 1


def test_the_function_takes_names_texts_and_recipes(rng):
    x = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
    expected = quant.FP8(x, x, MATMUL)
    for recipe in ("fp8", str(quant.FP8), quant.FP8):
        np.testing.assert_array_equal(quant.scaled_dot_general(x, x, MATMUL, recipe=recipe), expected)
    image = x[None, None]
    np.testing.assert_array_equal(
        quant.scaled_conv(image, image, window_strides=(1, 1), padding="SAME", recipe="fp8"),
        quant.FP8.conv(image, image, (1, 1), "SAME"),
    )


WRONG_SPECS = {
    "float4": ("float4", {}, "float4"),
    "float32": (jnp.float32, {}, "float32"),
    "uint8": ("uint8", {}, "uint8"),
    "no dtype": (3.5, {}, "3.5"),
    "granularity": ("e4m3", {"granularity": "row"}, "'row'"),
    "no tile": ("e4m3", {"tile": 0}, "tile.*got 0"),
    "negative tile": ("e4m3", {"tile": -8}, "tile.*got -8"),
    "tile of bools": ("e4m3", {"tile": True}, "tile.*True"),
    "tile of floats": ("e4m3", {"tile": 1.5}, "tile.*1.5"),
    "a number for a granularity": ("e4m3", {"granularity": 128}, "got 128; parts of a channel are tile="),
    "4 bits for a tensor": ("int4", {}, r"QuantSpec\('int4', tile=128\)"),
    "4 bits for a channel": (
        "e2m1",
        {"granularity": "channel"},
        r"per channel.*QuantSpec\('e2m1', tile=128\)",
    ),
    "scales of another format": ("e2m1", {"tile": 16, "scale_dtype": "int8"}, "scale_dtype='int8' must be 'e4m3'"),
    "scales of a tensor": ("e4m3", {"scale_dtype": "e4m3"}, "with a tile"),
    "scales of two kinds": ("e4m3", {"tile": 16, "pow2": True, "scale_dtype": "e4m3"}, "without pow2"),
    "a magnitude for tiles": ("e4m3", {"tile": 16, "amax": 2.0}, "'tile16' asks for several"),
    "a margin beyond float32": ("e4m3", {"margin": 2000}, "at most 64, got 2000"),
    "margin": ("e4m3", {"margin": 1.5}, "1.5"),
}


@pytest.mark.parametrize("case", WRONG_SPECS)
def test_specs_that_mean_nothing(case):
    dtype, settings, quoted = WRONG_SPECS[case]
    with pytest.raises(jmp.errors.InvalidRecipeError, match=quoted):
        QuantSpec(dtype, **settings)


WRONG_RECIPES = {
    "nothing quantized": ((None, None), {}, "lhs=none,rhs=none"),
    "mixed": (("int8", "e4m3"), {}, "int8 and float8.*lhs=int8,rhs=e4m3"),
    "mixed gradients": (("e4m3", "e4m3", "int8"), {}, "int8 and float8.*grad=int8"),
    "e5m2 by e5m2": (("e5m2", "e5m2"), {}, "e5m2 by e5m2.*lhs=e5m2,rhs=e5m2"),
    "e5m2 in the backward pass": (("e5m2", "e4m3", "e5m2"), {}, "e5m2 by e5m2.*lhs=e5m2"),
    "gradients of weights alone": ((None, "int8", "int8"), {}, "grad=int8"),
    "no magnitude": (("e4m3:amax", "e4m3"), {}, "'amax'"),
    "negative magnitude": (("e4m3:amax-1", "e4m3"), {}, "positive number, got -1"),
    "infinite magnitude": (("e4m3:amaxinf", "e4m3"), {}, "positive number, got inf"),
    "magnitude of no number": (("e4m3:amaxnan", "e4m3"), {}, "positive number, got nan"),
    "one magnitude for channels": (("e4m3:channel:amax2", "e4m3"), {}, "amax=2.0 is one number.*'channel'"),
    "no spec": ((3, "e4m3"), {}, "3"),
    "unknown option": (("e4m3:fast", "e4m3"), {}, "'fast'"),
    "unknown format": (("e3m4", "e4m3"), {}, "'e3m4'"),
    "empty margin": (("e4m3:margin", "e4m3"), {}, "'margin'"),
    "empty option": (("e4m3:", "e4m3"), {}, "'e4m3:'"),
    "empty tile": (("e4m3:tile", "e4m3"), {}, "'tile'"),
    "a bare number": (("e4m3:128", "e4m3"), {}, "'128'"),
    "empty scale": (("e4m3:tile8:scale_", "e4m3"), {}, "dtype must be one of .*got ''"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_recipes_that_mean_nothing(case):
    specs, settings, quoted = WRONG_RECIPES[case]
    with pytest.raises(jmp.errors.InvalidRecipeError, match=quoted):
        DotRecipe(*specs, **settings)


@pytest.mark.parametrize(
    "text",
    [
        "fp9",
        "",
        "lhs=e4m3",
        "lhs=e4m3,rhs=e4m3,weight=e4m3",
        "lhs=e4m3,rhs=e4m3,history=4",
        "lhs=e4m3,rhs=e4m3,fast",
        "lhs=e4m3,lhs=e4m3,rhs=e4m3",
        "lhs=e4m3,rhs=e4m3,sites=[]",
        None,
        8,
    ],
)
def test_unknown_recipes(text):
    for use in (get_recipe, lambda text: quant.scaled_dot_general(jnp.ones(1), jnp.ones(1), MATMUL, recipe=text)):
        with pytest.raises(jmp.errors.InvalidRecipeError) as caught:
            use(text)
        assert (repr(text) in str(caught.value)) or (text and text.split("=")[-1] in str(caught.value))


def test_errors_are_values_errors_of_the_library():
    for error in (jmp.errors.InvalidRecipeError, jmp.errors.SecondDerivativeError):
        assert issubclass(error, jmp.errors.JmpLiteError)
    assert issubclass(jmp.errors.InvalidRecipeError, ValueError)
    with pytest.raises(ValueError, match="not per tile"):
        quant.MXFP8.conv(jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1, 2, 2)), (1, 1), "SAME")
