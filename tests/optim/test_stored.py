"""What `stored` does in a step: the arithmetic of float32, and an encoding that is off by one step at most."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.comparisons import apply_updates, raw, slow_but_for, standard, structure_and_dtypes
from support.optimizers import ALIASES, optimizer
from support.storage import KEPT, adam, gradients, moment_bound, shapes_for, weight_bound, weights

import jmp_lite as jmp
from jmp_lite._tree import path_string
from jmp_lite.optim import Float, Log, Ratio, SignedLog, stored
from jmp_lite.optim._stored import decoded


def check_step(transforms, name, params, opt_state, grads):
    """Takes a step, and holds it against that of float32 from the same numbers."""
    tx, inner = transforms
    dtype = params["kernel"].dtype
    full = jmp.optim.full_precision_params(opt_state, params)
    updates, expected = inner.update(grads, decoded(opt_state.inner_state, opt_state.layout), full)
    wanted = jax.tree.map(lambda p, u: np.asarray(p + u), full, updates)
    steps, after = tx.update(grads, opt_state, params)
    new = apply_updates(params, steps)
    found = jmp.optim.full_precision_params(after, new)
    for leaf in params:
        error = np.abs(np.float64(found[leaf]) - np.float64(wanted[leaf]))
        bound = weight_bound(name, wanted[leaf], dtype)
        assert np.all((error <= bound) | ~np.isfinite(wanted[leaf])), (leaf, error.max())
        np.testing.assert_array_equal(np.isfinite(found[leaf]), np.isfinite(wanted[leaf]))
    of_float32, of_stored = jax.tree.leaves(expected), jax.tree.leaves(decoded(after.inner_state, after.layout))
    kept = {one.leaf: one for one in after.layout.kept}
    for i, (value, back) in enumerate(zip(of_float32, of_stored, strict=True)):
        if i not in kept:
            assert raw(back) == raw(value)
            continue
        other = None if kept[i].other is None else of_stored[kept[i].other]
        bound = moment_bound(kept[i].format, value, other)
        error = np.abs(np.float64(back) - np.float64(value))
        assert np.all((error <= bound) | ~np.isfinite(value)), (kept[i].key, error.max())
        np.testing.assert_array_equal(np.isfinite(back), np.isfinite(value))
    assert structure_and_dtypes(after) == structure_and_dtypes(opt_state)
    return new, after


COMMON = ("adamw", "sgd with momentum", "adafactor with momentum")


@pytest.mark.covering(1)
@pytest.mark.parametrize(("params", "state"), [("split8", "8bit"), ("split16", "float32"), ("stochastic", "bfloat16")])
@pytest.mark.filterwarnings("ignore:state='.*' leaves")
@pytest.mark.parametrize("alias", slow_but_for(COMMON, ALIASES))
def test_a_step_is_that_of_float32(alias, params, state, rng):
    """For every optimizer of Optax and every format: what is stored is a neighbor of what float32 would be."""
    inner = optimizer(alias)
    tx = stored(inner, params=params, state=state)
    leaves = weights(rng, shapes=shapes_for(alias))
    opt_state = tx.init(leaves)
    for _ in range(3):
        grads = gradients(rng, shapes=shapes_for(alias))
        leaves, opt_state = check_step((tx, inner), params, leaves, opt_state, grads)


HARD = {
    "zero": lambda rng, shape: np.zeros(shape),
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-12,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e12,
    "decades": lambda rng, shape: rng.standard_normal(shape) * 10.0 ** rng.integers(-10, 3, shape),
    "NaN": lambda rng, shape: np.full(shape, np.nan),
}


@pytest.mark.parametrize("dtype", slow_but_for(("float16",), ("bfloat16", "float16")))
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.filterwarnings("ignore:state='.*' leaves")
@pytest.mark.parametrize("alias", slow_but_for(COMMON, ALIASES))
def test_hard_gradients(alias, kind, dtype, rng):
    """What is finite in float32 is finite, parameters of float16 too; what is not is visible."""
    inner = optimizer(alias)
    tx = stored(inner, params="split8", state="8bit")
    leaves = weights(rng, dtype, shapes_for(alias))
    opt_state = tx.init(leaves)
    for _ in range(2):
        grads = {name: jnp.asarray(HARD[kind](rng, leaf.shape), jnp.float32) for name, leaf in leaves.items()}
        leaves, opt_state = check_step((tx, inner), "split8", leaves, opt_state, grads)


# --- Formats of the state -------------------------------------------------------------------------


def formats_of(opt_state):
    paths = [path_string(path) for path, _ in jax.tree_util.tree_leaves_with_path(opt_state.inner_state)]
    return {paths[kept.leaf]: kept.format for kept in opt_state.layout.kept}


@pytest.mark.parametrize(
    ("inner", "formats"),
    [
        (optax.adam(RATE := 1e-3), {"mu": Ratio, "nu": Log}),
        (optax.nadamw(RATE), {"mu": Ratio, "nu": Log}),
        (optax.amsgrad(RATE), {"mu": Ratio}),
        (optax.adamax(RATE), {"mu": SignedLog}),
        (optax.yogi(RATE), {"mu": SignedLog}),
        (optax.contrib.adopt(RATE), {"mu": SignedLog, "nu": Log}),
        (optax.adabelief(RATE), {"nu": Log}),
        (optax.lion(RATE), {"mu": Float}),
        (optax.contrib.muon(RATE), {"mu": Float}),
        (optax.contrib.ademamix(RATE), {"m1": SignedLog, "m2": Float, "nu": Log}),
        (optax.sgd(RATE, momentum=0.9), {"trace": SignedLog}),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), {"mu": Ratio, "nu": Log}),
        (optax.contrib.schedule_free_adamw(RATE), {"nu": Log}),
    ],
    ids=lambda value: "" if isinstance(value, tuple) else "-".join(value),
)
@pytest.mark.filterwarnings("ignore:state='8bit' leaves")
def test_eight_bit_formats(inner, formats, rng):
    """A ratio only where `mu` grows as the root of `nu`: in ADOPT it does not, and in Adamax `nu` is not a square."""
    opt_state = stored(standard(inner), params="split8", state="8bit").init({"kernel": weights(rng)["kernel"]})
    found = {name.split("/")[-2]: type(one) for name, one in formats_of(opt_state).items()}
    assert found == formats


BY_RANK = {"mask": lambda params: {name: leaf.ndim > 1 for name, leaf in params.items()}}
ADAM_AMONG_OTHERS = {
    "L2 decay before": lambda: optax.chain(optax.add_decayed_weights(0.1), optax.adam(RATE)),
    "centered": lambda: optax.chain(optax.centralize(), optax.adam(RATE)),
    "normalized": lambda: optax.chain(optax.normalize_by_update_norm(), optax.adam(RATE)),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, key=0), optax.adam(RATE)),
    "a mask that reads ranks": lambda: optax.adamw(RATE, **BY_RANK),
    "a mask that reads sizes": lambda: optax.masked(
        optax.adam(RATE), lambda params: jax.tree.map(lambda leaf: leaf.size > 8, params)
    ),
    "line search": lambda: optax.chain(optax.adam(RATE), optax.scale_by_backtracking_linesearch(10)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(RATE), 4).gradient_transformation(),
    "SAM": lambda: optax.contrib.sam(optax.adam(RATE), optax.sgd(0.05), sync_period=2),
}


@pytest.mark.parametrize(
    "name", slow_but_for(("L2 decay before", "centered", "normalized", "a mask that reads ranks"), ADAM_AMONG_OTHERS)
)
@pytest.mark.filterwarnings("ignore:state='8bit' leaves '(acc_grads|cache)'")
def test_adam_has_its_formats_among_other_transforms(name, rng):
    opt_state = stored(standard(ADAM_AMONG_OTHERS[name]()), params="split8", state="8bit").init(weights(rng))
    assert sorted({type(one).__name__ for one in formats_of(opt_state).values()}) == ["Log", "Ratio"]


def test_formats_do_not_depend_on_how_a_program_is_debugged(rng):
    leaves = jax.device_put(weights(rng))
    with jax.transfer_guard("disallow"), jax.debug_nans(True):
        opt_state = jax.jit(stored(standard(optax.adam(RATE)), params="split8", state="8bit").init)(leaves)
    assert {type(one) for one in formats_of(opt_state).values()} == {Ratio, Log}


def test_an_optimizer_that_cannot_be_tried(rng):
    """It takes more than Optax's arguments."""
    inner = optax.adam(RATE)
    picky = optax.GradientTransformationExtraArgs(inner.init, lambda updates, state, params, *, own: None)
    opt_state = stored(picky, params="split8", state="8bit").init(weights(rng))
    assert {type(one) for one in formats_of(opt_state).values()} == {SignedLog, Log}


