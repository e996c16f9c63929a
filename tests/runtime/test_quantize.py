"""The number format: nothing clips, lowering is exact, packing loses nothing."""

import itertools

import pytest
import torch

from pmkvq_compiler.runtime.plan import CODE_BITS
from pmkvq_compiler.runtime.quantize import (
    decode,
    encode,
    fake_quantize,
    fields_of,
    group_parameters,
    lower,
    mid_and_range,
    pack,
    unpack,
    unpack_bytes,
)

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)

WORDS = [
    (mid << 8) | value_range
    for mid in (1, 125, 128, 131, 255)
    for value_range in (1, 7, 0x50, *range(0x78, 0x81), 0xF7)
]
"""Groups with a middle far to either side, near and at 0; ranges of every fraction, the smallest and the largest."""


def groups(words: list[int]) -> torch.Tensor:
    """Parameters [len(words), 1]."""
    return torch.tensor(words, dtype=torch.int32).to(torch.int16).unsqueeze(-1)


@pytest.mark.parametrize("word", WORDS, ids=hex)
def test_lowering_every_code_gives_what_quantizing_at_once_gives(word: int) -> None:
    """For the numbers of all 65,536 codes, the bounds of their cells, and the next numbers to either side of these."""
    parameters = groups([word])
    mid, value_range = mid_and_range(parameters)
    halves = mid + (torch.arange(2 * 65536 + 1) / 2 - 32768) * (value_range / 65536)
    infinity = torch.tensor(torch.inf)
    x = torch.cat([halves, halves.nextafter(infinity), halves.nextafter(-infinity)], dim=-1)
    codes = {bits: encode(x, parameters, bits) for bits in CODE_BITS}
    assert torch.equal(codes[16].unique(), torch.arange(65536, dtype=torch.int32))
    for wide, narrow in itertools.combinations(CODE_BITS, 2):
        assert torch.equal(lower(codes[wide], wide, narrow), codes[narrow])


@pytest.mark.parametrize("bits", CODE_BITS)
def test_numbers_of_codes_are_evenly_spaced_and_have_these_codes(bits: int) -> None:
    codes, parameters = torch.arange(1 << bits, dtype=torch.int32), groups(WORDS)
    mid, value_range = mid_and_range(parameters)
    x = decode(codes, parameters, bits)
    assert torch.equal(encode(x, parameters, bits), codes.expand_as(x))
    exact = mid.double() + (codes.double() - ((1 << bits) - 1) / 2) * value_range.double() / (1 << bits)
    torch.testing.assert_close(x.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("wide", "narrow"), list(itertools.combinations(CODE_BITS, 2)))
def test_a_lowered_number_is_off_by_at_most_half_a_narrow_step(wide: int, narrow: int) -> None:
    x = torch.randn(512, 64) * torch.rand(512, 1).mul(12).sub(6).exp()
    parameters = group_parameters(x, -1)
    codes = encode(x, parameters, wide)
    assert torch.equal(lower(codes, wide, narrow), encode(x, parameters, narrow))
    error = (decode(lower(codes, wide, narrow), parameters, narrow) - x).abs()
    half_step = mid_and_range(parameters)[1] / (1 << narrow) / 2
    assert (error <= half_step * 1.001).all()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_pack_round_trip(bits: int, head_dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, head_dim), dtype=torch.int32)
    words = pack(codes, bits)
    assert words.dtype == torch.int16
    assert words.nbytes * 8 == codes.numel() * bits
    assert torch.equal(unpack(words, bits), codes)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", CODE_BITS)
def test_bytes_unpack_to_the_same_fields(bits: int, head_dim: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 5, head_dim), dtype=torch.int32)
    fields = unpack_bytes(pack(codes, bits).view(torch.uint8), bits, torch.float32)
    assert torch.equal(fields, fields_of(codes.float(), bits))
    assert torch.equal(fields.flatten().sort().values, codes.float().flatten().sort().values)


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("bits", CODE_BITS)
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
    half_step = value_range.double() / (1 << bits) / 2
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
        for bits in CODE_BITS:
            decoded = decode(encode(x, parameters, bits), parameters, bits)
            torch.testing.assert_close(decoded, x, rtol=0.15 / (1 << bits) / 2, atol=0)


def test_numbers_too_small_for_a_range_stay_as_small() -> None:
    x = torch.randn(16, 64) * 1e-7
    assert fake_quantize(x, 2, -1).abs().max() < 2e-5


def test_values_beyond_the_largest_range_saturate_and_stay_finite() -> None:
    for x in (torch.tensor([[-1e6, 0.0, 1e6, 5.0]]), torch.full((1, 64), 3e38), torch.full((1, 64), -65504.0)):
        parameters = group_parameters(x, -1)
        assert (mid_and_range(parameters)[0].abs() < 65504).all(), "a middle that is no fp16 number"
        for bits in CODE_BITS:
            assert torch.isfinite(fake_quantize(x, bits, -1)).all()


@pytest.mark.parametrize("count", [16, 64, 128])
def test_eight_bits_are_nearly_as_exact_as_with_an_exact_range(count: int) -> None:
    """Codes from the smallest number of a group to the largest, which two numbers of 32 bits would have to keep."""
    x = torch.randn(2000, count, generator=torch.Generator().manual_seed(0))
    low, high = torch.aminmax(x, dim=1, keepdim=True)
    step = (high - low) / 255
    errors = [(one - x).norm() for one in (fake_quantize(x, 8, dim=1), low + ((x - low) / step).round() * step)]
    assert errors[0] <= 1.17 * errors[1]
    assert errors[0] <= 7e-3 * x.norm()
