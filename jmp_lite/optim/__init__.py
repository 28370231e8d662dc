"""The Optax face: loss scaling and pruning as gradient transformations."""

from jmp_lite.optim._apply import apply_gradients as apply_gradients
from jmp_lite.optim._loss_scaled import LossScaledState as LossScaledState
from jmp_lite.optim._loss_scaled import loss_scaled as loss_scaled
from jmp_lite.optim._monitor import check_loss_scale as check_loss_scale
from jmp_lite.optim._monitor import metrics as metrics
from jmp_lite.optim._prune import PruneState as PruneState
from jmp_lite.optim._prune import prune as prune

__all__ = ["LossScaledState", "PruneState", "apply_gradients", "check_loss_scale", "loss_scaled", "metrics", "prune"]
