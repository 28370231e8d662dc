"""What ``explain`` says: figures by arithmetic, a page that can be read at a glance, and of Flax models what runs."""

import collections
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import export, lax
from jax.experimental import pallas
from jax.sharding import PartitionSpec as P
from support import jaxprs
from support.comparisons import DEVICES, assert_identical, compilations, mesh

import jmp_lite as jmp

LOW = "mixed_bfloat16"
BF16, F32 = "bfloat16", "float32"
M, K, N = 8, 16, 32
X, W, SQUARE = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, K), (K, N), (K, K)))
ONCE, ONCE_SQUARE = 2 * M * K * N, 2 * M * K * K

# --- Figures ---


def times(n, x, v):
    return lax.scan(lambda c, _: (jnp.tanh(c @ v), None), x, length=n)[0]


def squares(fun):
    return lambda *args: jnp.sum(fun(*args) ** 2)


def convolution(x, kernel):
    return lax.conv_general_dilated(x, kernel, (2, 2), "SAME", feature_group_count=2)


def ragged(x, w):
    return lax.ragged_dot(x, w, jnp.asarray([3, M - 3], jnp.int32))


def doubled(x):
    def kernel(ref, out_ref):
        out_ref[...] = ref[...] * 2

    return pallas.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


def my_dot(lhs, rhs, dimension_numbers, **params):
    return lax.dot_general(lhs, rhs, dimension_numbers, **params)


def my_product(lhs, rhs, **params):
    return lax.dot_general(lhs, rhs, params["dimension_numbers"])


def in_float32(x, w):
    with jax.named_scope("head"):
        return x @ w


IMAGES, KERNELS = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 16, 16), (4, 4, 3, 3)))
ONE_CONVOLUTION = (
    2 * (2 * 4 * 8 * 8) * (4 * 3 * 3)
)  # two per result, input feature of its group, and place of the kernel
POINTS, ROTATION = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((M, 3), (3, 3)))
EXPERTS, BATCH = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, K, N), (5, M, K)))
HEAD = jmp.Rule("head", precision="full")

