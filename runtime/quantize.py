"""The number format: groups of integer codes around a middle, lowered by shifts and packed in 16-bit words.

A group has a middle, a range and codes `c` in `[0, 2^b - 1]`:

    x = mid + (c - (2^b - 1) / 2) * range / 2^b

The range is cut into 2^b cells of equal width and a code stands for the middle of its cell. Each cell of a narrower
code consists of whole cells of a wider one, so the upper bits of a code are the code at fewer bits: lowering drops the
low bits, touches nothing else, and gives exactly the codes that quantizing at fewer bits would have given.

Middle and range are stored in one 16-bit word. Its low byte is the range, the upper bits of an fp16 number: five of
exponent, three of fraction. Its high byte, less 128, is the middle in sixteenths of the range. Codes are computed from
the stored middle and range, so rounding these adds no error of its own. It only makes a range up to a quarter wider
than it need be, and at least an eighth of its middle. Two fp16 numbers instead would be a fifth of all bytes at 2 bits,
for groups of 64.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 16
LARGEST = 61440.0
"""The largest range and the largest middle that are stored; `LARGEST_RANGE` is the byte of this range."""
LARGEST_RANGE = 0xF7
MIDS_PER_RANGE = 16
LARGEST_MID = 127


def levels(bits: int) -> int:
    """The largest code of a width."""
    return (1 << bits) - 1


def group_parameters(x: Tensor, dim: int) -> Tensor:
    """The words (int16, `dim` kept at size 1) of the groups along `dim`.

    A range is the smallest that holds all values around the *stored* middle, or the next larger one, so no value of
    the group is clipped. Numbers beyond 61,440 saturate.
    """
    low, high = (bound.to(torch.float32) for bound in torch.aminmax(x, dim=dim, keepdim=True))
    mid, spread = (low / 2 + high / 2).clamp(-LARGEST, LARGEST), high - low
    first = _range_byte(torch.maximum(spread, mid.abs() * (MIDS_PER_RANGE / LARGEST_MID)))
    stored, value_range = mid_and_range(_word(mid, first))
    clips = 2 * torch.maximum(high - stored, stored - low) > value_range
    return _word(mid, (first + clips).clamp(max=LARGEST_RANGE))


def _range_byte(x: Tensor) -> Tensor:
    """The byte (int32) of the smallest range that is not less than `x`."""
    x = x.clamp(max=LARGEST)
    nearest = x.to(torch.float16)
    not_less = nearest.view(torch.int16).to(torch.int32) + (nearest.float() < x)
    return (not_less + 127) >> 7


def _word(mid: Tensor, range_byte: Tensor) -> Tensor:
    """The word (int16) of a range and a middle (float32), which is rounded to sixteenths of the range."""
    value_range = range_of(range_byte)
    mid_byte = torch.where(value_range > 0, mid * (MIDS_PER_RANGE / value_range), 0.0).round_()
    mid_byte = mid_byte.clamp_(-LARGEST_MID, LARGEST_MID).to(torch.int32) + 128
    return (mid_byte << 8 | range_byte).to(torch.int16)


def range_of(range_byte: Tensor) -> Tensor:
    """The range (float32) that a byte (any integer dtype) stands for."""
    return (range_byte.to(torch.int16) << 7).view(torch.float16).to(torch.float32)


def mid_and_range(parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Middles and ranges (float32) of words (int16)."""
    value_range = range_of(parameters & 0xFF)
    sixteenths = parameters >> 8 ^ -128  # an unsigned byte less 128
    return sixteenths * (value_range / MIDS_PER_RANGE), value_range


def encode(x: Tensor, parameters: Tensor, bits: int) -> Tensor:
    """Codes (int32, shape of `x`) of `x` in groups of the given words, which broadcast against `x`."""
    mid, value_range = mid_and_range(parameters)
    cells_per_unit = torch.where(value_range > 0, (1 << bits) / value_range, 0.0)
    cells = (x.to(torch.float32) - mid) * cells_per_unit + (1 << bits) / 2
    return cells.clamp_(0, levels(bits)).to(torch.int32)


def step_and_zero(parameters: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`step` and `zero` (float32) with `x = zero + c * step`."""
    mid, value_range = mid_and_range(parameters)
    step = value_range / (1 << bits)
    return step, mid - step * (levels(bits) / 2)


def decode(codes: Tensor, parameters: Tensor, bits: int) -> Tensor:
    """The numbers (float32) that codes stand for."""
    mid, value_range = mid_and_range(parameters)
    return mid + (codes.to(torch.float32) - levels(bits) / 2) * (value_range / (1 << bits))


def fake_quantize(x: Tensor, bits: int, dim: int) -> Tensor:
    """`x` after a round trip through codes of `bits` bits, groups along `dim`; shape and dtype of `x`."""
    parameters = group_parameters(x, dim)
    return decode(encode(x, parameters, bits), parameters, bits).to(x.dtype)


def lower(codes: Tensor, bits: int, target: int) -> Tensor:
    """Codes of width `bits` lowered to `target` (any integer dtype)."""
    return codes >> (bits - target)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` as 16-bit words `[..., W]` (int16), W = n * bits / 16.

    Field i of word w holds element `i * W + w`: one shift and one mask give a contiguous slice of the elements.
    """
    fields = WORD_BITS // bits
    words: Tensor = codes.unflatten(-1, (fields, -1)).to(torch.int32)
    shifts = torch.arange(fields, dtype=torch.int32, device=codes.device).mul_(bits).unsqueeze(-1)
    return (words << shifts).sum(-2, dtype=torch.int32).to(torch.int16)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int16 words `[..., W]` to codes `[..., n]` (int32)."""
    fields = WORD_BITS // bits
    shifts = torch.arange(fields, dtype=torch.int32, device=words.device).mul_(bits).unsqueeze(-1)
    return ((words.to(torch.int32).unsqueeze(-2) >> shifts) & levels(bits)).flatten(-2)


def fields_of(x: Tensor, bits: int) -> Tensor:
    """The last dimension of `x` [..., n] as fields of packed bytes: [F, ..., n / F], F codes a byte.

    In field f, byte `2 w + o` of a little-endian array of W words holds element `(f + o * F) * W + w`. An operand in
    this order can be contracted with `unpack_bytes` directly, without 16-bit arithmetic and without sorting codes.
    """
    if bits == WORD_BITS:
        return x.unsqueeze(0)
    fields: Tensor = x.unflatten(-1, (2, 8 // bits, -1)).movedim(-2, 0)
    return fields.transpose(-1, -2).flatten(-2)


def unpack_bytes(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Codes of packed bytes `[..., b]` (uint8) as numbers: field by field, [F, ..., b], F codes a byte.

    The fields stay apart because strided writes into one tensor cost several times what contiguous ones do.
    """
    if bits == WORD_BITS:
        return packed.view(torch.uint16).to(dtype).unsqueeze(0)
    if bits == 8:
        return packed.to(dtype).unsqueeze(0)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, *[1] * packed.dim())
    return (packed.unsqueeze(0) >> shifts).bitwise_and_(levels(bits)).to(dtype)
