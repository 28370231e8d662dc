"""Mixed precision for JAX as pure functions: policies, loss scaling inside Optax, exact skips.

A drop-in for jmp: ``import jmp_lite as jmp``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jmp_lite import errors as errors

# Policies: which dtype parameters, computation and outputs have.
from jmp_lite._dtypes import dtype_to_names as dtype_to_names
from jmp_lite._dtypes import half_dtype as half_dtype
from jmp_lite._dtypes import name_to_dtype as name_to_dtype
from jmp_lite._dtypes import parse_dtype as parse_dtype
from jmp_lite._policy import Policy as Policy
from jmp_lite._policy import PolicyMap as PolicyMap
from jmp_lite._policy import get_policy as get_policy
from jmp_lite._tree import all_finite as all_finite
from jmp_lite._tree import cast_to_full as cast_to_full
from jmp_lite._tree import cast_to_half as cast_to_half
from jmp_lite._tree import select_tree as select_tree
from jmp_lite._with_policy import with_policy as with_policy

# Autocast: any function in mixed precision, and how to steer it.
from jmp_lite.autocast import Explanation as Explanation
from jmp_lite.autocast import OpClass as OpClass
from jmp_lite.autocast import Rule as Rule
from jmp_lite.autocast import autocast as autocast
from jmp_lite.autocast import explain as explain
from jmp_lite.autocast import full_precision as full_precision
from jmp_lite.autocast import low_precision as low_precision
from jmp_lite.autocast import no_autocast as no_autocast
from jmp_lite.autocast import register_op as register_op

# Loss scaling: the automata, and gradients of a scaled loss.
from jmp_lite.scaling._accumulate import accumulate_gradients as accumulate_gradients
from jmp_lite.scaling._grad import scaled_value_and_grad as scaled_value_and_grad
from jmp_lite.scaling._loss_scale import DynamicLossScale as DynamicLossScale
from jmp_lite.scaling._loss_scale import LossScale as LossScale
from jmp_lite.scaling._loss_scale import NoOpLossScale as NoOpLossScale
from jmp_lite.scaling._loss_scale import StaticLossScale as StaticLossScale

if TYPE_CHECKING:
    from jmp_lite import analysis as analysis
    from jmp_lite import checkpoint as checkpoint
    from jmp_lite import distributed as distributed
    from jmp_lite import export as export
    from jmp_lite import linen as linen
    from jmp_lite import nnx as nnx
    from jmp_lite import optim as optim
    from jmp_lite import quant as quant
    from jmp_lite.scaling._apply import apply_gradients as apply_gradients
    from jmp_lite.scaling._loss_scaled import LossScaledState as LossScaledState
    from jmp_lite.scaling._loss_scaled import loss_scaled as loss_scaled
    from jmp_lite.scaling._monitor import check_loss_scale as check_loss_scale
    from jmp_lite.scaling._monitor import metrics as metrics

__version__ = "0.1.0"

# Loaded on first use (PEP 562), so that ``import jmp_lite`` needs neither Optax nor Flax nor Orbax.
_CHAPTERS = frozenset({"analysis", "checkpoint", "distributed", "export", "linen", "nnx", "optim", "quant"})
_HOMES = {
    "LossScaledState": "jmp_lite.scaling._loss_scaled",
    "apply_gradients": "jmp_lite.scaling._apply",
    "check_loss_scale": "jmp_lite.scaling._monitor",
    "loss_scaled": "jmp_lite.scaling._loss_scaled",
    "metrics": "jmp_lite.scaling._monitor",
}

__all__ = [
    "DynamicLossScale",
    "Explanation",
    "LossScale",
    "LossScaledState",
    "NoOpLossScale",
    "OpClass",
    "Policy",
    "PolicyMap",
    "Rule",
    "StaticLossScale",
    "accumulate_gradients",
    "all_finite",
    "analysis",
    "apply_gradients",
    "autocast",
    "cast_to_full",
    "cast_to_half",
    "check_loss_scale",
    "checkpoint",
    "distributed",
    "dtype_to_names",
    "errors",
    "explain",
    "export",
    "full_precision",
    "get_policy",
    "half_dtype",
    "linen",
    "loss_scaled",
    "low_precision",
    "metrics",
    "name_to_dtype",
    "nnx",
    "no_autocast",
    "optim",
    "parse_dtype",
    "quant",
    "register_op",
    "scaled_value_and_grad",
    "select_tree",
    "with_policy",
]


def __getattr__(name: str) -> Any:
    if name in _CHAPTERS:
        return importlib.import_module(f"jmp_lite.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'jmp_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