def test_formats_by_pattern(rng):
    tx = stored(optax.adam(1e-3), params="split8", state={"mu/kernel": "bfloat16", "nu": Log(highest=20)})
    opt_state = tx.init(weights(rng))
    assert formats_of(opt_state) == {
        "0/mu/kernel": Float(),
        **{f"0/nu/{name}": Log(highest=20) for name in ("bias", "gain", "kernel")},
    }
    assert opt_state.inner_state[0].mu["bias"].dtype == jnp.float32
    assert opt_state.inner_state[0].mu["kernel"].dtype == jnp.bfloat16


def test_names_of_parameters_are_no_fields(rng):
    """Parameters that are called as moments are."""
    params = {"mu": {"nu": weights(rng)["kernel"]}, "nu": weights(rng)["bias"]}
    opt_state = stored(standard(optax.adam(1e-3)), params="split8", state="8bit").init(params)
    adam = opt_state.inner_state[0]
    assert [leaf.dtype for leaf in jax.tree.leaves(adam.mu)] == [np.int8, np.int8]
    assert [leaf.dtype for leaf in jax.tree.leaves(adam.nu)] == [np.uint8, np.uint8]


def test_resident_bytes(rng):
    """Of AdamW, per parameter, what the model sees included."""
    leaves = {"kernel": jnp.zeros((64, 64), jnp.bfloat16)}
    expected = {
        ("split16", "float32"): 12,
        ("split8", "float32"): 11,
        ("stochastic", "float32"): 10,
        ("stochastic", "bfloat16"): 6,
        ("split8", "8bit"): 5,
        ("stochastic", "8bit"): 4,
    }
    for (params, state), size in expected.items():
        opt_state = stored(standard(optax.adamw(1e-3)), params=params, state=state).init(leaves)
        arrays = [leaf for leaf in jax.tree.leaves((leaves, opt_state)) if leaf.size > 1]
        assert sum(leaf.nbytes for leaf in arrays) == size * 64 * 64, (params, state)


