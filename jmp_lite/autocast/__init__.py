"""Any JAX function in mixed precision.

Read ``_interpreter`` first, a loop with one decision per equation; then ``_decide``, which makes that decision from
``_ops``, the classes of primitives, and ``_follow``, the table for FOLLOW. ``_demand`` looks ahead for what consumers
want, ``_rules`` and ``_regions`` let the user steer, and ``_control_flow`` and ``_custom_rules`` handle programs inside
the program, which ``_programs`` lists.
"""

from jmp_lite.autocast._api import autocast as autocast
from jmp_lite.autocast._explain import Explanation as Explanation
from jmp_lite.autocast._explain import explain as explain
from jmp_lite.autocast._ops import OpClass as OpClass
from jmp_lite.autocast._ops import register_op as register_op
from jmp_lite.autocast._regions import full_precision as full_precision
from jmp_lite.autocast._regions import low_precision as low_precision
from jmp_lite.autocast._regions import no_autocast as no_autocast
from jmp_lite.autocast._rules import Rule as Rule

__all__ = [
    "Explanation",
    "OpClass",
    "Rule",
    "autocast",
    "explain",
    "full_precision",
    "low_precision",
    "no_autocast",
    "register_op",
]
