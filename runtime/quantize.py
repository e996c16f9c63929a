"""The number format: groups of integer codes around a middle, lowered by shifts and packed in 16-bit words.

A group has a middle, a range and codes `c` in `[0, 2^b - 1]`:

    x = mid + (c - (2^b - 1) / 2) * range / (2^b - 1)

Neither depends on b, so lowering the bits touches codes only (PM-KVQ, section 3.2, "equivalent right
shift"). A shift from 2n to n bits divides by the odd number 2^n + 1, whose rounding boundaries are rounding boundaries
of the wider codes too: shifted codes equal codes quantized at the narrow width at once.

Both are stored in one 16-bit word. Its low byte is the range, the upper bits of an fp16 number: five of exponent, three
of fraction. Its high byte, less 128, is the middle in sixteenths of the range. Codes are made with what is stored, so
that these few bits cost no precision: only a range is up to a quarter wider than it need be, and at least an eighth of
its middle. Two fp16 numbers instead would be a fifth of all bytes at 2 bits, for groups of 64.

Four levels spread over the whole range of a group waste two of them on its rare extremes. At 2 bits the step is
therefore `clip * range / 3`, the outer levels standing for all that lies beyond them. `clip` is 1, 4/5 or 3/5, a
constant of a layer: the thresholds between its levels, at 0 and +-5 clip steps of the 4-bit codes, then still lie
between 4-bit codes, and lowering stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD_BITS = 16
NARROWEST = 2
CLIPS = (1.0, 0.8, 0.6)
LARGEST = 61440.0
"""The largest range, and middle, that is stored; its byte is `LARGEST_RANGE`."""
LARGEST_RANGE = 0xF7
MIDS_PER_RANGE = 16
LARGEST_MID = 127


def levels(bits: int) -> int:
    """The largest code of a width."""
    return (1 << bits) - 1


def group_parameters(x: Tensor, dim: int) -> Tensor:
    """The words (int16, `dim` kept at size 1) of the groups along `dim`.

    A range is the smallest that holds all values around the *stored* middle, or the next larger one, so no value of
    the group clips. Numbers beyond 61,440 saturate.
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
    """The word (int16) of a middle (float32) as nearly as a range can have it."""
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


def step_fraction(bits: int, clip: float) -> float:
    """A group's step as a fraction of its range; `clip` narrows that of 2-bit codes."""
    return (clip if bits == NARROWEST else 1.0) / levels(bits)


def encode(x: Tensor, parameters: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """Codes (int32, shape of `x`) of `x` in groups of the given words, which broadcast against `x`."""
    top, (mid, value_range) = levels(bits), mid_and_range(parameters)
    steps_per_unit = torch.where(value_range > 0, 1 / (value_range * step_fraction(bits, clip)), 0.0)
    codes = (x.to(torch.float32) - mid) * steps_per_unit + top / 2
    return codes.round_().clamp_(0, top).to(torch.int32)


def step_and_zero(parameters: Tensor, bits: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """`step` and `zero` (float32) with `x = zero + c * step`."""
    mid, value_range = mid_and_range(parameters)
    step = value_range * step_fraction(bits, clip)
    return step, mid - step * (levels(bits) / 2)


def decode(codes: Tensor, parameters: Tensor, bits: int, clip: float = 1.0) -> Tensor:
    """The numbers (float32) that codes stand for."""
    mid, value_range = mid_and_range(parameters)
    return mid + (codes.to(torch.float32) - levels(bits) / 2) * (value_range * step_fraction(bits, clip))


def fake_quantize(x: Tensor, bits: int, dim: int, clip: float = 1.0) -> Tensor:
    """`x` after a round trip through codes of `bits` bits, groups along `dim`; shape and dtype of `x`."""
    parameters = group_parameters(x, dim)
    return decode(encode(x, parameters, bits, clip), parameters, bits, clip).to(x.dtype)


def shift(codes: Tensor, bits: int) -> Tensor:
    """Equivalent right shift from `bits` = 2n to n bits: `round(c / (2^n + 1))` by shifts and adds (any integer
    dtype)."""
    n = bits // 2
    wide = codes.to(torch.int64)
    scaled = (wide << 2 * n) - (wide << n) + wide
    half = (1 << (3 * n - 1)) - (1 << (2 * n - 1)) + (1 << (n - 1))
    return ((scaled + half) >> 3 * n).to(codes.dtype)


def shift_to(codes: Tensor, bits: int, target: int, clip: float = 1.0) -> Tensor:
    """Codes of width `bits` lowered step by step to `target`."""
    while bits > target:
        codes = shift(codes, bits) if bits > 2 * NARROWEST else narrow(codes, clip)
        bits //= 2
    return codes


def narrowing_margin(clip: float) -> int:
    """4-bit codes between the middle and the outer thresholds of 2-bit codes."""
    return round(5 * clip)


def narrow(codes: Tensor, clip: float = 1.0) -> Tensor:
    """4-bit codes to 2 bits: the number of the three thresholds that a code reaches. Uncut, that is `shift`."""
    margin = narrowing_margin(clip)
    reached = [(codes >= threshold).to(codes.dtype) for threshold in (8 - margin, 8, 8 + margin)]
    return reached[0] + reached[1] + reached[2]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., n]` as 16-bit words `[..., W]` (int16), W = n * bits / 16.

    Field i of word w holds element `i * W + w`: one shift and one mask give a contiguous slice of the elements.
    """
    fields = WORD_BITS // bits
    words = codes.unflatten(-1, (fields, -1)).to(torch.int32)
    shifts = torch.arange(fields, dtype=torch.int32, device=codes.device).mul_(bits).unsqueeze(-1)
    return (words << shifts).sum(-2, dtype=torch.int32).to(torch.int16)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: int16 words `[..., W]` to codes `[..., n]` (int32)."""
    fields = WORD_BITS // bits
    shifts = torch.arange(fields, dtype=torch.int32, device=words.device).mul_(bits).unsqueeze(-1)
    return ((words.to(torch.int32).unsqueeze(-2) >> shifts) & levels(bits)).flatten(-2)


def fields_of(x: Tensor, bits: int) -> Tensor:
    """The last dimension of `x` [..., n] as fields of packed bytes: [F, ..., n / F], F codes a byte.

    A byte's field f, over all bytes of a little-endian word array, holds elements in an order of its own: byte `2 w +
    o` has element `(f + o * F) * W + w`. Contracting `unpack_bytes` with an operand in the same order spares 16-bit
    arithmetic and the sorting of codes.
    """
    if bits == WORD_BITS:
        return x.unsqueeze(0)
    return x.unflatten(-1, (2, 8 // bits, -1)).movedim(-2, 0).transpose(-1, -2).flatten(-2)


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
