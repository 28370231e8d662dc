"""What runs in which precision, where it breaks, what it costs, and the policy that fixes it.

Read ``_sites`` first, a program as a tree of equations; then ``_evaluate``, which runs one with something beside each
value, and ``_finding``, what an analysis has to say. Each analysis is a file of its own.
"""

from jmp_lite.analysis._assert_dtype import assert_compute_dtype as assert_compute_dtype
from jmp_lite.analysis._audit import Audit as Audit
from jmp_lite.analysis._audit import audit as audit
from jmp_lite.analysis._bundle import Replayed as Replayed
from jmp_lite.analysis._bundle import replay as replay
from jmp_lite.analysis._check_ranges import diagnose as diagnose
from jmp_lite.analysis._collect import collect as collect
from jmp_lite.analysis._finding import Finding as Finding
from jmp_lite.analysis._nonfinite import NonFinite as NonFinite
from jmp_lite.analysis._nonfinite import first_nonfinite as first_nonfinite
from jmp_lite.analysis._range import Fate as Fate
from jmp_lite.analysis._range import Range as Range
from jmp_lite.analysis._ranges import Ranges as Ranges
from jmp_lite.analysis._ranges import Row as Row
from jmp_lite.analysis._ranges import ranges as ranges
from jmp_lite.analysis._report import Report as Report
from jmp_lite.analysis._report import report as report
from jmp_lite.analysis._sites import Site as Site

__all__ = [
    "Audit",
    "Fate",
    "Finding",
    "NonFinite",
    "Range",
    "Ranges",
    "Replayed",
    "Report",
    "Row",
    "Site",
    "assert_compute_dtype",
    "audit",
    "collect",
    "diagnose",
    "first_nonfinite",
    "ranges",
    "replay",
    "report",
]
