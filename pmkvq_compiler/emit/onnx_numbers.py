"""The numbers of a quantized cache in standard operators of ONNX: groups, parameters, codes and the bytes of codes.

They are those of `runtime/quantize.py`, in float32. Codes are packed into bytes, of which field f holds element
`f * bytes + byte`.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from onnxscript import OpBuilder

from pmkvq_compiler.runtime.quantize import LARGEST, LARGEST_MID, LARGEST_RANGE, MIDS_PER_RANGE, levels, range_of

BYTE_BITS = 8
SMALLEST_EXPONENT = -14
"""Of a range, see `quantize`: smaller ones are multiples of its eighth."""


def quantize(op: OpBuilder, x: ir.Value, bits: int, axis: int) -> tuple[ir.Value, ir.Value]:
    """Codes (uint8, shape of `x`) of blocks [B, H, n, ., .] in groups along `axis`, and their parameters
    [B, H, n, 2, groups] (uint8): the bytes of middles and of ranges, see `quantize`."""
    mid_byte, range_byte = _group_parameters(op, op.ReduceMin(x, [axis]), op.ReduceMax(x, [axis]))
    mid, value_range = _mid_and_range(op, mid_byte, range_byte)
    cells_per_unit = op.Where(op.Greater(value_range, 0.0), op.Div(float(1 << bits), value_range), 0.0)
    cells = op.Add(op.Mul(op.Sub(x, mid), cells_per_unit), (1 << bits) / 2)
    parameters = op.Cast(op.Concat(mid_byte, range_byte, axis=axis), to=ir.DataType.UINT8)
    if axis == 4:
        parameters = op.Transpose(parameters, perm=[0, 1, 2, 4, 3])
    return op.Cast(op.Clip(cells, 0.0, float(levels(bits))), to=ir.DataType.UINT8), parameters


def _group_parameters(op: OpBuilder, low: ir.Value, high: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Bytes of middles and of ranges, as float32, of groups between bounds (float32)."""
    mid = op.Clip(op.Add(op.Mul(low, 0.5), op.Mul(high, 0.5)), -LARGEST, LARGEST)
    spread = op.Max(op.Sub(high, low), op.Mul(op.Abs(mid), MIDS_PER_RANGE / LARGEST_MID))
    first = _range_byte(op, op.Min(spread, LARGEST))
    stored, value_range = _mid_and_range(op, _mid_byte(op, mid, first), first)
    clips = op.Greater(op.Mul(op.Max(op.Sub(high, stored), op.Sub(stored, low)), 2.0), value_range)
    range_byte = op.Min(op.Add(first, as_float(op, clips)), float(LARGEST_RANGE))
    return _mid_byte(op, mid, range_byte), range_byte


def _range_byte(op: OpBuilder, x: ir.Value) -> ir.Value:
    """The byte of the smallest range that is not less than `x`: the eighths that `x` takes of a power of two, behind
    all bytes of smaller powers. One power too many or too few, where the logarithm is rounded, gives the same byte."""
    exponent = op.Max(op.Floor(op.Mul(op.Log(x), 1 / math.log(2))), float(SMALLEST_EXPONENT))
    eighths = op.Ceil(op.Mul(x, op.Pow(2.0, op.Sub(3.0, exponent))))
    return op.Add(op.Mul(op.Sub(exponent, float(SMALLEST_EXPONENT)), 8.0), eighths)


def _range(op: OpBuilder, byte: ir.Value, unit: float = 1.0) -> ir.Value:
    """The range of a byte times a unit: a table is read faster than powers are computed."""
    ranges = (range_of(torch.arange(LARGEST_RANGE + 1)) * unit).tolist()
    return op.Gather(op.Constant(value=ir.tensor(ranges, ir.DataType.FLOAT)), op.Cast(byte, to=ir.DataType.INT32))


def _mid_byte(op: OpBuilder, mid: ir.Value, range_byte: ir.Value) -> ir.Value:
    """The byte of a middle as nearly as a range can have it."""
    value_range = _range(op, range_byte)
    sixteenths = op.Mul(mid, op.Div(float(MIDS_PER_RANGE), value_range))
    sixteenths = op.Where(op.Greater(value_range, 0.0), op.Round(sixteenths), 0.0)
    return op.Add(op.Clip(sixteenths, -float(LARGEST_MID), float(LARGEST_MID)), 128.0)


def _mid_and_range(op: OpBuilder, mid_byte: ir.Value, range_byte: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What bytes, of any dtype, stand for."""
    value_range = _range(op, range_byte)
    return op.Mul(op.Sub(as_float(op, mid_byte), 128.0), op.Mul(value_range, 1 / MIDS_PER_RANGE)), value_range


def step_and_zero(op: OpBuilder, parameters: ir.Value, bits: int) -> tuple[ir.Value, ir.Value]:
    """`step` and `zero` (float32) with `x = zero + c * step`, of parameters [B, H, n, 2, groups]."""
    mid_byte, range_byte = op.Split(parameters, axis=3, num_outputs=2, _outputs=2)
    step = _range(op, range_byte, 2.0**-bits)
    sixteenth = (1 << bits) / MIDS_PER_RANGE  # of a range, in steps
    first_code = op.Sub(op.Mul(as_float(op, mid_byte), sixteenth), 128 * sixteenth + levels(bits) / 2)
    return step, op.Mul(step, first_code)


def as_half(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Cast(x, to=ir.DataType.FLOAT16)


def as_float(op: OpBuilder, x: ir.Value) -> ir.Value:
    return op.Cast(x, to=ir.DataType.FLOAT)


def pack(op: OpBuilder, codes: ir.Value, bits: int, axis: int) -> ir.Value:
    """Codes (uint8) as bytes along `axis`."""
    if bits == BYTE_BITS:
        return codes
    fields = op.Split(codes, axis=axis, num_outputs=BYTE_BITS // bits, _outputs=BYTE_BITS // bits)
    packed = fields[0]
    for number, field in enumerate(fields[1:], start=1):
        packed = op.BitwiseOr(packed, op.BitShift(field, _byte(op, number * bits), direction="LEFT"))
    return packed


def unpack(op: OpBuilder, packed: ir.Value, bits: int, axis: int) -> ir.Value:
    """The inverse of `pack`, as float32."""
    fields = []
    for low in range(0, BYTE_BITS, bits):
        field = op.BitShift(packed, _byte(op, low), direction="RIGHT") if low else packed
        fields.append(op.BitwiseAnd(field, _byte(op, levels(bits))) if low + bits < BYTE_BITS else field)
    return as_float(op, op.Concat(*fields, axis=axis) if len(fields) > 1 else fields[0])


def _byte(op: OpBuilder, number: int) -> ir.Value:
    return op.Constant(value=ir.tensor(number, ir.DataType.UINT8))
