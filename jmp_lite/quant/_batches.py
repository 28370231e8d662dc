"""Calibration data: batches of arguments."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax

from jmp_lite._messages import quote
from jmp_lite.errors import InvalidRecipeError


def checked(batches: Iterable[Sequence[Any]], caller: str, params: Any = ()) -> Iterator[Sequence[Any]]:
    """Yields batches of arguments, for parameters that are given once.

    Raises:
        InvalidRecipeError: If there are no batches, one is not a tuple or list, or JAX is tracing, so they have no
            values.
    """
    batch = None
    for batch in batches:
        if not isinstance(batch, (tuple, list)):
            raise InvalidRecipeError(
                f"{caller} takes a tuple of arguments for each batch, such as (x,), got {quote(batch)}."
            )
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch))):
            raise InvalidRecipeError(
                f"{caller} looks at numbers, and there are none while JAX traces, as under jax.jit. Call it outside."
            )
        yield batch
    if batch is None:
        raise InvalidRecipeError(f"{caller} was given no batches. Pass at least one tuple of arguments.")
