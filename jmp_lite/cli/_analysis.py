"""What an analysis says about a user's function: ``audit``, ``analyze``, ``estimate``."""

import json as json_module
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jmp_lite._policy import Policy, get_policy
from jmp_lite._tree import all_finite
from jmp_lite.cli._files import check_file, check_folder
from jmp_lite.cli._outcome import Outcome
from jmp_lite.cli._target import with_call

# Functions import what needs Optax: no other command does.


def audit(target: str, spec: str | None, *, json: str | None) -> Outcome:
    """Says what a program computes in which precision, and what is wrong with it; nothing is computed.

    Args:
        target: As for ``with_call``; its arguments may be ``jax.ShapeDtypeStruct``.
        spec: A policy string; ``None`` for the program as it is written.
        json: A file for everything that was found.

    Returns:
        Tables and findings; status 1 if one of them is an error or a warning.

    Raises:
        UnknownDtypeError: If there is no such policy.
        JmpLiteError: If there is no such function, anything goes wrong in it, or the file cannot be written.
    """
    from jmp_lite import analysis

    policy = None if spec is None else get_policy(spec)
    check_file(json)
    found = with_call("audit", target, lambda fun, *args: analysis.audit(fun, policy)(*args))
    if json is not None:
        Path(json).write_text(json_module.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Outcome(str(found), _status(found.findings))


def analyze(target: str, spec: str, *, html: str | None, json: str | None, png: str | None) -> Outcome:
    """Audits a function under a policy, runs it, counts its numbers, and compares them with those of float32.

    Args:
        target: As for ``with_call``; a loss is looked at with its gradient by its first argument.
        spec: A policy string.
        html: A file for a page of everything.
        json: A file for everything.
        png: A folder for pictures.

    Returns:
        Findings and tables; status 1 if one of the findings is an error or a warning.

    Raises:
        UnknownDtypeError: If there is no such policy.
        JmpLiteError: If there is no such function, anything goes wrong in it, or a file cannot be written.
        ModuleNotFoundError: If there is no matplotlib to draw with.
    """
    from jmp_lite import analysis
    from jmp_lite.cli._bench_plot import require_matplotlib

    policy = get_policy(spec)
    check_file(html)
    check_file(json)
    check_folder(png)
    if html or png:
        require_matplotlib()
    parts = with_call("analyze", target, lambda fun, *args: list(_parts(fun, args, policy, spec)))
    dtype = jnp.dtype(policy.compute_dtype)
    judged_by = dtype.name if dtype.itemsize == 2 else "float16"
    report = analysis.report(*parts, title=f"{target} under {spec}", format=judged_by)
    if html is not None:
        report.save_html(html)
    if json is not None:
        report.to_json(json)
    if png is not None:
        report.save_png(png)
    return Outcome(str(report), _status(report.findings))


def _parts(fun: Any, args: tuple[Any, ...], policy: Policy, spec: str) -> Iterator[Any]:
    """Yields what the analyses return."""
    from jmp_lite import analysis
    from jmp_lite.analysis._programs import with_gradient
    from jmp_lite.autocast import autocast

    audited = analysis.audit(fun, policy)(*args)
    yield audited
    low = autocast(fun, policy)
    runs = with_gradient(low) if audited.is_loss else low
    results, ranges = analysis.collect(runs)(*args)
    yield ranges
    if all_finite(results):
        yield analysis.compare(fun, {spec: policy})(*args)
    else:
        yield analysis.first_nonfinite(runs)(*args)


def estimate(target: str, *, device: str, compiled: bool) -> str:
    """Estimates what a training step of a loss costs on a device that need not be there.

    Args:
        target: As for ``with_call``; its arguments may be ``jax.ShapeDtypeStruct``.
        device: As for ``analysis.estimate``.
        compiled: Whether to compile for it.

    Raises:
        InvalidAnalysisError: If the device is not known, or nothing compiles for it.
        JmpLiteError: If there is no such function, or anything goes wrong in it.
    """
    from jmp_lite import analysis

    def estimated(fun: Any, *args: Any) -> str:
        return str(analysis.estimate(fun, device=device, compiled=compiled)(*args))

    return with_call("estimate", target, estimated)


def _status(findings: Iterable[Any]) -> int:
    return int(any(finding.severity in ("error", "warning") for finding in findings))
