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

NAMES = ("fp8", "fp8_rowwise", "fp8_block128", "int8_qat", "int8_train", "w8a16", "w8a8", "w8a8_static")


def random_spec(rng, formats, granularities):
    return QuantSpec(
        str(rng.choice(formats)),
        granularities[rng.integers(len(granularities))],
        margin=int(rng.integers(-3, 4)),
        pow2=bool(rng.integers(2)),
        stochastic=bool(rng.integers(2)),
    )


def random_recipe(rng):
    """A recipe that is allowed."""
    if rng.integers(4) == 0:
        kinds = [[int(rng.integers(1, 300)), (int(rng.integers(1, 300)), int(rng.integers(1, 300)))]] * 3
    else:
        kinds = [["tensor", "channel"]] * 3
    is_int = bool(rng.integers(2))
    formats = [["int8"]] * 3 if is_int else [["e4m3"], ["e4m3"], ["e4m3", "e5m2"]]
    lhs, rhs, grad = (random_spec(rng, *pair) for pair in zip(formats, kinds, strict=True))
    blockwise = lhs.is_blockwise
    if rng.integers(2):
        grad = None
        if rng.integers(2) and not blockwise:
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
        (quant.FP8_BLOCK128, "lhs=e4m3:128,rhs=e4m3:128x128,grad=e4m3:128"),
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
        quant.scaled_conv(image, image, (1, 1), "SAME", recipe="fp8"), quant.FP8.conv(image, image, (1, 1), "SAME")
    )


WRONG_SPECS = {
    "float4": ("float4", {}, "float4"),
    "float32": (jnp.float32, {}, "float32"),
    "uint8": ("uint8", {}, "uint8"),
    "no dtype": (3.5, {}, "3.5"),
    "granularity": ("e4m3", {"granularity": "row"}, "'row'"),
    "empty block": ("e4m3", {"granularity": 0}, "0"),
    "negative block": ("e4m3", {"granularity": -8}, "-8"),
    "block of one size": ("e4m3", {"granularity": (128,)}, r"\(128,\)"),
    "block of three sizes": ("e4m3", {"granularity": (1, 2, 3)}, r"\(1, 2, 3\)"),
    "block of bools": ("e4m3", {"granularity": True}, "True"),
    "block of floats": ("e4m3", {"granularity": 1.5}, "1.5"),
    "list": ("e4m3", {"granularity": [128, 128]}, r"\[128, 128\]"),
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
    "half blocks": (("e4m3:128", "e4m3"), {}, "Blocks.*lhs=e4m3:128,rhs=e4m3"),
    "blocks of weights": ((None, "int8:128"), {}, "Blocks.*rhs=int8:128"),
    "gradients without blocks": (("e4m3:128", "e4m3:128", "e5m2"), {}, "Blocks"),
    "no magnitude": (("e4m3:amax", "e4m3"), {}, "'amax'"),
    "negative magnitude": (("e4m3:amax-1", "e4m3"), {}, "positive number, got -1"),
    "infinite magnitude": (("e4m3:amaxinf", "e4m3"), {}, "positive number, got inf"),
    "magnitude of no number": (("e4m3:amaxnan", "e4m3"), {}, "positive number, got nan"),
    "one magnitude for channels": (("e4m3:channel:amax2", "e4m3"), {}, "amax=2.0 is one number.*'channel'"),
    "no spec": ((3, "e4m3"), {}, "3"),
    "unknown option": (("e4m3:fast", "e4m3"), {}, "'fast'"),
    "unknown format": (("e3m4", "e4m3"), {}, "'e3m4'"),
    "empty margin": (("e4m3:margin", "e4m3"), {}, "'margin'"),
    "empty block": (("e4m3:", "e4m3"), {}, "'e4m3:'"),
    "half a block": (("e4m3:128x", "e4m3"), {}, "128x"),
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
    with pytest.raises(ValueError, match="not per block"):
        quant.FP8_BLOCK128.conv(jnp.ones((1, 1, 4, 4)), jnp.ones((1, 1, 2, 2)), (1, 1), "SAME")
