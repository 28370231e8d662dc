"""Checkpoints of a running job, written with Orbax while it trains."""

import operator
import re
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import orbax.checkpoint as ocp

from jmp_lite._messages import warn
from jmp_lite._policy import PolicyLike, get_policy
from jmp_lite.checkpoint._directory import absolute, items, restore
from jmp_lite.checkpoint._lock import WriterLock
from jmp_lite.checkpoint._processes import in_first_process, of_first_process
from jmp_lite.errors import (
    CheckpointLockedError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    CorruptCheckpointWarning,
    InvalidCheckpointError,
)

T = TypeVar("T")

#: No step is as large: ``of_first_process`` sends them as 64 bits.
_END = 2**63
_UNFINISHED = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")


class CheckpointManager:
    """Saves train states while training continues, keeps the newest few, and restores the last good one.

    A thin layer over ``orbax.checkpoint.CheckpointManager``: the checkpoint of step 100 is the directory ``100``,
    written under a temporary name and renamed when it is complete. In addition, every array is stored with a digest and
    verified on restore, because Orbax does not detect corrupted array values.

    All processes of a job use it together: they make the same calls in the same order, on a shared directory, and
    restore the same step. One job writes to a directory at a time: the first ``save`` takes a lock and holds it until
    ``close`` or until the process ends, however it ends. Other jobs may restore meanwhile.

    Args:
        directory: Directory of the checkpoints; created if needed.
        policy: The policy of the run. It is saved, and checked on restore.
        max_to_keep: How many of the newest checkpoints to keep, or ``None`` for all. Keep two or more, so that one is
            left if one is damaged.
        save_interval_steps: ``save`` saves multiples of this, and any step at which ``jax.distributed`` reports a
            coming preemption.

    Raises:
        InvalidCheckpointError: If ``max_to_keep`` or ``save_interval_steps`` is not an int >= 1, or ``directory`` is
            not a directory.
        UnknownDtypeError: If the policy string cannot be parsed.

    Example:
        >>> import tempfile
        >>> directory = tempfile.mkdtemp()
        >>> with jmp.checkpoint.CheckpointManager(directory, policy="mixed_float16", save_interval_steps=10) as manager:
        ...     for step in range(1, 31):
        ...         saved = manager.save(step, {"w": jnp.full(2, float(step)), "step": step})
        >>> with jmp.checkpoint.CheckpointManager(directory, policy="mixed_float16") as manager:
        ...     manager.restore({"w": jnp.zeros(2), "step": 0})
        (30, {'step': 30, 'w': Array([30., 30.], dtype=float32)})

    References:
        Orbax, https://orbax.readthedocs.io; Mohan et al., CheckFreq, FAST 2021.
    """

    def __init__(
        self, directory: str | Path, *, policy: PolicyLike, max_to_keep: int | None = 3, save_interval_steps: int = 1
    ) -> None:
        self._policy = get_policy(policy)
        self._interval = _checked("save_interval_steps", save_interval_steps, at_least=1)
        kept = (
            None if max_to_keep is None else _checked("max_to_keep", max_to_keep, ", or None to keep all", at_least=1)
        )
        when = ocp.checkpoint_managers.AnySavePolicy(
            [
                ocp.checkpoint_managers.FixedIntervalPolicy(self._interval),
                ocp.checkpoint_managers.PreemptionCheckpointingPolicy(),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=when,
            preservation_policy=ocp.checkpoint_managers.LatestN(kept),
            lightweight_initialize=True,  # to list checkpoints, it need not open them
        )
        place = absolute(directory)
        if place.is_file():
            raise InvalidCheckpointError(f"{place} is a file, and checkpoints go to a directory. Give another path.")
        self._manager = ocp.CheckpointManager(place, options=options)
        self._damaged: set[int] = set()
        self._tidy = False
        self._writes = False
        self._is_closed = False
        self._lock: WriterLock | None = None

    def save(self, step: int, state: Any) -> bool:
        """Starts saving a state, and returns when you may donate, change or delete its arrays.

        The rest happens in the background: copying to disk, renaming the finished directory, deleting the oldest. The
        next ``save``, ``restore``, ``wait`` or ``close`` raises any error there.

        Args:
            step: Number of the step, an int >= 0. It also names the checkpoint.
            state: Any pytree of arrays, sharded or not, typed PRNG keys, and Python numbers such as the position in the
                data. Leaves that are not sharded over all processes must be equal in all of them.

        Returns:
            Whether it is saved: False between multiples of ``save_interval_steps``, and for the step saved last.

        Raises:
            CheckpointMismatchError: If the directory has a later step, which this run did not start from, or if copies
                of a leaf on several devices or processes differ.
            CheckpointLockedError: If another job writes to the directory.
            InvalidCheckpointError: If the step is not an int >= 0, a leaf is not an array, key or number, or the
                manager is closed.

        Example:
            >>> import tempfile
            >>> with jmp.checkpoint.CheckpointManager(
            ...     tempfile.mkdtemp(), policy="full", save_interval_steps=2
            ... ) as manager:
            ...     [manager.save(step, {"w": jnp.ones(2)}) for step in (1, 2, 3, 4)]
            [False, True, False, True]
        """
        step = _checked("step", step, at_least=0)
        self._check_open()
        self._manager.check_for_errors()
        self._take_lock()
        self._make_room()
        last = self._manager.latest_step()
        if not self._manager.should_save(step):
            if last is not None and step < last and step % self._interval == 0:
                raise CheckpointMismatchError(
                    f"Step {step} is to be saved, but {self._manager.directory} has step {last} already. Restore from "
                    "there first, or start the new run in its own directory."
                )
            return False
        return bool(self._manager.save(step, args=items(state, self._policy), force=True))

    def restore(self, template: T, *, step: int | None = None, migrate: bool = False) -> tuple[int, T]:
        """Restores the last good checkpoint.

        Skips incomplete and damaged checkpoints, even if only one process cannot read one, with a
        ``CorruptCheckpointWarning``. The next ``save`` renames them to ``<step>.corrupt``.

        Args:
            template: A state of the same structure, shapes and dtypes, of arrays or ``jax.ShapeDtypeStruct``; restored
                arrays get its shardings, on any devices and processes.
            step: Restores only this step.
            migrate: Lets the policy change. Arrays are cast to the template's floating dtypes; a loss scale of another
                class or with other fields comes from the template; a float32 run can continue in a template with the
                state of ``optim.stored``, and such a state in one with other formats of moments. Everything else must
                match.

        Returns:
            The step, and its state.

        Raises:
            PolicyMismatchError: If it was saved under another policy.
            InvalidLossScaleError: If a loss scale in the template is of another class than the one saved.
            CheckpointMismatchError: If structures, shapes, dtypes or formats of moments differ.
            CheckpointNotFoundError: If no checkpoint exists, or none for this step.
            CorruptCheckpointError: If all are damaged; the message lists the ones it tried.
            ForeignCheckpointError: If it was not written by jmp_lite.
            InvalidCheckpointError: If the step is not an int >= 0, or the manager is closed.

        Example:
            >>> import tempfile
            >>> manager = jmp.checkpoint.CheckpointManager(tempfile.mkdtemp(), policy="full")
            >>> manager.restore({"w": jnp.zeros(2)})
            Traceback (most recent call last):
            jmp_lite.errors.CheckpointNotFoundError: There is no checkpoint in ...
            >>> _ = [manager.save(step, {"w": jnp.full(2, step * 0.5)}) for step in (1, 2)]
            >>> manager.restore({"w": jnp.zeros(2)}, step=1)
            (1, {'w': Array([0.5, 0.5], dtype=float32)})
            >>> manager.close()
        """
        step = None if step is None else _checked("step", step, at_least=0)
        self._check_open()
        self.wait()
        if step is not None:
            path = self._manager.directory / str(step)
            return step, restore(path, template, policy=self._policy, migrate=migrate)
        steps, tried = self._steps(), dict[int, str]()
        unfinished = self._unfinished(steps)
        while (candidate := of_first_process(max(steps, default=-1))) >= 0:
            path = self._manager.directory / str(candidate)
            try:
                state = restore(path, template, policy=self._policy, migrate=migrate)
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                tried[candidate] = str(error)
                steps = {earlier for earlier in steps if earlier < candidate}
            else:
                self._damaged = set(tried)
                _warn({**unfinished, **tried}, after=candidate)
                return candidate, state
        if tried:
            reasons = "".join(f"\n  step {number}: {reason}" for number, reason in {**unfinished, **tried}.items())
            raise CorruptCheckpointError(
                f"No checkpoint in {self._manager.directory} can be restored:{reasons}\nRepair one of them or bring "
                "one back from elsewhere; to start from the beginning, use an empty directory."
            )
        _warn(unfinished)
        raise CheckpointNotFoundError(
            f"There is no checkpoint in {self._manager.directory}. Check the path, or start from the beginning."
        )

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that is complete or being written; None without checkpoints.

        Only a restore verifies its contents; steps that turned out damaged do not count.

        Example:
            >>> import tempfile
            >>> with jmp.checkpoint.CheckpointManager(tempfile.mkdtemp(), policy="full") as manager:
            ...     print(manager.latest_step(), manager.save(7, {"w": jnp.ones(2)}), manager.latest_step())
            None True 7
        """
        return max(set(self._manager.all_steps()) - self._damaged, default=None)

    def wait(self) -> None:
        """Waits until the checkpoint being written is complete.

        Example:
            >>> import pathlib, tempfile
            >>> directory = tempfile.mkdtemp()
            >>> with jmp.checkpoint.CheckpointManager(directory, policy="full") as manager:
            ...     started = manager.save(7, {"w": jnp.ones(2)})
            ...     manager.wait()
            ...     pathlib.Path(directory, "7").exists()
            True
        """
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, stops the writer threads, and lets other jobs write. Leaving the ``with`` block does the same.

        Example:
            >>> import tempfile
            >>> jmp.checkpoint.CheckpointManager(tempfile.mkdtemp(), policy="full").close()
        """
        try:
            self._manager.close()
        finally:
            if self._lock is not None:
                self._lock.release()
            self._writes, self._lock, self._is_closed = False, None, True

    def _check_open(self) -> None:
        if self._is_closed:
            raise InvalidCheckpointError(
                f"This manager of {self._manager.directory} is closed. Make a new one, or close it later."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _steps(self) -> set[int]:
        """Steps that have a directory now; Orbax caches the list from its construction."""
        return {int(path.name) for path in self._manager.directory.iterdir() if path.name.isdecimal()}

    def _unfinished(self, steps: Iterable[int]) -> dict[int, str]:
        """Steps whose writing began but did not end, with the reason to skip them."""
        found = {}
        for path in self._manager.directory.iterdir():
            if (match := _UNFINISHED.fullmatch(path.name)) and int(match[1]) not in set(steps):
                reason = "The job stopped while writing it, or another job is writing it now."
                found[int(match[1])] = f"The checkpoint in {path} is incomplete. {reason}"
        return found

    def _take_lock(self) -> None:
        """Takes the lock of the directory for the job, in process 0, unless it has it; all processes agree."""
        if self._writes:
            return

        def lock() -> None:
            self._lock = WriterLock(str(self._manager.directory))

        in_first_process(lock, otherwise=CheckpointLockedError)
        self._writes = True

    def _make_room(self) -> None:
        """Renames damaged checkpoints before the first save, so they do not count among those to keep.

        Removes unfinished ones.
        """
        if self._tidy and not self._damaged:
            return
        self._manager.wait_until_finished()

        def tidy() -> None:
            directory = self._manager.directory
            for step in self._damaged:
                if (directory / str(step)).exists():
                    (directory / str(step)).rename(_free(directory, f"{step}.corrupt"))
            for path in list(directory.iterdir()):
                if _UNFINISHED.fullmatch(path.name):
                    path.rmtree()

        in_first_process(tidy, otherwise=OSError)
        if self._damaged:
            self._manager.reload()
        self._damaged, self._tidy = set(), True


def _checked(name: str, value: Any, otherwise: str = "", *, at_least: int) -> int:
    """The value as an int."""
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not at_least <= number < _END:
        hint = " Give the number of steps taken so far." if name == "step" else ""
        raise InvalidCheckpointError(f"{name} must be an int >= {at_least}{otherwise}; got {value!r}.{hint}")
    return number


def _free(directory: Any, name: str) -> Any:
    """The first of ``name``, ``name.1``, ``name.2`` that does not exist."""
    number, path = 0, directory / name
    while path.exists():
        number += 1
        path = directory / f"{name}.{number}"
    return path


def _warn(tried: dict[int, str], *, after: int | None = None) -> None:
    """Names every skipped step, the newest first."""
    back = "to the beginning" if after is None else f"to step {after}"
    for step in sorted((step for step in tried if after is None or step > after), reverse=True):
        message = f"Step {step} cannot be restored, going back {back}. {tried[step]}"
        warn(message, CorruptCheckpointWarning)
