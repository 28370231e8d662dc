"""What runs in which precision, where it breaks, what it costs, and the policy that fixes it.

Read ``_sites`` first, a program as a tree of equations; then ``_finding``, what an analysis has to say.
"""

from jmp_lite.analysis._assert_dtype import assert_compute_dtype as assert_compute_dtype
from jmp_lite.analysis._audit import Audit as Audit
from jmp_lite.analysis._audit import audit as audit
