"""What a job of several hosts tells: lines and TensorBoard events from process 0, and whether all copies are equal."""

import zlib
from pathlib import Path
from typing import Any, Self

import _pod_modes
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


class Log:
    """What process 0 prints, and what it writes for TensorBoard."""

    def __init__(self, logdir: Path | None, start: int) -> None:
        self.first = jax.process_index() == 0
        self._writer = None
        if logdir is not None and self.first:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(logdir), purge_step=start)

    def print(self, text: str) -> None:
        """Prints once, however many processes there are."""
        if self.first:
            print(text, flush=True)

    def steps(self, metrics: dict[int, dict[str, Any]], accuracy: float) -> None:
        """Prints the last of some steps, and writes all of them for TensorBoard."""
        last = max(metrics)
        values = metrics[last]
        self.print(
            f"step {last:4d}  loss {values['loss']:.4f}  test accuracy {accuracy:.2%}  "
            f"loss scale {values['loss_scale']:g}  skipped {values['total_notfinite']}"
        )
        if self._writer is not None:
            for step, values in metrics.items():
                for name, value in values.items():
                    self._writer.add_scalar(f"train/{name}", float(value), step)
            self._writer.add_scalar("test/accuracy", accuracy, last)
            self._writer.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def fingerprint(whole: Any, mesh: jax.sharding.Mesh) -> tuple[int, bool]:
    """A checksum of global arrays, gathered from their shards, and whether every host comes to the same one."""
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))(whole)
    checksum = 0
    for leaf in jax.tree.leaves(_pod_modes.on_host(gathered)):
        checksum = zlib.crc32(leaf.tobytes(), checksum)
    everywhere = multihost_utils.process_allgather(np.uint32(checksum))
    return checksum, bool((everywhere == checksum).all())