#: A program, its arguments, settings, and for each group the number of matmuls and their FLOPs.
FIGURES = {
    "none": (jnp.exp, [X], {}, {}),
    "plain": (jnp.matmul, [X, W], {}, {"low": (1, ONCE)}),
    "gradients": (jax.grad(squares(jnp.matmul), (0, 1)), [X, W], {}, {"low": (3, 3 * ONCE)}),
    "batch": (jnp.matmul, [BATCH, W], {}, {"low": (1, 5 * ONCE)}),
    "jit": (jax.jit(lambda x, w: jnp.einsum("ab,bc->ac", x, w)), [X, W], {}, {"low": (1, ONCE)}),
    "scan": (lambda x, v, w: times(5, x, v) @ w, [X, SQUARE, W], {}, {"low": (6, 5 * ONCE_SQUARE + ONCE)}),
    "scan in a scan": (
        lambda x, v: lax.scan(lambda c, _: (times(5, c, v), None), x, length=3)[0],
        [X, SQUARE],
        {},
        {"low": (15, 15 * ONCE_SQUARE)},
    ),
    "gradient of a scan": (
        jax.grad(squares(functools.partial(times, 5)), 1),
        [X, SQUARE],
        {},
        {"low": (15, 15 * ONCE_SQUARE)},
    ),
    "while": (
        lambda x, v: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ v), (0, x)),
        [X, SQUARE],
        {},
        {"low": (1, ONCE_SQUARE)},
    ),
    "cond": (
        lambda x, w: lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x @ w * 2, x),
        [X, W],
        {},
        {"low": (2, 2 * ONCE)},
    ),
    "shard_map": (
        jax.shard_map(jnp.matmul, mesh=mesh(), in_specs=(P("batch"), P()), out_specs=P("batch")),
        [X, W],
        {},
        {"low": (1, ONCE // DEVICES)},
    ),
    "few terms": (
        lambda p, r, x, w: (p @ r, x @ w),
        [POINTS, ROTATION, X, W],
        {},
        {"outer": (1, 2 * M * 3 * 3), "low": (1, ONCE)},
    ),
    "two vectors": (lambda x, w: (jnp.vdot(x, x), x @ w), [X, W], {}, {"outer": (1, 2 * M * K), "low": (1, ONCE)}),
    "a rule": (
        lambda x, w: (in_float32(x, w), x @ w),
        [X, W],
        {"rules": HEAD},
        {"float32": (1, ONCE), "low": (1, ONCE)},
    ),
    "a region": (jmp.full_precision(jnp.matmul), [X, W], {}, {"float32": (1, ONCE)}),
    "a loop left alone": (
        jmp.no_autocast(lambda x, v: lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, v), None), x, length=5)[0]),
        [X, SQUARE],
        {},
        {"float32": (5, 5 * ONCE_SQUARE)},
    ),
    "dot": (jnp.matmul, [X, W], {"dot": my_dot}, {"replaced": (1, ONCE)}),
    "dot beside a convolution": (
        lambda x, w, image, kernel: (x @ w, convolution(image, kernel)),
        [X, W, IMAGES, KERNELS],
        {"dot": my_dot},
        {"replaced": (1, ONCE), "low": (1, ONE_CONVOLUTION)},
    ),
    "ops": (jnp.matmul, [X, W], {"ops": {"dot_general": my_product}}, {"replaced": (1, ONCE)}),
    "float32 sums": (jnp.matmul, [X, W], {"accumulation_dtype": jnp.float32}, {"low": (1, ONCE)}),
    "integers": (jnp.matmul, [jax.ShapeDtypeStruct((K, K), jnp.int32)] * 2, {}, {"other": (1, 2 * K**3)}),
    "convolutions": (
        jax.grad(squares(convolution), (0, 1)),
        [IMAGES, KERNELS],
        {},
        {"low": (3, 3 * ONE_CONVOLUTION)},
    ),
    "ragged": (jax.grad(squares(ragged), (0, 1)), [X, EXPERTS], {}, {"low": (3, 3 * ONCE)}),
    "nothing in it": (convolution, [IMAGES, jax.ShapeDtypeStruct((0, 4, 3, 3), jnp.float32)], {}, {"low": (1, 0)}),
    "a kernel": (lambda x, w: doubled(x @ w), [X, W], {}, {"low": (1, ONCE)}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    """Numbers of matmuls and their shares of all FLOPs, from the shapes."""
    fun, args, options, expected = FIGURES[name]
    explanation = jmp.explain(fun, LOW, **options)(*args)
    found = explanation.summary.matmuls
    total = sum(work for _, work in expected.values())
    assert {group: figures for group, figures in found.items() if figures[0]} == {
        group: (count, pytest.approx(work / max(total, 1))) for group, (count, work) in expected.items()
    }
    assert sum(record.flops * record.trips for record in explanation) == total
    counts = [count for count, _ in expected.values()]
    first = str(explanation).splitlines()[0]
    assert sorted(map(int, re.findall(r"(\d+) (?:in|of|too|replaced)", first))) == sorted(counts)


def test_symbolic_sizes():
    """A size that is not known counts as 1, in matmuls and as the length of a loop."""
    [b] = export.symbolic_shape("b")
    x, xs = (jax.ShapeDtypeStruct((b, *shape), jnp.float32) for shape in ((K,), (M, K)))
    found = jmp.explain(lambda x, w, v: (x @ w, jmp.full_precision(jnp.matmul)(x, v)), LOW)(x, W, SQUARE)
    assert found.summary.matmuls["low"] == (1, pytest.approx(N / (N + K)))
    looped = jmp.explain(lambda xs, w: lax.scan(lambda c, x: (c, x @ w), 0, xs)[1], LOW)(xs, W)
    assert looped.summary.matmuls["low"] == (1, 1)


def test_casts():
    """Both operands of a matmul, and neither of what is in float32 anyway."""
    assert jmp.explain(jnp.matmul, LOW)(X, W).summary.casts == 2
    assert jmp.explain(jnp.exp, LOW)(X).summary.casts == 0
    assert jmp.explain(jnp.matmul, "full")(X, W).summary.casts == 0


# --- The page ---


def lines_of(explanation):
    """The lines of a page: those of the summary, those of the table."""
    summary, table = str(explanation).split("\n\n")
    return summary.splitlines(), table.splitlines()


def test_page():
    """Products first, those in float32 with share, line and reason, the largest first; then the table."""

    def model(x, v, w):
        with jax.named_scope("head"):
            small, large = x @ v, lax.scan(lambda c, _: (c, x @ w), 0, length=3)[1]
        return doubled(small), large, x @ w

    found = jmp.explain(model, LOW, rules=HEAD)(X, SQUARE, W)
    lines, table = lines_of(found)
    total = ONCE_SQUARE + 4 * ONCE
    low = f"1 in 16 bits ({ONCE / total:.1%} of FLOPs)"
    wide = f"4 in float32 ({(3 * ONCE + ONCE_SQUARE) / total:.1%} of FLOPs)"
    assert lines[0] == f"Matmuls and convolutions: {low}, {wide}. Operands cast: 2."
    for line, work in zip(lines[1:3], (3 * ONCE, ONCE_SQUARE), strict=True):
        assert line.startswith(f"  float32, {work / total:.1%}: ")
        assert re.search(r"test_autocast_explain\.py:\d+.* in head: rule for scope 'head'$", line)
    assert re.fullmatch(r"  kernel pallas_call on f32, as written: .*test_autocast_explain\.py:\d+.*", lines[3])
    assert table == found.table().splitlines()
    assert table[0].split() == ["scope", "primitive", "class", "tag", "operands", "results", "source", "reason"]
    [kernel] = found.summary.kernels
    assert (kernel.primitive, kernel.in_dtypes, kernel.op_class) == ("pallas_call", (F32,), "as_written")
    assert [record.flops for record in found.summary.float32] == [ONCE, ONCE_SQUARE]


@pytest.mark.parametrize(
    ("name", "note"), [("while", "while loop counts once"), ("cond", "Each branch of a cond counts")]
)
def test_what_was_counted_how(name, note):
    noted = [other for other in FIGURES if note in str(jmp.explain(FIGURES[other][0], LOW)(*FIGURES[other][1]))]
    assert noted == [name]


def test_products_that_dot_was_not_applied_to():
    """Convolutions, a few terms, regions; each with its reason, and none where dot was not given."""

    def model(products, points, images):
        with jax.named_scope("head"):
            low = points[0] @ points[1], convolution(*images)
            return jnp.matmul(*products), low, jmp.full_precision(jnp.matmul)(*products)

    args = [(X, W), (POINTS, ROTATION), (IMAGES, KERNELS)]
    asked = {"dot": my_dot}, {"rules": jmp.Rule("head", dot=my_dot)}
    for options, wide in zip(asked, (["float32"], []), strict=True):  # regions go before rules
        found = jmp.explain(model, LOW, **options)(*args)
        skipped = {record.group: record.reason for record in found.summary.not_replaced}
        assert skipped.keys() == {"low", "outer", *wide}
        assert "dot= replaces only dot_general" in skipped["low"]
        lines, _ = lines_of(found)
        assert sum("dot= not applied" in line for line in lines) == len(skipped)
        assert sum(line.startswith("  float32, dot= not applied, ") for line in lines) == len(wide)
    for options in ({}, {"accumulation_dtype": jnp.float32}, {"rules": jmp.Rule("head", "dot_general", "auto")}):
        assert jmp.explain(model, LOW, **options)(*args).summary.not_replaced == ()


def test_rows_of_floats():
    """The table lists what has to do with floats unless asked for all; the sequence holds all."""
    found = jmp.explain(lambda x, n: (jnp.exp(x), n + 1, x[n]), LOW)(X, jax.ShapeDtypeStruct((), jnp.int32))
    rows, everything = found.table().splitlines()[1:], found.table(all=True).splitlines()[1:]
    assert len(everything) == len(found) == len(list(found))
    floats = [any("float" in dtype for dtype in (*r.in_dtypes, *r.out_dtypes)) for r in found]
    assert len(rows) == sum(floats) < len(found)
    assert all(re.search(r"\bb?f\d+\b", row) for row in rows)
    assert [found[index] for index in range(len(found))] == [*found] == [*found[:]]
    assert found[:1].table(all=True).splitlines()[1].split() == everything[0].split()


def test_what_is_cut():
    """Of paths the left, whole folders of it; of scopes the outermost; of many dtypes all but one."""
    folders = [f"name_of_folder_{i}" for i in range(5)]
    namespace = {}
    source = "def forward(x, w):\n    return x @ w\ndef outer():\n    return lambda x, w: x @ w\n"
    exec(compile(source, "/" + "/".join([*folders, "model.py"]), "exec"), namespace)  # noqa: S102  a file elsewhere
    scopes = [f"a_long_name_of_a_scope_{i}" for i in range(5)]

    def model(x, *ws):
        with jax.named_scope("/".join(scopes)):
            x = namespace["forward"](x, ws[0])
        return jax.jit(sum)(ws), namespace["outer"]()(x, ws[1])

    found = jmp.explain(model, LOW)(X, *[SQUARE] * 40)
    page = str(found)
    products = [row for row in found.table().splitlines() if "dot_general" in row]
    assert products[0].split()[0] == f".../{scopes[-1]}"
    for row, place in zip(products, (r"2\S* \(forward\)", r"4\S* \(<lambda>\)"), strict=True):
        assert re.search(rf"  \.\.\./{folders[-1]}/model\.py:{place}  ", row)
    assert "f32 x40" in page
    assert max(map(len, page.splitlines())) < 300


def test_code_of_jax_has_the_line_of_the_call():
    """What JAX keeps traced does not know the user's line; the equation that calls it does."""
    jax.nn.relu(jnp.ones(3))  # so that it has been traced elsewhere
    found = jmp.explain(lambda x: jax.nn.relu(x) + jax.jit(jnp.exp)(x), LOW)(X)
    assert all("test_autocast_explain.py" in record.source for record in found)
    assert jmp.explain(jax.jit(jnp.exp), LOW)(X)[0].source == ""


class Normed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(K, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.norm(x)


@pytest.mark.parametrize("explain", [jmp.nnx.explain, jmp.explain])
def test_code_of_a_layer_of_nnx_has_the_line_of_the_call(explain):
    found = explain(lambda model, x: model(x), LOW)(Normed(), X)
    assert all(re.search(r"test_autocast_explain\.py:.*\(Normed\.__call__\)", record.source) for record in found)


# --- Records ---


def every_class(x, w):
    with jax.named_scope("here"):
        y = jax.nn.relu(x @ w)
    z = jnp.exp(y)
    lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ w), (0, x))
    return jnp.linalg.qr(z)[0], jnp.floor(y), lax.scan(lambda c, a: (c + (a @ w).sum(), None), 0.0, x)[0]


