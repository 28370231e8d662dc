"""Peak figures of accelerators from their datasheets, in one table, and the time of a launch on them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jmp_lite._messages import nearest, quote
from jmp_lite.errors import InvalidAnalysisError

#: The shares of bandwidth and of peak that large kernels reach (benchmarks/RESULTS.md, "A LLaMA block in 8 bits").
REACHED_BANDWIDTH, REACHED_PEAK = 0.85, 0.7


class Device(NamedTuple):
    """Peak figures of an accelerator.

    Attributes:
        title: Its name.
        memory: Memory in bytes.
        bandwidth: Memory bandwidth in bytes per second.
        peak: Dense operations per second of its matrix unit by operand dtype: ``float32`` as XLA runs it by default,
            which is TF32 on NVIDIA and one bfloat16 pass on TPUs. A dtype that is missing has no units.
        precise: Operations per second of matmuls with high precision: float32 units on NVIDIA, six bfloat16 passes on
            TPUs.
        source: The datasheet.
        compiler: The compile target for it without the device, if there is one.
    """

    title: str
    memory: float
    bandwidth: float
    peak: Mapping[str, float]
    precise: float
    source: str
    compiler: str = ""

    def seconds(self, moved: float, flops: float, kind: str) -> tuple[float, bool]:
        """Returns the seconds of a launch, and whether it is memory-bound.

        Args:
            moved: Bytes.
            flops: Floating operations.
            kind: A key of ``peak``, or ``precise``; a dtype without units runs as bfloat16 if it is narrower, else as
                float32.

        Example:
            >>> DEVICES["h100"].seconds(0.85 * 3.35e12, 0, "bfloat16")
            (1.0, True)
        """
        wider = "bfloat16" if kind in ("float8", "int8") else "float32"
        rate = self.precise if kind == "precise" else self.peak.get(kind, self.peak[wider])
        by_memory, by_products = moved / (REACHED_BANDWIDTH * self.bandwidth), flops / (REACHED_PEAK * rate)
        return max(by_memory, by_products), by_memory >= by_products


def _nvidia(tf32: float, half: float, eight: float, *, has_float8: bool = True) -> dict[str, float]:
    peak = {"float32": tf32, "bfloat16": half, "float16": half, "int8": eight}
    return peak | ({"float8": eight} if has_float8 else {})


def _tpu(bfloat16: float) -> dict[str, float]:
    return {"float32": bfloat16, "bfloat16": bfloat16, "int8": 2 * bfloat16}


_HOPPER = _nvidia(494.7e12, 989e12, 1979e12)

DEVICES: Mapping[str, Device] = {
    "a100": Device(
        "NVIDIA A100 SXM 80GB",
        80e9,
        2.039e12,
        _nvidia(156e12, 312e12, 624e12, has_float8=False),
        19.5e12,
        "NVIDIA A100 Tensor Core GPU datasheet",
    ),
    "l4": Device(
        "NVIDIA L4", 24e9, 300e9, _nvidia(60e12, 121e12, 242.5e12), 30.3e12, "NVIDIA L4 Tensor Core GPU datasheet"
    ),
    "h100": Device("NVIDIA H100 SXM", 80e9, 3.35e12, _HOPPER, 66.9e12, "NVIDIA H100 Tensor Core GPU datasheet", "h100"),
    # The same chip, so the same programs.
    "h200": Device("NVIDIA H200 SXM", 141e9, 4.8e12, _HOPPER, 66.9e12, "NVIDIA H200 Tensor Core GPU datasheet", "h100"),
    "b200": Device("NVIDIA B200", 180e9, 8e12, _nvidia(1.1e15, 2.25e15, 4.5e15), 80e12, "NVIDIA HGX B200 datasheet"),
    "tpu_v5e": Device("TPU v5e", 16e9, 819e9, _tpu(197e12), 197e12 / 6, "Google Cloud documentation, TPU v5e"),
    "tpu_v5p": Device("TPU v5p", 95e9, 2.765e12, _tpu(459e12), 459e12 / 6, "Google Cloud documentation, TPU v5p"),
    "tpu_v6e": Device("TPU v6e", 32e9, 1.638e12, _tpu(918e12), 918e12 / 6, "Google Cloud documentation, TPU v6e"),
}


def device_of(name: str) -> Device:
    """Returns the device with a name, ignoring case and dashes.

    Raises:
        InvalidAnalysisError: If it is not in the table.
    """
    key = name.lower().replace("-", "_") if isinstance(name, str) else ""
    if key not in DEVICES:
        meant = nearest(key, DEVICES, 3) if key else []
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        raise InvalidAnalysisError(f"Unknown device {quote(name)}.{hint} There are {', '.join(map(repr, DEVICES))}.")
    return DEVICES[key]


def kind_of(dtypes: Sequence[str], *, exact: bool = False) -> str:
    """Returns the key of ``Device.peak`` for a matmul of these operands: the key of the wider one.

    Example:
        >>> kind_of(["float8_e4m3fn", "float8_e5m2"]), kind_of(["bfloat16", "float32"]), kind_of(["int8", "int8"])
        ('float8', 'float32', 'int8')
    """
    for kind in ("float64", "float32", "float16", "bfloat16", "float8", "int8"):
        if any(dtype.startswith(kind) for dtype in dtypes):
            is_precise = kind == "float64" or (exact and kind == "float32")
            return "precise" if is_precise else kind
    return "precise"
