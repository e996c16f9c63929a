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
    mid_and_range,
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
    parameters = group_parameters(x, -1)
    lowered = shift_to(encode(x, parameters, 16), 16, target)
    at_once = encode(x, parameters, target)
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
    parameters = group_parameters(x, -1)
    lowered = shift_to(encode(x, parameters, 16, clip), 16, 2, clip)
    at_once = encode(x, parameters, 2, clip)
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
@pytest.mark.parametrize("offset", [0, 1, 100])
def test_error_is_at_most_half_a_step(bits: int, dim: int, offset: float) -> None:
    x = (torch.randn(7, 64, 80) * torch.rand(7, 64, 80).mul(10).sub(5).exp()).double()
    x += offset * torch.randn(7, 1, 1)
    parameters = group_parameters(x, dim)
    mid, value_range = mid_and_range(parameters)
    spread = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
    assert (value_range >= spread * (1 - 1e-6)).all(), "a range smaller than the spread clips"
    needed = torch.maximum(spread, mid.double().abs() / 8)
    assert (value_range <= needed * 1.27).all(), "a range wider than needed"
    error = (fake_quantize(x, bits, dim) - x).abs()
    half_step = value_range.double() / levels(bits) / 2
    assert (error <= half_step * 1.02 + x.abs() * 1e-6).all()


def test_every_range_is_stored_as_it_is_and_the_next_number_as_the_next_range() -> None:
    ranges = (torch.arange(1, 0xF8, dtype=torch.int32) << 7).to(torch.int16).view(torch.float16).float()
    pairs = torch.stack([-ranges / 2, ranges / 2], dim=-1)
    mid, stored = mid_and_range(group_parameters(pairs, -1))
    assert torch.equal(stored.squeeze(-1), ranges)
    assert (mid == 0).all()
    beyond = mid_and_range(group_parameters(pairs * (1 + 2**-20), -1))[1].squeeze(-1)
    assert torch.equal(beyond[:-1], ranges[1:])
    assert beyond[-1] == ranges[-1]


def test_groups_of_one_value_and_of_zeros() -> None:
    for value in (0.0, 3.14159, -1e-3, 4e4):
        x = torch.full((2, 64), value)
        parameters = group_parameters(x, -1)
        for bits in WIDTHS:
            decoded = decode(encode(x, parameters, bits), parameters, bits)
            torch.testing.assert_close(decoded, x, rtol=0.15 / levels(bits) / 2, atol=0)


def test_numbers_too_small_for_a_range_stay_as_small() -> None:
    x = torch.randn(16, 64) * 1e-7
    assert fake_quantize(x, 2, -1).abs().max() < 2e-5


def test_values_beyond_the_largest_range_saturate_and_stay_finite() -> None:
    for x in (torch.tensor([[-1e6, 0.0, 1e6, 5.0]]), torch.full((1, 64), 3e38), torch.full((1, 64), -65504.0)):
        parameters = group_parameters(x, -1)
        assert (mid_and_range(parameters)[0].abs() < 65504).all(), "a middle that is no fp16 number"
        for bits in WIDTHS:
            assert torch.isfinite(fake_quantize(x, bits, -1)).all()