def test_records():
    """Equations in order, with scope, line, class, tag, dtypes and a reason; from shapes, nothing computed."""
    with compilations() as compiled:
        found = jmp.explain(every_class, LOW)(X, SQUARE)
    assert not compiled
    assert [record.primitive for record in found if record.primitive == "dot_general"] == ["dot_general"] * 3
    first = found[0]
    assert (first.scope, first.primitive, first.op_class, first.tag) == ("here", "dot_general", "allow", "HIGH")
    assert (first.in_dtypes, first.out_dtypes) == ((F32,) * 2, (F32,))
    assert first.reason == "linear algebra depends on it: as written"
    assert {record.op_class for record in found} == {"allow", "deny", "follow", "as_written", "nested"}
    assert [record for record in found if not (record.reason and record.tag)] == []
    names = [record.primitive for record in found]
    assert names.index("dot_general") < names.index("exp") < names.index("while") < names.index("scan")
    assert names.index("scan") < len(names) - 1 - names[::-1].index("dot_general")


@pytest.mark.parametrize("order", [lambda fun: fun, jax.grad])
def test_every_product_is_explained_once(order):
    """In loops, branches, calls and custom rules too: as many records of matmuls as the autocast program has."""

    @jax.custom_vjp
    def sine(x, w):
        return jnp.sin(x @ w)

    sine.defvjp(lambda x, w: (jnp.sin(x @ w), (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))

    def loss(x, w):
        x = jax.checkpoint(lambda x: jnp.tanh(times(2, x, w)))(x)
        return jnp.mean(jax.nn.softmax(sine(lax.cond(True, jnp.matmul, lambda x, w: x @ w.T, x, w), w)) ** 2)

    fun = order(loss)
    products = [record for record in jmp.explain(fun, LOW)(X, SQUARE) if record.primitive == "dot_general"]
    assert len(products) == len(jaxprs.contractions(jmp.autocast(fun, LOW), X, SQUARE))
    assert {record.in_dtypes for record in products} == {(BF16, BF16)}


def test_what_the_user_says():
    reasons = {
        "rule for scope 'here'": {"rules": jmp.Rule("here", precision="full")},
        "replaced by a function given in ops": {"ops": {"dot_general": my_product}},
    }
    for reason, options in reasons.items():
        assert jmp.explain(every_class, LOW, **options)(X, SQUARE)[0].reason == reason
    assert len(jmp.explain(lambda x: x, LOW)(X)) == 0
    assert str(jmp.explain(lambda x: x, LOW)(X)).startswith("Matmuls and convolutions: none")


# --- Flax ---


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(N, name="body")(x))
        x = nn.Dropout(0.5, deterministic=False)(nn.relu(x))
        return nn.Dense(K, name="head")(x)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.body, self.head = nnx.Linear(K, N, rngs=rngs), nnx.Linear(N, K, rngs=rngs)
        self.norm, self.dropout = nnx.BatchNorm(N, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.body(x)))))


