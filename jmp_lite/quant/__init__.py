"""Below 16 bits: matmuls of float8 and int8 operands, and weights stored in 8 or 4 bits."""

from jmp_lite.quant._array import QuantizedArray as QuantizedArray
from jmp_lite.quant._array import dequantize_tree as dequantize_tree
from jmp_lite.quant._array import nbytes as nbytes
from jmp_lite.quant._array import quantize_array as quantize_array
from jmp_lite.quant._array import quantize_tree as quantize_tree
from jmp_lite.quant._axes import contracted_axes as contracted_axes
from jmp_lite.quant._calibrate import calibrate as calibrate
from jmp_lite.quant._fake_quant import fake_quant as fake_quant
from jmp_lite.quant._gptq import gptq as gptq
from jmp_lite.quant._recipes import FP8 as FP8
from jmp_lite.quant._recipes import FP8_ROWWISE as FP8_ROWWISE
from jmp_lite.quant._recipes import INT8_QAT as INT8_QAT
from jmp_lite.quant._recipes import INT8_TRAIN as INT8_TRAIN
from jmp_lite.quant._recipes import MXFP8 as MXFP8
from jmp_lite.quant._recipes import NVFP4 as NVFP4
from jmp_lite.quant._recipes import W4A16 as W4A16
from jmp_lite.quant._recipes import W8A8 as W8A8
from jmp_lite.quant._recipes import W8A8_STATIC as W8A8_STATIC
from jmp_lite.quant._recipes import W8A16 as W8A16
from jmp_lite.quant._recipes import DotRecipe as DotRecipe
from jmp_lite.quant._recipes import get_recipe as get_recipe
from jmp_lite.quant._recipes import scaled_conv as scaled_conv
from jmp_lite.quant._recipes import scaled_dot_general as scaled_dot_general
from jmp_lite.quant._scale import absmax_scale as absmax_scale
from jmp_lite.quant._scale import dequantize as dequantize
from jmp_lite.quant._scale import quantize as quantize
from jmp_lite.quant._smooth import smooth as smooth
from jmp_lite.quant._spec import QuantSpec as QuantSpec

__all__ = [
    "FP8",
    "FP8_ROWWISE",
    "INT8_QAT",
    "INT8_TRAIN",
    "MXFP8",
    "NVFP4",
    "W4A16",
    "W8A8",
    "W8A8_STATIC",
    "W8A16",
    "DotRecipe",
    "QuantSpec",
    "QuantizedArray",
    "absmax_scale",
    "calibrate",
    "contracted_axes",
    "dequantize",
    "dequantize_tree",
    "fake_quant",
    "get_recipe",
    "gptq",
    "nbytes",
    "quantize",
    "quantize_array",
    "quantize_tree",
    "scaled_conv",
    "scaled_dot_general",
    "smooth",
]
