"""What runs in which precision, where it breaks, what it costs, and the policy that fixes it.

Read ``_sites`` first, a program as a tree of equations; then ``_evaluate``, which runs a program and keeps extra data
with each value, and ``_finding``, the findings of an analysis. Each analysis has a folder.
"""

from jmp_lite.analysis._audit._assert_dtype import assert_compute_dtype as assert_compute_dtype
from jmp_lite.analysis._audit._audit import Audit as Audit
from jmp_lite.analysis._audit._audit import audit as audit
from jmp_lite.analysis._comparison._compare import Comparison as Comparison
from jmp_lite.analysis._comparison._compare import EquationError as EquationError
from jmp_lite.analysis._comparison._compare import PolicyErrors as PolicyErrors
from jmp_lite.analysis._comparison._compare import ResultError as ResultError
from jmp_lite.analysis._comparison._compare import compare as compare
from jmp_lite.analysis._comparison._diff import Difference as Difference
from jmp_lite.analysis._comparison._diff import diff as diff
from jmp_lite.analysis._comparison._perturb import Sensitivities as Sensitivities
from jmp_lite.analysis._comparison._perturb import Sensitivity as Sensitivity
from jmp_lite.analysis._comparison._perturb import perturb as perturb
from jmp_lite.analysis._estimation._estimate import estimate as estimate
from jmp_lite.analysis._estimation._estimated import Configuration as Configuration
from jmp_lite.analysis._estimation._estimated import Estimate as Estimate
from jmp_lite.analysis._estimation._storage import StorageEstimate as StorageEstimate
from jmp_lite.analysis._estimation._storage import estimate_storage as estimate_storage
from jmp_lite.analysis._finding import Finding as Finding
from jmp_lite.analysis._nonfinite._bundle import Replayed as Replayed
from jmp_lite.analysis._nonfinite._bundle import replay as replay
from jmp_lite.analysis._nonfinite._nonfinite import NonFinite as NonFinite
from jmp_lite.analysis._nonfinite._nonfinite import first_nonfinite as first_nonfinite
from jmp_lite.analysis._ranges._check_ranges import diagnose as diagnose
from jmp_lite.analysis._ranges._collect import collect as collect
from jmp_lite.analysis._ranges._range import Fate as Fate
from jmp_lite.analysis._ranges._range import Range as Range
from jmp_lite.analysis._ranges._ranges import Ranges as Ranges
from jmp_lite.analysis._ranges._ranges import Row as Row
from jmp_lite.analysis._ranges._ranges import ranges as ranges
from jmp_lite.analysis._ranges._updates import LostUpdates as LostUpdates
from jmp_lite.analysis._ranges._updates import lost_updates as lost_updates
from jmp_lite.analysis._recommendation._recommend import Line as Line
from jmp_lite.analysis._recommendation._recommend import Recommendation as Recommendation
from jmp_lite.analysis._recommendation._recommend import recommend as recommend
from jmp_lite.analysis._reports._report import Report as Report
from jmp_lite.analysis._reports._report import report as report
from jmp_lite.analysis._sites import Site as Site

__all__ = [
    "Audit",
    "Comparison",
    "Configuration",
    "Difference",
    "EquationError",
    "Estimate",
    "Fate",
    "Finding",
    "Line",
    "LostUpdates",
    "NonFinite",
    "PolicyErrors",
    "Range",
    "Ranges",
    "Recommendation",
    "Replayed",
    "Report",
    "ResultError",
    "Row",
    "Sensitivities",
    "Sensitivity",
    "Site",
    "StorageEstimate",
    "assert_compute_dtype",
    "audit",
    "collect",
    "compare",
    "diagnose",
    "diff",
    "estimate",
    "estimate_storage",
    "first_nonfinite",
    "lost_updates",
    "perturb",
    "ranges",
    "recommend",
    "replay",
    "report",
]
