"""The devices of this process: ``devices``."""

from typing import Any

import jax
import numpy as np

from jmp_lite._dtypes import dtype_name, dtype_to_names, faster_dtype
from jmp_lite._messages import described
from jmp_lite._text import table
from jmp_lite.cli._rates import PRODUCTS, copied_bytes_per_second, product_flops_per_second


def devices(*, measure: bool = False) -> str:
    """Describes the local devices: for each format whether it is fast there, or what to use instead.

    Args:
        measure: Whether to time one device of each kind as well.
    """
    local = jax.local_devices()
    known = table(["id", "platform", "kind", "formats"], [_row(device) for device in local])
    if not measure:
        return known
    first_of_kind = {device.device_kind: device for device in reversed(local)}
    return "\n\n".join([known, *map(_measured, reversed(first_of_kind.values()))])


def _row(device: Any) -> list[str]:
    capability = getattr(device, "compute_capability", None)
    verdicts = []
    for scalar_type in dtype_to_names:
        dtype = np.dtype(scalar_type)
        better = faster_dtype(dtype, device.platform, capability)
        if better:
            verdicts.append(f"{dtype_name(dtype)} is slow (use {better})")
    formats = "; ".join(verdicts) or "nothing known against any format"
    return [str(device.id), device.platform, device.device_kind, formats]


def _measured(device: Any) -> str:
    """Rates of one device as text; what it cannot do says why."""
    rows = []
    with jax.default_device(device):
        for name in PRODUCTS:
            try:
                found = product_flops_per_second(name)
            except Exception as error:  # noqa: BLE001  # compilers refuse formats in as many ways as there are compilers
                rows.append([name, "-", described(error)])
            else:
                rows.append([name, f"{found.per_second / 1e12:.3g}", f"{found.size} x {found.size}"])
        copied = copied_bytes_per_second()
    products = table(["product of", "TFLOP/s", "matrices"], rows, is_right=[False, True, False])
    what = f"Device {device.id}, {device.device_kind}"
    return (
        f"{what}\n{products}\nCopy: {copied.per_second / 1e9:.3g} GB/s, read and written, of {copied.size / 1e6:.0f} MB"
    )
