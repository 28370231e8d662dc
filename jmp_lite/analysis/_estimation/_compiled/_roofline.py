"""The launches of a compiled program, with the FLOPs of library calls."""

import math
import re
from collections.abc import Iterator, Mapping

from jmp_lite.analysis._estimation._compiled import _cost, _hlo
from jmp_lite.analysis._estimation._devices import REACHED_BANDWIDTH, REACHED_PEAK, Device, kind_of
from jmp_lite.analysis._estimation._launches import Launch

FORMULA = f"""The time is the sum over all launches of max(bytes / {REACHED_BANDWIDTH} of the bandwidth,
FLOPs / {REACHED_PEAK} of the peak), for 3.35 TB/s, 989 TFLOP/s in bfloat16 and 1979 in float8; FLOPs are those of
matmuls by cuBLAS, of convolutions by cuDNN, and of attention by cuDNN without what the mask leaves out."""

_BATCH = re.compile(r'"lhs_batch_dimensions":\[([^\]]*)\]')
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_LABELS = re.compile(r"dim_labels=\w+_(\w+)->")
#: Matmuls of [time, time, width] in an attention, half of which causal masks leave out: forward 2, backward 5.
_OF_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
#: Of a convolution, where its kernel and what has its output's shape are among the operands; the result comes first.
_OF_CONVOLUTION = {
    "Forward": (2, 0),
    "BiasActivationForward": (2, 0),
    "BackwardInput": (2, 1),
    "BackwardFilter": (0, 2),
}
_DTYPES = {"f64": "float64", "f32": "float32", "bf16": "bfloat16", "f16": "float16", "s8": "int8", "u8": "int8"}


def launches(module: _hlo.Module) -> Iterator[Launch]:
    """Yields the launches of a program, including every branch of a conditional."""
    shapes = {line.name: line.shape for lines in module.computations.values() for line in lines}
    for launch in _cost.launches(module):
        line = launch.instruction
        operands = [shapes[name] for name in line.operands]
        flops, dtype = _flops(line, operands)
        moved = launch.bytes / max(launch.times, 1)
        dtypes = (_named(dtype),) if flops else ()
        yield Launch(_part(module, line, flops), moved, launch.times, round(flops), dtypes)


def seconds(module: _hlo.Module, device: Device) -> float:
    """The run time of a program."""
    return sum(
        launch.trips * device.seconds(launch.bytes, launch.flops, kind_of(launch.dtypes))[0]
        for launch in launches(module)
    )


def _named(dtype: str) -> str:
    return _DTYPES.get(dtype, "float8" if dtype.startswith("f8") else dtype)


def _part(module: _hlo.Module, line: _hlo.Instruction, flops: float) -> str:
    """The purpose of a launch; passes that find scales look like any other maximum and count as ``other``."""
    if flops:
        return "matmuls"
    if any(dtype.startswith("f8") for dtype, _, _ in _hlo.arrays(line.shape)):
        return "quantize"
    inside = module.computations.get((line.called("calls") or ("",))[0], ())
    work = {inner.opcode for inner in inside} - {"parameter", "bitcast"}
    return "casts" if work == {"convert"} or line.opcode == "convert" else "other"


def _sizes(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found.group(1).split(",") if size] if found else []


def _flops(line: _hlo.Instruction, operands: list[str]) -> tuple[float, str]:
    """The FLOPs of one launch, and their dtype."""
    found = _TARGET.search(line.attributes)
    target = found.group(1) if found else ""
    if target in _OF_ATTENTION:
        batch, heads, time, width = _sizes(line.shape)
        return _OF_ATTENTION[target] * batch * heads * time * time * width, "bf16"
    if target.startswith("__cudnn$conv"):
        return _flops_of_convolution(line, operands, _OF_CONVOLUTION, target.removeprefix("__cudnn$conv"))
    if not target.startswith("__cublas"):
        return 0.0, ""
    dtype, left, _ = next(_hlo.arrays(operands[0]))
    right, result = (next(_hlo.arrays(shape))[1] for shape in (operands[1], line.shape))
    named = _BATCH.search(line.attributes)
    sizes = _sizes(operands[0])
    batch = math.prod(sizes[int(axis)] for axis in re.findall(r"\d+", named.group(1))) if named else 1
    return 2 * math.sqrt(left * right * result / batch), dtype


def _flops_of_convolution(
    line: _hlo.Instruction, operands: list[str], places: Mapping[str, tuple[int, int]], direction: str
) -> tuple[float, str]:
    dtype = next(_hlo.arrays(operands[0]))[0]
    labels = _LABELS.search(line.attributes)
    if direction not in places or labels is None:
        return 0.0, dtype
    kernel, output = ([line.shape, *operands][place] for place in places[direction])
    features = _sizes(kernel)[labels.group(1).index("o")]
    return 2 * math.prod(_sizes(output)) * math.prod(_sizes(kernel)) / features, dtype
