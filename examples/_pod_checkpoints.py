"""What lets a job die: checkpoints of the whole state, and a last one when the hosts are about to be taken away."""

import json
from typing import Any, Self

import jax
from etils import epath  # Orbax brings it: a pathlib that also reads and writes gs://
from jax.experimental import multihost_utils

import jmp_lite as jmp


class ResumeError(Exception):
    """The checkpoints belong to another run."""


class Checkpoints:
    """``<folder>/<step>`` for some steps, and ``<folder>/run.json`` with what the runs must have in common.

    Without a folder nothing is saved and nothing restored. The position in the data is not stored: batches
    depend on the step alone.
    """

    def __init__(self, folder: str | None, every: int, settings: dict[str, Any]) -> None:
        self.every = every
        self._manager = None
        if folder is not None:
            _check_settings(folder, settings)
            self._manager = jmp.checkpoint.CheckpointManager(folder, policy=settings["policy"], max_to_keep=3)

    def restore(self, state: Any) -> tuple[int, Any]:
        """The last good checkpoint in the layout of ``state``, or step 0 and ``state`` itself."""
        if self._manager is None or self._manager.latest_step() is None:
            return 0, state
        return self._manager.restore(state)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is wanted after so many steps."""
        return self._manager is not None and step % self.every == 0

    def save(self, step: int, state: Any) -> None:
        """Starts to write a checkpoint and returns; the next one waits for it. Every host must call this."""
        if self._manager is not None:
            self._manager.save(step, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is being written."""
        if self._manager is not None:
            self._manager.close()


def _check_settings(folder: str, settings: dict[str, Any]) -> None:
    """Raises if the folder belongs to a run with other settings; process 0 writes them into a new one."""
    file = epath.Path(folder) / "run.json"
    if not file.exists():
        if jax.process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name("run.json.tmp")
            draft.write_text(json.dumps(settings))
            draft.replace(file)  # there whole or not at all, for hosts that look now
        return
    saved = json.loads(file.read_text())
    changed = [
        f"{name} was {saved.get(name)!r} and is now {now!r}" for name, now in settings.items() if saved.get(name) != now
    ]
    if changed:
        raise ResumeError(
            f"cannot resume {folder}: {', '.join(changed)}. Give the options of that run or another --checkpoint-dir."
        )


def preempted(step: int) -> bool:
    """Whether some host got SIGTERM, as before a preemption; True at the same step on every host.

    JAX catches the signal in processes that have joined a job. In one that is alone it ends the process as usual.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
