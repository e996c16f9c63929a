"""The number format: nothing clips, shifts are exact, packing loses nothing."""

import pytest
import torch

from pmkvq_compiler.runtime.quantize import (
    CLIPS,
    decode,
    encode,
    fake_quantize,
    fields_of,
    group_parameters,
    levels,
    narrow,
    pack,
    shift,
    shift_to,
    unpack,
    unpack_bytes,
)

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
WIDTHS = (16, 8, 4, 2)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_shift_is_the_rounded_quotient_for_every_code(bits: int) -> None:
    codes = torch.arange(1 << bits, dtype=torch.int32)
    divisor = (1 << bits // 2) + 1
    quotient = (2 * codes.to(torch.int64) + divisor).div(2 * divisor, rounding_mode="floor")
    assert torch.equal(shift(codes, bits), quotient.to(torch.int32))


@pytest.mark.parametrize("target", [8, 4, 2])
def test_shifted_codes_equal_codes_quantized_at_once(target: int) -> None:
    x = torch.randn(512, 64) * torch.rand(512, 1).mul(12).sub(6).exp()
    mid, value_range = group_parameters(x, -1)
    lowered = shift_to(encode(x, mid, value_range, 16), 16, target)
    at_once = encode(x, mid, value_range, target)
    assert (lowered != at_once).float().mean() < 1e-3
    assert (lowered - at_once).abs().max() <= 1


@pytest.mark.parametrize("clip", CLIPS)
def test_narrowed_codes_are_the_nearest_of_the_clipped_levels(clip: float) -> None:
    codes = torch.arange(16, dtype=torch.int32)
    wide = (codes - 7.5) / 15
    levels_at_2_bits = (torch.arange(4) - 1.5) * clip / 3
    nearest = (wide.unsqueeze(-1) - levels_at_2_bits).abs().argmin(-1)
    assert torch.equal(narrow(codes, clip), nearest.to(torch.int32))
    if clip == 1:
        assert torch.equal(narrow(codes), shift(codes, 4))


@pytest.mark.parametrize("clip", CLIPS)
def test_lowered_codes_equal_clipped_codes_quantized_at_once(clip: float) -> None:
    x = torch.randn(512, 64) * torch.rand(512, 1).mul(12).sub(6).exp()
    mid, value_range = group_parameters(x, -1)
    lowered = shift_to(encode(x, mid, value_range, 16, clip), 16, 2, clip)
    at_once = encode(x, mid, value_range, 2, clip)
    assert (lowered != at_once).float().mean() < 1e-3
    assert (lowered - at_once).abs().max() <= 1


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_round_trip(bits: int, head_dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, head_dim), dtype=torch.int32)
    words = pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.nbytes * 8 == codes.numel() * bits
    assert torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_bytes_unpack_to_the_same_fields(bits: int, head_dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, head_dim), dtype=torch.int32)
    fields = unpack_bytes(pack(codes, bits).view(torch.uint8), bits, torch.float32)
    assert torch.equal(fields, fields_of(codes.float(), bits))
    assert torch.equal(fields.flatten().sort().values, codes.float().flatten().sort().values)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", WIDTHS)
def test_error_is_at_most_half_a_step(bits: int, dim: int) -> None:
    x = (torch.randn(7, 64, 80) * torch.rand(7, 64, 80).mul(10).sub(5).exp()).double()
    mid, value_range = group_parameters(x, dim)
    spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
    assert (value_range >= spread).all(), "a range smaller than the spread clips"
    assert (value_range <= spread * 1.01 + 4 * (mid.double().abs() * 2**-11)).all(), "a range wider than needed"
    error = (fake_quantize(x, bits, dim) - x).abs()
    half_step = value_range.double() / levels(bits) / 2
    assert (error <= half_step * 1.02 + x.abs() * 1e-6).all()


def test_groups_of_one_value_and_of_zeros() -> None:
    for value in (0.0, 3.14159, -1e-7):
        x = torch.full((2, 64), value)
        mid, value_range = group_parameters(x, -1)
        decoded = decode(encode(x, mid, value_range, 2), mid, value_range, 2)
        torch.testing.assert_close(decoded, x, rtol=1e-3, atol=1e-7)


def test_values_beyond_fp16_saturate_and_stay_finite() -> None:
    x = torch.tensor([[-1e6, 0.0, 1e6, 5.0]])
    assert torch.isfinite(fake_quantize(x, 8, -1)).all()
