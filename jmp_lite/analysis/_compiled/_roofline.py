"""How long a compiled program takes if every launch is bound by memory or by its matrix unit, and by nothing else."""

import math
import re
from typing import NamedTuple

from jmp_lite.analysis._compiled import _cost, _hlo


class Device(NamedTuple):
    """What a device can do at best.

    Attributes:
        bandwidth: Bytes per second of its memory.
        peak: Floating operations per second of its matrix unit, by HLO's name of the dtype of the operands.
    """

    bandwidth: float
    peak: dict[str, float]


#: NVIDIA H100 SXM5, "H100 Tensor Core GPU Datasheet": dense products, without sparsity.
H100 = Device(3.35e12, {"bf16": 989e12, "f16": 989e12, "f8e4m3fn": 1979e12, "f8e5m2": 1979e12, "s8": 1979e12})
#: The share of both that large kernels reach.
REACHED_BANDWIDTH, REACHED_PEAK = 0.85, 0.7
FORMULA = f"""The time is the sum over all launches of max(bytes / {REACHED_BANDWIDTH} of the bandwidth,
FLOPs / {REACHED_PEAK} of the peak), for 3.35 TB/s, 989 TFLOP/s in bfloat16 and 1979 in float8; FLOPs are those of
matrix products by cuBLAS, and of attention by cuDNN without what the mask leaves out."""

_BATCH = re.compile(r'"lhs_batch_dimensions":\[([^\]]*)\]')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
#: Products of [time, time, width] in an attention, half of which causal masks leave out: forward 2, backward 5.
_OF_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}


def seconds(module: _hlo.Module, device: Device) -> float:
    """The time that a program takes."""
    shapes = {line.name: line.shape for lines in module.computations.values() for line in lines}
    total = 0.0
    for launch in _cost.launches(module):
        operands = [shapes[name] for name in launch.instruction.operands]
        flops, dtype = _flops(launch.instruction, operands)
        peak = device.peak.get(dtype, device.peak["bf16"])
        total += max(
            launch.bytes / (REACHED_BANDWIDTH * device.bandwidth), launch.times * flops / (REACHED_PEAK * peak)
        )
    return total


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found.group(1).split(",") if size] if found else []


def _flops(line: _hlo.Instruction, operands: list[str]) -> tuple[float, str]:
    """Of one launch, and the dtype that they are of."""
    found = _TARGET.search(line.attributes)
    target = found.group(1) if found else ""
    if target in _OF_ATTENTION:
        batch, heads, time, width = _sizes(line.shape)
        return _OF_ATTENTION[target] * batch * heads * time * time * width, "bf16"
    if not target.startswith("__cublas"):
        return 0.0, ""
    dtype, left, _ = next(_hlo.arrays(operands[0]))
    right, result = (next(_hlo.arrays(shape))[1] for shape in (operands[1], line.shape))
    named = _BATCH.search(line.attributes)
    sizes = _sizes(operands[0])
    batch = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", named.group(1))) if named else 1
    return 2 * math.sqrt(left * right * result / batch), dtype
