"""``audit``: finds planted mistakes on their lines, and none in clean models; computes nothing."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
from jmp_lite.analysis._finding import KINDS
from support.audit_faults import BF16, F32, FAULTS, array

from jmp_lite import analysis


def lines_of(findings, kind):
    return {int(re.search(r":(\d+)", finding.source)[1]) for finding in findings if finding.kind == kind}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault_is_found_on_its_line(fault):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        found = analysis.audit(fault.fun, **fault.kwargs)(*fault.args)
    assert lines_of(found.findings, fault.kind) == {fault.line}, found
    rank = ["error", "warning", "note"].index
    others = [f for f in found.findings if f.kind != fault.kind and f.severity != "note"]
    assert [f for f in others if rank(f.severity) < rank(KINDS[fault.kind].severity)] == [], found