# --- What is refused, and what is said ------------------------------------------------------------


class OwnFormat:
    """Of bfloat16, and what it returns instead of a step's numbers."""

    dtype, relative_to, largest = jnp.dtype(jnp.bfloat16), None, ()

    def __init__(self, encoded=jnp.bfloat16, decoded=jnp.float32):
        self.encoded, self.decoded = encoded, decoded

    def encode(self, value, bits, other):
        return value.astype(self.encoded)

    def decode(self, stored, other):
        return stored.astype(self.decoded)


class WithoutHash(OwnFormat):
    __hash__ = None


@dataclasses.dataclass(frozen=True)
class OfFields(OwnFormat):
    table: list


REFUSED = {
    "a format that cannot be compared": (
        lambda: stored(adam(), state={"mu": WithoutHash()}),
        "has no hash.*frozen=True",
    ),
    "a format of a list": (
        lambda: stored(adam(), state={"mu": OfFields([1])}),
        "has no hash.*unhashable type: 'list'.*frozen=True, of fields that have one",
    ),
    "an optimizer that was not called": (lambda: stored(optax.adam), "takes an Optax optimizer, got the function adam"),
    "a class": (lambda: stored(adam(), state={"nu": Log}), "is not a format of a moment"),
    "a key": (lambda: stored(adam(), state={1: "log"}), "patterns, such as 'mu', got 1"),
    "a number for a name": (lambda: Ratio(relative_to=3), "relative_to must name a moment.*got 3"),
    "a text for a bound": (lambda: Ratio(bound="8"), "bound must be .* got '8'"),
    "an unknown name": (lambda: Float("bf17"), "got 'bf17'"),
    "whole numbers": (lambda: Float(np.dtype(np.int8)), "got dtype.'int8'"),
    "parameters that do not exist": (lambda: stored(adam(), params="split9"), r"params='split9' .* 'split8'\?"),
    "a dtype": (lambda: stored(adam(), params=jnp.bfloat16), "params=.*bfloat16.* is not a format"),
    "state that does not exist": (lambda: stored(adam(), state="8bits"), r"state='8bits' .* '8bit'\?"),
    "one format for all": (lambda: stored(adam(), state="log"), r"write state=\{'mu': 'log'\}"),
    "no mapping": (lambda: stored(adam(), state=8), "got 8"),
    "a format in a pattern": (lambda: stored(adam(), state={"mu": "ration"}), r"'ration'\} .* 'ratio'\?"),
    "an object": (lambda: stored(adam(), state={"mu": 8}), r"\{'mu': 8\} is not a format"),
    "a seed": (lambda: stored(adam(), seed=-1), "seed must be .* got -1"),
    "a range": (lambda: Log(highest=200), "highest"),
    "a bound": (lambda: Ratio(bound=0.0), "bound"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name):
    make, message = REFUSED[name]
    with pytest.raises(jmp.errors.JmpLiteError, match=message):
        make()


REFUSED_AT_INIT = {
    "a format that encodes to another dtype": (
        {"state": {"mu": OwnFormat(encoded=jnp.float32)}},
        jnp.bfloat16,
        r"encode of .*OwnFormat.* returned float32\[8\], and must return bfloat16 of the shape \[8\]",
    ),
    "a pattern that matches nothing": (
        {"state": {"mew": "slog"}},
        jnp.bfloat16,
        r"Pattern 'mew' matches nothing .* 'mu', 'nu'",
    ),
    "two patterns": ({"state": {"mu": "slog", "kernel": "bfloat16"}}, jnp.bfloat16, "'mu' and 'kernel' ask for"),
    "a ratio without its neighbor": ({"state": {"nu": Ratio(relative_to="mv")}}, jnp.bfloat16, "relative to '0/mv"),
    "a ratio of a ratio": ({"state": {"mu": "ratio", "nu": "ratio"}}, jnp.bfloat16, "on its own"),
    "all float32": ({}, jnp.float32, r"from_full_precision\(tx, params\)"),
    "float8": ({}, jnp.float8_e4m3fn, "is float8_e4m3fn.* takes bfloat16"),
    "16 bits as float32": ({"params": "float32"}, jnp.float16, "'bias' is float16.*Choose params='split8'"),
}


@pytest.mark.parametrize("name", REFUSED_AT_INIT)
def test_refused_at_init(name, rng):
    options, dtype, message = REFUSED_AT_INIT[name]
    tx = stored(adam(), **{"params": "split8", **options})
    with pytest.raises(jmp.errors.InvalidStorageError, match=message):
        tx.init(weights(rng, dtype))


def test_a_format_that_decodes_to_another_dtype(rng):
    tx = stored(adam(), params="split8", state={"mu": OwnFormat(decoded=jnp.bfloat16)})
    with pytest.raises(jmp.errors.InvalidStorageError, match=r"decode of .* returned bfloat16.* must return float32"):
        tx.update(gradients(rng), tx.init(weights(rng)), weights(rng))


def test_update_without_parameters(rng):
    tx = stored(adam(), **KEPT)
    with pytest.raises(jmp.errors.InvalidStorageError, match="needs the parameters"):
        tx.update(gradients(rng), tx.init(weights(rng)))


def test_no_full_precision_in_a_state(rng):
    with pytest.raises(jmp.errors.InvalidStorageError, match="of type tuple"):
        jmp.optim.full_precision_params(adam().init(weights(rng)), weights(rng))


OwnState = type("OwnState", (optax.TraceState,), {})


def own_optimizer():
    return optax.GradientTransformation(
        lambda params: OwnState(jax.tree.map(jnp.zeros_like, params)),
        lambda updates, state, params=None: (updates, state),
    )


LEFT = {
    "of another library": (own_optimizer(), "leaves 'trace' of OwnState"),
    "a maximum": (
        optax.amsgrad(1e-3),
        "leaves '0/nu(_max)?' of ScaleByAmsgradState.*state={'mu': 'ratio', 'nu(_max)?': 'slog'}",
    ),
    "factored": (optax.adafactor(1e-3, min_dim_size_to_factor=8), "'0/v_(row|col)' of Fact.*in the shape of its param"),
    "a sum": (optax.adagrad(1e-3), "leaves '0/sum_of_squares' of ScaleByRssState"),
    "a copy": (optax.contrib.schedule_free_sgd(1e-3), "leaves 'z' of ScheduleFreeState"),
    "what is subtracted": (
        optax.rmsprop(1e-3, centered=True, momentum=0.9),
        r"leaves '0/[mn]u' of ScaleByRStdDevState.*'trace': optim.SignedLog\(highest=8\), '[mn]u': 'slog'}",
    ),
    "flattened": (optax.flatten(optax.adam(1e-3)), "leaves '0/[mn]u' of ScaleByAdamState"),
}


@pytest.mark.parametrize("name", LEFT)
def test_state_that_stays_is_named(name, rng):
    inner, message = LEFT[name]
    with pytest.warns(jmp.errors.UncompressedStateWarning, match=message):
        stored(standard(inner), **KEPT).init(weights(rng))


def test_state_of_another_library_in_a_format(rng):
    named = stored(own_optimizer(), params="split8", state={"trace": "slog"}).init(weights(rng))
    assert named.inner_state.trace["kernel"].dtype == np.uint8


@pytest.mark.parametrize("dtype", ["bfloat16", "bf16", jnp.bfloat16, np.dtype(jnp.bfloat16)], ids=str)
def test_dtypes_are_given_as_elsewhere(dtype):
    assert Float(dtype) == Float()
    assert hash(Float(dtype)) == hash(Float())
