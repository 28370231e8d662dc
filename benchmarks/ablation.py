"""What every rule of autocast is for: the figures without it. `python -m benchmarks.ablation [--quick]`.

Each row takes one rule away, and traces the gradients of the GPT and of the ResNet of `benchmarks.autocast` and the
probes below. A rule that changes no figure has no place in the library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jmp_lite as jmp
from benchmarks import _jaxprs, _models, _report
from jmp_lite.autocast import _api, _decide, _demand, _facts, _follow, _ops

POLICY = "mixed_bfloat16"
Change = Callable[[], contextlib.AbstractContextManager[Any]]


# --- Probes: functions whose relative error, or what they keep or move, is a figure ---


def _draw(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


X, W, EYE = _draw(0, 64, 32), _draw(1, 32, 32) * 32**-0.5, jnp.eye(32)


def _variance(w: jax.Array) -> jax.Array:
    h = X @ w + 30
    return lax.map(lambda row: jnp.mean((row - row.mean()) ** 2), h)


def _level(w: jax.Array) -> jax.Array:
    p = jnp.clip(jax.nn.sigmoid(X @ w + 4), 1e-6, 1 - 1e-6)
    return jnp.mean(jnp.tanh(p @ w)) + jnp.log(1 - p)


def _mask(w: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(jnp.arange(32) < 16, X @ w, -1e30))


def _newton(w: jax.Array) -> jax.Array:
    def test(carry: tuple[jax.Array, int]) -> jax.Array:
        return (jnp.abs(carry[0] @ carry[0].T - EYE).sum() > 1e-2) & (carry[1] < 30)

    def step(carry: tuple[jax.Array, int]) -> tuple[jax.Array, int]:
        c, steps = carry
        return 1.5 * c - 0.5 * c @ c.T @ c, steps + 1

    return lax.while_loop(test, step, (EYE + 0.02 * w, 0))[0]


def _normal(h: jax.Array) -> jax.Array:
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6)


def _norm(w: jax.Array) -> jax.Array:
    h = X @ w
    h = (h - h.mean(-1, keepdims=True)) * lax.rsqrt(h.var(-1, keepdims=True) + 1e-6)
    return jnp.tanh(h * w[0][None]) @ w


def _pooled(h: jax.Array) -> jax.Array:
    return lax.reduce_window(jnp.abs(h), 0.0, lax.add, (64, 1), (1, 1), "VALID")


@jax.jit
def _call(h: jax.Array, w: jax.Array) -> jax.Array:
    return h @ w


def _updated(w: jax.Array) -> jax.Array:
    return w - 1e-3 * jax.grad(lambda w: jnp.mean(jnp.tanh(X @ w)))(w)


PROBES: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "variance in map": _variance,
    "log beside matmul": _level,
    "mask of -1e30": _mask,
    "Newton": _newton,
    "norm": _norm,
    "cholesky": lambda w: jnp.linalg.cholesky(w @ w.T + 1e-2 * EYE),
    "inverse": lambda w: X @ jnp.linalg.inv(w @ w.T + 1e-2 * EYE),
    "expm": jax.scipy.linalg.expm,
    "covariance": lambda w: jnp.cov(w, rowvar=False),
    "scores": lambda w: jnp.exp(X @ w),
    "rotation": lambda w: jnp.sin(100 * X[:, :3] @ w[:3, :3]),
    "highest": lambda w: jnp.matmul(X, w, precision="highest"),
    "decay": lambda w: (1 - 1e-4 * jnp.tanh((X[:1] @ X[:1].T)[0, 0])) * w,
    "updated twice": lambda w: _updated(_updated(w)),
    "pooled": lambda w: _pooled(X @ w) @ w,
    "places": lambda w: jnp.arange(2048.0)[(jnp.arange(64.0) * 30 + (X @ w)[:, 0]).astype(jnp.int32)],
}


GRADIENTS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "rows": lambda w: jnp.tanh((X[:4] @ w)[jnp.arange(2048) // 512] @ w).mean(),
}
FLOAT16: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "times 1e-7": lambda w: jnp.log(jnp.abs(X @ w) * 1e-7 + 1e-6),
    "inner product": lambda w: (jnp.vdot(10 * (X @ w), 10 * (X @ w)) * 1e-6 * w) @ w,
    "mean of windows": lambda w: (_pooled(3e3 * (X @ w)) / 6.4e4) @ w,
    "shifted by 1e6": lambda w: (X @ w + jnp.full((64, 32), 1e6) - 1e6) @ w,
}
KEPT: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "softplus": lambda w: jnp.sum((jax.nn.softplus(X @ w) @ w) ** 2),
    "a gate": lambda w: jnp.sum(jnp.tanh((jax.nn.sigmoid(X @ w) * jnp.tanh(jnp.exp(X @ w))) @ w)),
}
MADE: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "a norm for two calls": lambda w: jnp.sum(jnp.tanh(_call(h := _normal(X @ w), w) + _call(h, w.T))),
}
MOVED: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "heads": lambda w: (X + 1).reshape(64, 4, 8).transpose(1, 2, 0) @ X
}


def _error(fun: Callable[[jax.Array], jax.Array], ours: Callable[[jax.Array], jax.Array]) -> str:
    options = {"xla_allow_excess_precision": False}
    found, exact = (np.asarray(jax.jit(f, compiler_options=options)(W), np.float64) for f in (ours, fun))
    return f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}"


def _probed() -> Iterator[tuple[str, str]]:
    for name, fun in PROBES.items():
        yield name, _error(fun, jmp.autocast(fun, POLICY))
    for name, fun in GRADIENTS.items():
        yield f"gradient of {name}", _error(jax.grad(fun), jax.grad(jmp.autocast(fun, POLICY)))
    for name, fun in FLOAT16.items():
        yield f"float16 {name}", _error(fun, jmp.autocast(fun, "mixed_float16"))
    for name, fun in KEPT.items():
        kept = jax.tree.leaves(jax.vjp(jmp.autocast(fun, POLICY), W)[1])
        yield f"{name}: kept kB", f"{sum(x.nbytes for x in kept) / 1e3:.1f}"
    for name, fun in MADE.items():
        gradient = jax.make_jaxpr(jax.grad(jmp.autocast(fun, POLICY)))(W).jaxpr
        results = [v.aval for eqn in _jaxprs.equations(gradient) for v in eqn.outvars]
        yield f"{name}: results kB", f"{sum(x.size * x.dtype.itemsize for x in results) / 1e3:.1f}"
    for name, fun in MOVED.items():
        moved = [r for r in jmp.explain(fun, POLICY)(W) if r.primitive in ("reshape", "transpose")]
        yield f"{name}: moved in", "/".join(sorted({dtype for r in moved for dtype in r.out_dtypes}))


# --- Rules that are taken away ---


@contextlib.contextmanager
def _without_row(index: int) -> Iterator[None]:
    rows = _follow.FOLLOWS[:index] + _follow.FOLLOWS[index + 1 :]
    with mock.patch.object(_decide, "FOLLOWS", rows):
        yield


def _patched(module: Any, name: str, value: Any) -> Change:
    return lambda: mock.patch.object(module, name, value)


@contextlib.contextmanager
def _without_search() -> Iterator[None]:
    with mock.patch.object(_demand.Demands, "_search", return_value={}):
        yield


CHANGES: Mapping[str, Change] = {
    "nothing": contextlib.nullcontext,
    **{f"row: {row.reason}": functools.partial(_without_row, index) for index, row in enumerate(_follow.FOLLOWS[:-1])},
    "the whole backward search": _without_search,
    "linear algebra wants what was written": _patched(_ops, "solves", lambda _: False),
    "matmuls of linear algebra's results": _patched(_facts.Facts, "takes_solution", False),
    "matmuls of a few terms": _patched(_ops, "HANDFUL", 0),
    "inner products": _patched(_ops, "is_inner", lambda _: False),
    "precision that is asked for": _patched(_ops, "asked_precision", lambda _: ""),
    "matmuls of libraries": _patched(_ops, "library_of", lambda _: None),
    "results in float32": _patched(_decide, "_is_free", lambda _: False),
    "known numbers": _patched(_facts.Facts, "number", None),
    "activations of bounded slope": _patched(_ops, "ACTIVATIONS", frozenset()),
}


def _figures(quick: bool) -> dict[str, str]:
    _api._interpreter.cache_clear()
    jax.clear_caches()
    found = {}
    for name, task in _models.TASKS.items():
        shapes = task.shapes()
        loss = jmp.autocast(task.loss(), POLICY)
        gradient = jax.make_jaxpr(jax.grad(loss, has_aux=True))(*shapes).jaxpr
        found[f"{name}: casts"] = str(_jaxprs.converts(gradient))
        found[f"{name}: kept MB"] = f"{_jaxprs.residual_bytes(loss, *shapes) / 1e6:.1f}"
    return found if quick else found | dict(_probed())


def main() -> None:
    """Measures every row and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="casts and bytes alone, nothing compiled or written")
    quick = parser.parse_args().quick
    rows, base = [], {}
    for name, change in CHANGES.items():
        with change():
            try:
                figures = _figures(quick)
            except Exception as error:  # noqa: BLE001  # what does not run without a rule needs it
                rows.append([name, f"does not run: {type(error).__name__}"])
                continue
        base = base or figures
        changed = [f"{key} {base[key]} -> {value}" for key, value in figures.items() if value != base[key]]
        rows.append([name, "; ".join(changed) or ("(all figures)" if name == "nothing" else "NO CHANGE")])
        print(f"{name}: {rows[-1][1]}", flush=True)
    if not quick:
        facts = {"command": _report.command("benchmarks.ablation"), "versions": _report.versions()}
        body = _report.table(["without", "figures that change"], rows)
        title = "Autocast without each of its rules"
        _report.write_section(_report.RESULTS, "ablation", title, facts, body)


if __name__ == "__main__":
    main()
