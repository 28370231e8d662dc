"""Parameters and optimizer state in few bytes, and pruning."""

from jmp_lite.optim._full_precision import from_full_precision as from_full_precision
from jmp_lite.optim._full_precision import full_precision_params as full_precision_params
from jmp_lite.optim._moments import Float as Float
from jmp_lite.optim._moments import Log as Log
from jmp_lite.optim._moments import Ratio as Ratio
from jmp_lite.optim._moments import SignedLog as SignedLog
from jmp_lite.optim._moments import StateFormat as StateFormat
from jmp_lite.optim._prune import PruneState as PruneState
from jmp_lite.optim._prune import prune as prune
from jmp_lite.optim._prune import sparsity as sparsity
from jmp_lite.optim._stored import StoredState as StoredState
from jmp_lite.optim._stored import master_weights as master_weights
from jmp_lite.optim._stored import saturated as saturated
from jmp_lite.optim._stored import stochastic_rounding as stochastic_rounding
from jmp_lite.optim._stored import stored as stored

__all__ = [
    "Float",
    "Log",
    "PruneState",
    "Ratio",
    "SignedLog",
    "StateFormat",
    "StoredState",
    "from_full_precision",
    "full_precision_params",
    "master_weights",
    "prune",
    "saturated",
    "sparsity",
    "stochastic_rounding",
    "stored",
]
