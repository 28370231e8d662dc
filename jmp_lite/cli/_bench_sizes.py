"""How large the models are, by the device."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jmp_lite.cli._bench_models import Model, gpt, resnet


class Size(NamedTuple):
    """A size of the benchmark.

    Attributes:
        name: How reports call it.
        models: Makes the models.
        steps: In a turn of a variant; the first is not timed.
        rounds: Turns of each variant.
    """

    name: str
    models: Callable[[], tuple[Model, ...]]
    steps: int
    rounds: int


_RESNET18 = ((64, 2), (128, 2), (256, 2), (512, 2))


def _gpt2(time: int, batch: int) -> Model:
    return gpt(depth=12, width=768, heads=12, vocabulary=50304, time=time, batch=batch)


def _resnet18(batch: int) -> Model:
    return resnet(stages=_RESNET18, stem=2, classes=1000, pixels=224, batch=batch)


TINY = Size(
    "tiny",
    lambda: (
        gpt(depth=2, width=64, heads=2, vocabulary=256, time=32, batch=4),
        resnet(stages=((8, 0), (16, 1)), stem=1, classes=10, pixels=16, batch=8),
    ),
    steps=6,
    rounds=3,
)
CPU = Size(
    "cpu",
    lambda: (
        gpt(depth=4, width=256, heads=4, vocabulary=2048, time=128, batch=8),
        resnet(stages=((32, 1), (64, 1), (128, 1)), stem=1, classes=10, pixels=32, batch=32),
    ),
    steps=6,
    rounds=3,
)
#: For accelerators of less than ``_LARGE`` bytes, and for the others.
SMALL = Size("small accelerator", lambda: (_gpt2(512, 4), _resnet18(32)), steps=20, rounds=5)
LARGE = Size("accelerator", lambda: (_gpt2(1024, 8), _resnet18(128)), steps=20, rounds=5)
_LARGE = 38e9  # of 40 GB, what a process can have


def size_for(device: Any) -> Size:
    """Chooses what a device trains in minutes and can hold in float32."""
    if device.platform == "cpu":
        return CPU
    memory = (device.memory_stats() or {}).get("bytes_limit", 0)
    return LARGE if memory >= _LARGE else SMALL
