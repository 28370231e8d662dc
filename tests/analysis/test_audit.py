"""``audit``: finds planted mistakes on their lines, and none in clean models; computes nothing."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import autocast_models, linen_models, nnx_models
from support.audit_clean import BY_HAND, UNDER_AUTOCAST, Clean, as_loss, audited, lines_of, step_case
from support.audit_faults import BF16, F32, FAULTS, array
from support.audit_shapes import SHAPES
from support.comparisons import slow_but_for

import jmp_lite as jmp
from jmp_lite import analysis
from jmp_lite.analysis._finding import KINDS

SEVERITIES = ["error", "warning", "note"]


# --- Faults ---


@pytest.mark.parametrize("fault", [*FAULTS.values(), *SHAPES.values()], ids=[*FAULTS, *SHAPES])
def test_fault_is_found_on_its_line(fault):
    """A planted mistake is named, with the line that it is on, and nothing worse is said."""
    found = audited(fault).findings
    assert lines_of(found, fault.kind) == {fault.line}, found
    [rank] = {SEVERITIES.index(f.severity) for f in found if f.kind == fault.kind}
    assert [str(f) for f in found if f.kind != fault.kind and SEVERITIES.index(f.severity) < min(rank, 2)] == []


def test_every_kind_is_planted():
    """Each kind of finding that ``audit`` knows has a program that shows it, here or below."""
    below = {"x64", "unmatched-rule", "recipe-partly-applied", "float32-as-written", "no-gradient", "infinite-mask"}
    planted = {fault.kind for fault in FAULTS.values()}
    assert planted | below <= set(KINDS)


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("constant", "which an array that the function closes over is"),
        ("weight", "argument '2' is float32"),
        ("Linen scale", "which argument '0/params/scale' is"),
        ("island", "bfloat16 is cast or promoted to float32."),
        ("accumulation", "dot_general returns float32"),
    ],
)
def test_leak_names_what_made_it_wide(name, culprit):
    """An argument, a constant, a cast or a matmul that asks for float32."""
    [leak] = [f for f in audited(FAULTS[name]).findings if f.kind == "float32-leak"]
    assert culprit in leak.message


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1e5 in float16", "infinite in float16"),
        ("mask of -1e9", "-1e+09 is infinite in float16, which ends at 65504."),
        ("epsilon of zero", "0 in float16, so it does not protect rsqrt"),
        ("bound of one", "The bound 0.999 is exactly 1 in bfloat16, so log of 1 - x gets 0."),
        ("bound of a logarithm", "The bound 0.9999 is exactly 1 in bfloat16, so log of log(x) gets 0."),
        ("bound of an arc", "so acos gets 1, where it or its slope is infinite."),
        ("mask by at", "The number here, as JAX rounded it, is infinite in float16."),
        ("positions", "Integers up to 999 become bfloat16, which holds integers exactly only up to 256."),
        ("mean", "A sum of 64 terms accumulates in float16."),
        ("carried sum", "A sum of 32 terms is carried in bfloat16"),
        ("segment_sum", "Up to 32 terms accumulate in each element of a bfloat16 array."),
        ("kernel", "pallas_call takes float32 in 1 of 1 operands."),
    ],
)
def test_message_has_the_figures(name, said):
    fault = {**FAULTS, **SHAPES}[name]
    assert said in " ".join(f.message for f in audited(fault).findings if f.kind == fault.kind)


# --- Clean programs ---


MODELS = ["Linen transformer", "Linen ResNet", "Linen LSTM", "NNX transformer", "NNX ResNet", "Equinox transformer"]


@pytest.mark.parametrize("case", BY_HAND.values(), ids=BY_HAND)
def test_clean_program_raises_no_alarm(case):
    """Programs written by hand with their islands of float32 are worth notes at most."""
    assert [str(f) for f in audited(case).findings if f.severity != "note"] == []


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("case", UNDER_AUTOCAST.values(), ids=UNDER_AUTOCAST)
def test_autocast_of_a_large_model_raises_no_alarm(case, policy):
    assert [str(f) for f in audited(dataclasses.replace(case, policy=policy)).findings if f.severity != "note"] == []


@pytest.mark.parametrize("policy", slow_but_for(("mixed_float16",), ["mixed_bfloat16", "mixed_float16"]))
@pytest.mark.parametrize("name", slow_but_for(("Linen LSTM", "NNX ResNet"), MODELS))
def test_autocast_of_a_model_raises_no_alarm(name, policy, rng):
    """Transformers, residual networks and recurrent ones, forward and backward."""
    case = autocast_models.CASES[name]
    found = audited(Clean(as_loss(case.fun), case.args(rng), policy))
    assert found.is_loss
    assert [str(f) for f in found.findings if f.severity != "note"] == []
    assert {row.operands for row in found.matmuls} >= {(jmp.get_policy(policy).compute_dtype.name,) * 2}


def test_autocast_keeps_numbers_that_16_bits_do_not_hold():
    """A mistake in a model written for float16 is not one in a model that autocast runs in it."""

    def fun(x, w, mask):
        y = x @ w
        y = jnp.where(mask, y, -1e9) * 1e5 + y / (jnp.abs(y) + 1e-8)
        return jax.nn.softmax(y / (jnp.sqrt(jnp.sum(y * y, -1, keepdims=True)) + 1e-5)) @ w

    found = analysis.audit(fun, "mixed_float16")(array(F32, 64, 64), array(F32, 64, 64), array(bool, 64, 64))
    assert found.findings == ()


def test_training_step_raises_no_alarm():
    """A whole step: autocast, loss scaling, Adam."""
    found = audited(step_case())
    assert not found.is_loss
    assert [str(f) for f in found.findings if f.severity != "note"] == []
    assert any(row.is_backward for row in found.matmuls)


# --- What is found by settings ---


def head(w, x):
    with jax.named_scope("head"):
        y = jnp.tanh(x @ w)
    return (y @ y.T).mean()


ARRAYS = array(F32, 16, 16), array(F32, 32, 16)


def kinds(audit):
    return [finding.kind for finding in audit.findings]


def test_rule_that_matches_nothing_is_a_finding_and_no_warning():
    found = analysis.audit(head, "mixed_bfloat16", rules=[jmp.Rule("haed", precision="full")])(*ARRAYS)
    assert kinds(found) == ["unmatched-rule"]
    assert "'haed'" in found.findings[0].message
    assert "'head'" in found.findings[0].message


def test_rule_is_no_leak():
    """The author decided: a matmul that a rule keeps in float32 is not worth a word."""
    found = analysis.audit(head, "mixed_bfloat16", rules=[jmp.Rule("head", precision="full")])(*ARRAYS)
    assert found.findings == ()
    assert {row.operands for row in found.matmuls} == {("float32", "float32"), ("bfloat16", "bfloat16")}


def test_recipe_that_is_applied_in_part_is_noted_with_the_reason():
    found = analysis.audit(head, "mixed_bfloat16", dot=jmp.quant.FP8)(*ARRAYS)
    [partly] = [f for f in found.findings if f.kind == "recipe-partly-applied"]
    assert 'products="weights"' in partly.message
    assert partly.severity == "note"


def test_precision_is_noted_where_nothing_is_low():
    found = analysis.audit(lambda w, x: jnp.dot(x, w, precision="highest"), "mixed_bfloat16")(*ARRAYS)
    assert kinds(found) == ["nothing-low", "highest-precision"]


def test_policy_of_float32_asks_for_nothing():
    assert analysis.audit(head, "float32")(*ARRAYS).findings == ()


@pytest.mark.parametrize("fun", [jax.nn.softmax, lambda x: jnp.cumsum(x, axis=0)])
def test_region_is_a_decision(fun):
    """What the author put into a region is as it was meant."""
    assert analysis.audit(fun)(array(BF16, 32, 16)).findings != ()
    assert analysis.audit(jmp.low_precision(fun))(array(BF16, 32, 16)).findings == ()


def test_product_that_autocast_leaves_is_noted_with_the_reason():
    def solved(w, x):
        return jnp.linalg.solve(w @ w.T, x @ w) @ x

    found = analysis.audit(lambda w, x: (solved(w, x), x @ w), "mixed_bfloat16")(ARRAYS[0], ARRAYS[0])
    notes = [f for f in found.findings if f.kind == "float32-as-written"]
    assert notes
    assert all("linear algebra" in f.message for f in notes)
    assert not any(f.severity == "warning" for f in found.findings)


def test_float64_is_found():
    with jax.enable_x64(True):

        def fun(x, w):
            return jnp.sin((x @ w).astype(jnp.float64))

        found = analysis.audit(fun)(array(BF16, 8, 16), array(BF16, 16, 16))
    assert kinds(found) == ["x64"]


def test_loss_without_a_gradient_is_audited_as_it_is():
    def fun(x):
        return jax.lax.while_loop(lambda x: x < 1, lambda x: x * 2, x)

    found = analysis.audit(fun)(array(F32))
    assert (kinds(found), found.is_loss) == (["no-gradient"], False)


def test_infinity_that_is_meant_is_a_note():
    def fun(x, mask):
        return jax.nn.softmax(jnp.where(mask, x, -jnp.inf).astype(F32))

    found = analysis.audit(fun)(array(jnp.float16, 8, 64), array(bool, 8, 64))
    assert kinds(found) == ["infinite-mask"]


# --- Tables ---


def two_layers(params, x):
    x = jnp.tanh(x @ params[0])
    return jnp.square(x @ params[1]).mean()


def two_layers_and_more(params, x):
    return two_layers(params, x), {"rows": x[:, 0], "name": "layer"}


@pytest.mark.parametrize("loss", [two_layers, two_layers_and_more])
def test_tables_of_a_loss(loss):
    """Two matmuls forward, three backward: the first layer needs no gradient of its input."""
    params, x = [array(F32, 16, 32), array(F32, 32, 8)], array(F32, 64, 16)
    found = analysis.audit(loss, "mixed_bfloat16")(params, x)
    count = {back: sum(row.times for row in found.matmuls if row.is_backward is back) for back in (False, True)}
    assert count == {False: 2, True: 3}
    assert {row.operands for row in found.matmuls} == {("bfloat16", "bfloat16")}
    assert sum(row.flop_share for row in found.matmuls) == pytest.approx(1)
    assert ("float32", "bfloat16") in {(row.source, row.result) for row in found.casts}
    assert found.residual_bytes["bfloat16"] >= 2 * 64 * (16 + 32)
    assert found.verdict.startswith("The loss and its gradient have 5 matmuls and convolutions, 100.0%")


def test_residuals_are_what_the_pullback_holds():
    """Bytes by dtype, without the arguments: here the cosines alone."""

    def fun(w, x):
        return jnp.sin(x @ w).sum()

    assert analysis.audit(fun)(array(F32, 16, 32), array(F32, 64, 16)).residual_bytes == {"float32": 64 * 32 * 4}


def test_products_in_a_scan_count_as_often_as_it_runs():
    def fun(x, ws):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]

    [row] = analysis.audit(fun)(array(BF16, 8, 16), array(BF16, 5, 16, 16)).matmuls
    assert (row.times, row.accumulation, row.result) == (5, "bfloat16", "bfloat16")


def test_result_is_the_dtype_that_is_used():
    """A matmul asked for in float32 whose only use is a cast back is one with a float32 sum and a narrow result."""

    def fun(x, w):
        return jax.lax.dot(x, w, preferred_element_type=F32).astype(BF16)

    [row] = analysis.audit(fun)(array(BF16, 8, 16), array(BF16, 16, 16)).matmuls
    assert (row.accumulation, row.result) == ("float32", "bfloat16")


def test_kernels_and_collectives_are_counted():
    kernels = audited(FAULTS["kernel"]).kernels
    assert [(row.primitive, row.operands, row.times) for row in kernels] == [("pallas_call", ("float32",), 1)]
    [row] = audited(FAULTS["all_gather"]).collectives
    assert (row.primitive, row.dtype, row.bytes) == ("all_gather", "float32", 2 * 16 * 4)


def test_what_reaches_no_result_does_not_count():
    """The program that runs has no equations that nobody uses."""

    def fun(x, w):
        x.astype(jnp.float16) * 1e5
        return x @ w

    with np.errstate(over="ignore"):
        assert analysis.audit(fun)(array(BF16, 8, 16), array(BF16, 16, 16)).findings == ()


def test_everything_is_json():
    found = audited(FAULTS["Linen scale"])
    data = json.loads(json.dumps(found.to_dict()))
    assert data["verdict"] == found.verdict
    assert [f["kind"] for f in data["findings"]] == kinds(found)
    assert data["matmuls"][0]["operands"] == list(found.matmuls[0].operands)


def test_printed_worst_first():
    text = str(audited(FAULTS["variance"]))
    assert text.startswith("The program has 0 matmuls and convolutions. Found: 1 error")
    assert text.index("error: cancellation") > text.index("casts:")


def test_nothing_is_compiled_or_run(caplog):
    """Shapes do for arrays; what is compiled would be logged."""
    model = linen_models.MODELS["attention"]()
    variables = jax.eval_shape(model.init, jax.random.key(0), array(F32, 8, 16))

    def loss(params, x):
        return jnp.square(model.apply(params, x)).mean()

    with jax.log_compiles():
        analysis.audit(loss, "mixed_bfloat16")(variables, array(F32, 8, 16))
        before = compilations(caplog)
        jax.jit(lambda x: x * 3 + 1)(np.ones(5))
    assert (before, len(compilations(caplog))) == ([], 1)


def compilations(caplog):
    return [text for record in caplog.records if (text := record.getMessage()).startswith("Compiling ")]


def test_module_among_the_arguments_stays_as_it_is():
    """An NNX module is traced like any other tree of arrays; its statistics do not move."""
    model = nnx_models.MODELS["image"](nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    found = analysis.audit(lambda model, x: jnp.square(model(x)).mean(), "mixed_bfloat16")(model, array(F32, 8, 16))
    assert found.is_loss
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.tree.map(np.asarray, nnx.state(model))))


def test_arguments_that_are_no_arrays_stay_what_they_are():
    def fun(params, x, *, power):
        return (x @ params["w"] ** power).mean()

    found = analysis.audit(fun)({"w": array(F32, 16, 16), "name": "layer"}, array(F32, 8, 16), power=2)
    assert found.is_loss
