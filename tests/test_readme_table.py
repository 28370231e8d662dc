"""What the README's table of features claims of jmp_lite, row by row, and of the peers that the suite installs."""

import pathlib
import re

import flax.training.dynamic_scale
import jax
import jax.numpy as jnp
import jmp as peer
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from support.comparisons import mesh, standard
from support.jaxprs import equations

import jmp_lite as jmp
from jmp_lite import quant
from jmp_lite.errors import CorruptCheckpointError

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()

W = jnp.ones((8, 4))
X = jnp.full((2, 8), 0.5)


def model(params, x):
    with jax.named_scope("head"):
        return jax.nn.softmax(x @ params["w"])


def loss_fn(params, x):
    return jnp.sum(jnp.square(model(params, x)))


def dtype_of(primitive, fun, *args):
    """The dtype of the operands of the only equation of a primitive."""
    [eqn] = equations(primitive, fun, *args)
    return str(eqn.invars[0].aval.dtype)


def decides_per_operation():
    mixed = jmp.autocast(model, "mixed_bfloat16")
    cast = peer.get_policy("params=f32,compute=bf16,output=f32").cast_to_compute
    found = [
        [dtype_of(name, fun, {"w": W}, X) for name in ("dot_general", "exp")]
        for fun in (mixed, lambda params, x: model(*cast((params, x))))
    ]
    assert found == [["bfloat16", "float32"], ["bfloat16", "bfloat16"]]


def says_what_it_decided():
    explained = jmp.explain(model, "mixed_bfloat16")({"w": W}, X)
    assert all(row.reason for row in explained)
    [matmul] = jmp.analysis.audit(jmp.autocast(model, "mixed_bfloat16"))({"w": W}, X).matmuls
    assert set(matmul.operands) == {"bfloat16"}


def policy_per_module():
    policies = jmp.PolicyMap({"head": "full"}, default="mixed_bfloat16")
    assert dtype_of("dot_general", jmp.autocast(model, policies), {"w": W}, X) == "float32"


def overflows(params):
    return params["w"].astype(jnp.float16) * 3


def true_loss_on_an_overflow():
    params = {"w": jnp.float16(1)}
    scale = jmp.DynamicLossScale(2.0**16)
    loss, grads = jmp.scaled_value_and_grad(overflows, loss_scale=scale)(params)
    assert (float(loss), bool(jmp.all_finite(grads))) == (3.0, False)
    theirs = peer.DynamicLossScale(jnp.float16(2.0**15))
    assert np.isinf(theirs.scale(overflows(params)))
    with jax.numpy_dtype_promotion("standard"):
        *_, loss, _ = flax.training.dynamic_scale.DynamicScale().value_and_grad(overflows)(params)
    assert np.isnan(loss)
    # The step on which the scale grows: the gradient is divided by what it was multiplied by.
    params = {"w": jnp.float32(1)}
    tx = jmp.loss_scaled(optax.sgd(1.0), jmp.DynamicLossScale(8.0, period=1))
    state = tx.init(params)
    _, grads = jmp.scaled_value_and_grad(overflows, loss_scale=state)(params)
    updates, state = tx.update(grads, state, params)
    assert (float(updates["w"]), float(jmp.metrics(state)["loss_scale"])) == (-3.0, 16.0)


def skips_a_bad_step():
    tx = optax.chain(jmp.loss_scaled(standard(optax.adam(0.1))))
    params = {"w": W}
    state = tx.init(params)
    updates, skipped = tx.update({"w": jnp.full_like(W, np.nan)}, state, params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["w"], W)
    assert int(optax.tree.get(skipped, "count")) == 0
    assert jmp.metrics(skipped)["total_notfinite"] == 1


def one_verdict_for_all_replicas():
    tx = jmp.loss_scaled(optax.sgd(0.1), axis_name="batch")
    grads = {"w": jnp.ones(8).at[3].set(np.inf)}

    def step(grads):
        _, state = tx.update(grads, tx.init(grads))
        culprits = jmp.distributed.nonfinite_leaves(grads, axis_name="batch")
        return jmp.metrics(state)["total_notfinite"][None], culprits

    sharded = jax.shard_map(step, mesh=mesh(), in_specs=P("batch"), out_specs=P("batch"))
    verdicts, culprits = jax.jit(sharded)(grads)
    assert verdicts.tolist() == [1] * 8
    [(name, replicas)] = culprits.items()
    assert "w" in name
    assert np.flatnonzero(np.asarray(replicas).reshape(8, 8)[0]).tolist() == [3]


