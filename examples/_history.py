"""What a run leaves behind: its curves as JSON and its train state as a checkpoint."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

import jmp_lite as jmp


@dataclasses.dataclass
class History:
    """The metrics of every step, and the test accuracy after each epoch.

    ``settings`` are the options that decide what a run computes; ``accuracy`` maps the number of steps taken to a
    fraction.
    """

    policy: str
    settings: dict[str, Any]
    steps: list[dict[str, float]] = dataclasses.field(default_factory=list)
    accuracy: dict[int, float] = dataclasses.field(default_factory=dict)

    def extend(self, metrics: list[dict[str, Any]], accuracy: float) -> None:
        """Appends the metrics of some steps, and the test accuracy after the last of them."""
        self.steps += [{name: float(value) for name, value in step.items()} for step in metrics]
        self.accuracy[len(self.steps)] = accuracy

    def curve(self, metric: str) -> np.ndarray:
        """One metric over the steps, float64[steps]."""
        return np.array([step[metric] for step in self.steps])

    def until(self, step: int) -> "History":
        """The history of the first steps."""
        accuracy = {at: value for at, value in self.accuracy.items() if at <= step}
        return dataclasses.replace(self, steps=self.steps[:step], accuracy=accuracy)


class ResumeError(Exception):
    """A checkpoint that does not belong to the run that would resume from it."""


class Checkpoint:
    """The files ``<folder>/<policy>/state.msgpack`` and ``history.json``."""

    def __init__(self, folder: Path, policy: str) -> None:
        self.policy = policy
        self.folder = folder / re.sub(r"\W+", "_", policy)
        self._state, self._history = self.folder / "state.msgpack", self.folder / "history.json"

    def remove(self) -> None:
        """Forgets an earlier run."""
        for file in (self._state, self._history):
            file.unlink(missing_ok=True)

    def save(self, state: Any, history: History) -> None:
        """Writes both files; a run killed in the middle finds the ones before it intact."""
        self.folder.mkdir(parents=True, exist_ok=True)
        counted = {"state": state, "step": np.int64(len(history.steps))}
        # The state last: a history longer than the state is cut on loading.
        _replace(self._history, json.dumps(dataclasses.asdict(history)).encode())
        _replace(self._state, jmp.checkpoint.to_bytes(counted, policy=self.policy))

    def load(self, state: Any, history: History) -> tuple[Any, History]:
        """The saved state and history, or the given, initial ones if nothing has been saved.

        Raises:
            ResumeError: If the saved run had other settings.
        """
        if not self._state.exists():
            return state, history
        fields = json.loads(self._history.read_text())
        fields["accuracy"] = {int(step): value for step, value in fields["accuracy"].items()}
        saved = History(**fields)
        changed = [
            f"{name} was {saved.settings.get(name)!r} and is now {value!r}"
            for name, value in history.settings.items()
            if saved.settings.get(name) != value
        ]
        if changed:
            raise ResumeError(
                f"cannot resume {self.folder}: {', '.join(changed)}. "
                "Give the options of that run, choose another --output, or leave out --resume."
            )
        template = {"state": state, "step": np.int64(0)}
        restored = jmp.checkpoint.from_bytes(template, self._state.read_bytes(), policy=self.policy)
        return restored["state"], saved.until(int(restored["step"]))


def _replace(file: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all."""
    draft = file.with_suffix(".tmp")
    draft.write_bytes(data)
    draft.replace(file)