#: Policy, settings, and the dtypes of the matmuls in body and head.
SAID = {
    "all": (LOW, {}, BF16, BF16),
    "full": ("full", {}, F32, F32),
    "head full": (jmp.PolicyMap({"head": "full"}, default=LOW), {}, BF16, F32),
    "body only": (jmp.PolicyMap({"body": "mixed_float16"}, default="full"), {}, "float16", F32),
    "two": (jmp.PolicyMap({"body": "mixed_float16", "head": LOW}, default="full"), {}, "float16", BF16),
    "a rule": (LOW, {"rules": jmp.Rule("body", precision="full")}, F32, BF16),
    "a rule in a map": (
        jmp.PolicyMap({"head": "full"}, default=LOW),
        {"rules": jmp.Rule("body", "dot_general", precision=jnp.float16)},
        "float16",
        F32,
    ),
    "sums": (jmp.PolicyMap({"head": "full"}, default=LOW), {"accumulation_dtype": jnp.float32}, BF16, F32),
}


def by_part(found):
    """Counts matmuls by the part of the model that they are in, and by the dtypes of their operands."""
    return collections.Counter((re.search("body|head", scope)[0], *sorted(dtypes)) for scope, dtypes in found)


def told(explanation):
    return by_part((record.scope, set(record.in_dtypes)) for record in explanation if record.flops)