def travels_in_16_bits():
    def gradient(w):
        def total(w):
            return jnp.sum(jmp.distributed.gather_params(w, P("batch"), "mixed_bfloat16", axis_name="batch"))

        return jax.grad(total)(w)

    sharded = jax.shard_map(gradient, mesh=mesh(), in_specs=P("batch"), out_specs=P("batch"))
    assert dtype_of("all_gather", sharded, jnp.ones((8, 4))) == "bfloat16"
    assert dtype_of("reduce_scatter", sharded, jnp.ones((8, 4))) == "float32"


def fp8_int8_4_bits_sparsity():
    wide = {"w": jnp.ones((128, 4))}
    for recipe in (quant.FP8, quant.INT8_TRAIN, quant.W4A16):
        matmul = jmp.explain(model, "mixed_bfloat16", dot=recipe)(wide, jnp.ones((2, 128)))[0]
        assert matmul.reason.startswith("replaced by")
    tx = jmp.optim.prune(0.5, where=lambda path, leaf: True)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, wide), tx.init(wide), wide)
    assert float(jmp.optim.sparsity(optax.apply_updates(wide, updates))["w"]) == 0.5


def state_in_4_to_6_bytes():
    params = {"w": jnp.ones((256, 256))}

    def bytes_per_parameter(**formats):
        tx = jmp.optim.stored(optax.adamw(1e-3), **formats)
        held = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return sum(x.nbytes for x in jax.tree.leaves((held, tx.init(held)))) / params["w"].size

    assert bytes_per_parameter(params="split8", state="8bit") == pytest.approx(5, abs=0.01)
    assert bytes_per_parameter(params="stochastic", state="8bit") == pytest.approx(4, abs=0.01)
    assert bytes_per_parameter(params="stochastic", state="bfloat16") == pytest.approx(6, abs=0.01)


def verified_checkpoints(tmp_path):
    path = tmp_path / "run"
    jmp.checkpoint.save(path, {"w": jax.random.normal(jax.random.key(0), (64, 64))}, policy="float32")
    data = max((file for file in path.rglob("d/*")), key=lambda file: file.stat().st_size)
    data.write_bytes(bytes(byte ^ 1 for byte in data.read_bytes()))
    with pytest.raises(CorruptCheckpointError):
        jmp.checkpoint.restore(path, {"w": jnp.zeros((64, 64))}, policy="float32")
    jmp.export.freeze(model, {"w": W}, X, path=tmp_path / "model")
    served = jmp.export.load(tmp_path / "model")
    np.testing.assert_allclose(served(X), model({"w": W}, X), rtol=1e-6)


def costs_and_a_measured_policy():
    shapes = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
    estimate = jmp.analysis.estimate(loss_fn, device="h100", compiled=False)
    assert estimate(shapes, jax.ShapeDtypeStruct((64, 4096), jnp.float32)).rows
    advice = jmp.analysis.recommend(loss_fn, {"w": W}, [(X,), (2 * X,)])
    assert "jmp.autocast(loss_fn" in advice.policy()


ROWS = {
    "Decides per operation, without changing the model": decides_per_operation,
    "Says what it decided, and why": says_what_it_decided,
    "Policy per module, by path": policy_per_module,
    "True loss on an overflow; right gradients on a growth step": true_loss_on_an_overflow,
    "Skips a bad step, inside an Optax chain": skips_a_bad_step,
    "One verdict for all replicas, and the leaf to blame": one_verdict_for_all_replicas,
    "Parameters travel in 16 bits, gradients add up in float32": travels_in_16_bits,
    "FP8, INT8, 4 bits, sparsity, in any model": fp8_int8_4_bits_sparsity,
    "Weights and optimizer state in 4 to 6 bytes, not 12": state_in_4_to_6_bytes,
    "Verified checkpoints, and models in one file": verified_checkpoints,
    "Costs on an absent device; a policy from measurements": costs_and_a_measured_policy,
}


def test_every_row_of_the_table_is_shown():
    table = README.partition("<!-- end of figures -->")[2].partition("## Where to go next")[0]
    rows = re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
    assert rows == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_claim(row, request):
    show = ROWS[row]
    show(*[request.getfixturevalue("tmp_path")] if "tmp_path" in show.__code__.co_varnames else [])
