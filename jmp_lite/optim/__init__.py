"""What goes into an Optax chain besides loss scaling: pruning."""

from jmp_lite.optim._prune import PruneState as PruneState
from jmp_lite.optim._prune import prune as prune
from jmp_lite.optim._prune import sparsity as sparsity

__all__ = ["PruneState", "prune", "sparsity"]
