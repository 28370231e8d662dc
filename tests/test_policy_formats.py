"""Formats that a policy names: arrays in them are cast, those in other formats of 8 bits are not."""

import jax.numpy as jnp
import pytest

import jmp_lite as jmp

CASTS = {"param_dtype": "cast_to_param", "compute_dtype": "cast_to_compute", "output_dtype": "cast_to_output"}


@pytest.mark.parametrize("named", [None, *CASTS])
@pytest.mark.parametrize("field", CASTS)
def test_a_format_that_a_policy_names_anywhere_is_cast_everywhere(field, named):
    """Otherwise it is left alone: it may be of something quantized."""
    dtypes = dict.fromkeys(CASTS, "float32") | ({named: "float8_e5m2"} if named else {})
    result = getattr(jmp.Policy(**dtypes), CASTS[field])(jnp.ones(2, "float8_e5m2"))
    assert result.dtype == (dtypes[field] if named else "float8_e5m2")