@pytest.mark.parametrize("said", SAID)
def test_linen_explains_what_linen_runs(said):
    policy, options, body, head = SAID[said]
    model, x, rngs = Linen(), jnp.ones((M, K)), {"dropout": jax.random.key(1)}
    variables = model.init({"params": jax.random.key(0), **rngs}, x)
    apply = functools.partial(model.apply, rngs=rngs, mutable=["batch_stats"])
    explanation = jmp.linen.explain(apply, policy, **options)(variables, x)
    run = jmp.linen.autocast(apply, policy, **options)
    assert told(explanation) == {("body", body): 1, ("head", head): 1}
    assert [record.scope for record in explanation if record.flops] == ["Linen/body", "Linen/head"]
    assert told(explanation) == by_part(jaxprs.contractions(run, variables, x))


@pytest.mark.covering(1)
@pytest.mark.parametrize("order", ["forward", "gradient"])
@pytest.mark.parametrize("said", SAID)
def test_nnx_explains_what_nnx_runs(said, order):
    """And leaves running statistics and counts of random numbers alone."""
    policy, options, body, head = SAID[said]
    model, x = Net(nnx.Rngs(0)), jnp.ones((M, K))
    graphdef, state = nnx.split(model)
    before = jax.tree.map(jnp.copy, state)
    fun = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    fun = fun if order == "forward" else nnx.grad(fun)
    explanation = jmp.nnx.explain(fun, policy, **options)(model, x)
    assert_identical(nnx.state(model), before)
    run = lambda state, x: jax.tree.leaves(jmp.nnx.autocast(fun, policy, **options)(nnx.merge(graphdef, state), x))  # noqa: E731
    assert told(explanation) == by_part(jaxprs.contractions(run, state, x))
    assert told(explanation).keys() == {("body", body), ("head", head)}


def test_nnx_takes_what_autocast_takes():
    """Modules, bound methods, partial functions; shapes in place of arrays, in the model too."""
    model = Net(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    call = lambda model, x: model(x)  # noqa: E731
    calls = [
        lambda: jmp.nnx.explain(model, LOW)(X),
        lambda: jmp.nnx.explain(model.__call__, LOW)(X),
        lambda: jmp.nnx.explain(functools.partial(call, model), LOW)(x=X),
        lambda: jmp.nnx.explain(call, LOW)(abstract, X),
    ]
    assert {str(call().summary.matmuls) for call in calls} == {str(calls[0]().summary.matmuls)}
    assert calls[0]().summary.matmuls["low"] == (2, 1)
