"""The generated kernels: in Triton's interpreter, compiled for devices that are not here, and on a device that is."""

import dataclasses
import itertools
import re

import pytest
import torch

from pmkvq_compiler.runtime.errors import InputError
from pmkvq_compiler.runtime.kernels import check_kernels, lowering_order, splits_of
from pmkvq_compiler.runtime.plan import CODE_BITS

from .plans import layer_plan

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from ..fuzz import LONG_ONLY
from ..interpreted import run_interpreted
from ..kernel_checks import (
    CONSERVATIVE,
    LIBRARY,
    RAGGED,
    RAGGED_HISTORY,
    TOLERANCE,
    Case,
    render_module,
    run_case,
    steps,
)
from ..kernel_compile import compile_case, compile_kernel, signature


def test_kernels_in_the_interpreter_equal_float64() -> None:
    run_interpreted("tests.kernel_checks")


@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        pytest.param(80, {"head_dim": 64, "group": 3, "key_bits": 2, "value_bits": 2}, marks=LONG_ONLY),
        (90, {"head_dim": 128, "group": 7, "key_bits": 2, "value_bits": 4}),
        (
            100,
            {
                "head_dim": 80,
                "group": 4,
                "key_bits": 8,
                "value_bits": 8,
                "key_axis": "token",
                "block": 128,
                "window": 128,
            },
        ),
    ],
)
def test_kernels_compile_without_a_device(capability: int, changes: dict[str, object]) -> None:
    compiled = compile_case(Case(steps=steps(1), **changes), capability)
    assert {"append", "lower", "decode", "merge", "prefill"} <= {name.split()[0] for name in compiled}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
    decode = compiled["decode"].asm["ptx"]
    assert "mma.sync" in decode, "the matrix unit does the products"
    assert not re.search(r"cvt\.rn\.f\d+\.[su](8|16)", decode), "codes become operands without a conversion"


@pytest.mark.parametrize("name", ["append", "lower", "decode", "merge", "prefill", "unpack", "halve"])
def test_no_variant_is_compiled_for_a_count(name: str) -> None:
    """Layers have other windows, rings and splits, and so has every batch: one variant of a kernel serves them all."""
    kernel = getattr(render_module(Case(steps=steps(1))), name)
    types = signature([one.name for one in kernel.params if not one.is_constexpr], torch.float16, {})
    counts = {argument for argument, kind in types.items() if kind == "i32"}
    assert counts & {"batch_size", "columns"}
    assert {one.name for one in kernel.params if one.do_not_specialize} == counts


@pytest.mark.parametrize("wide", CODE_BITS[:-1])
def test_lowering_takes_two_masks_and_a_shift_for_a_word(wide: int) -> None:
    case = Case(head_dim=128, key_bits=wide // 2, value_bits=wide // 2, steps=steps(1))
    widths = {"KEY_BITS": wide, "VALUE_BITS": wide, "KEY_TARGET": wide // 2, "VALUE_TARGET": wide // 2}
    text = compile_kernel(render_module(case).lower, case, 90, 8, **widths).asm["ptx"]
    stored = sum(int(count) for count in re.findall(r"st\.global\.v(\d)\.b32", text))
    addressing = 4
    assert stored >= 4
    assert len(re.findall(r"\band\.b32", text)) <= 2 * stored + addressing
    assert len(re.findall(r"\bshr\.u32", text)) <= stored + addressing
    assert "mad.lo" not in text, "no code is divided"


@pytest.mark.parametrize(("wide", "narrow"), [(33280, 17152), (17152, 12800), (9216, 9088)])
@pytest.mark.parametrize("live", [0, 1, 2, 37, 1000])
def test_lowering_never_writes_over_what_is_still_to_be_read(live: int, wide: int, narrow: int) -> None:
    runs = list(lowering_order(live, wide, narrow))
    assert [slot for run in runs for slot in range(*run)] == list(range(live))
    for first, last in runs:
        for slot in range(first, last):
            unread = [other for other in range(first, live) if other != slot]
            written = (slot * narrow, (slot + 1) * narrow)
            assert all(written[1] <= other * wide or written[0] >= (other + 1) * wide for other in unread)


@pytest.mark.parametrize("places", [1056, 1320, 1584, 640])
@pytest.mark.parametrize("heads", [1, 4, 8, 32, 128, 600, 2400])
@pytest.mark.parametrize("blocks", [0, 1, 2, 62, 511, 4096])
def test_a_cache_is_divided_among_all_programs_that_a_device_runs_at_once(heads: int, blocks: int, places: int) -> None:
    splits, parts = splits_of(heads, blocks, 132, places)
    assert parts == splits + 9
    assert 1 <= splits <= max(1, blocks)
    longest, waves = -(-blocks // splits), -(-heads * splits // places)
    best = max(blocks * heads / places, min(blocks, 1))  # if every part could be cut anywhere
    assert waves * longest <= 1.3 * best + 2, "nobody waits for a few long parts"
    if 16 * heads <= places:
        assert waves == 1, "no part waits for another one to end"
        assert splits == 1 or -(-blocks // (splits - 1)) > longest, "fewer parts would be as fast"


@pytest.mark.parametrize("heads", [1, 4, 8, 128, 600])
@pytest.mark.parametrize("rows", [1000, 4224, 32768, 262144])
def test_rows_of_layers_that_quantize_nothing_are_divided_among_programs(heads: int, rows: int) -> None:
    """Every part costs the merge as much as its 16 rows cost the program that reads them."""
    places = 1056
    _, parts = splits_of(heads, 0, rows, places)
    steps = -(-rows // 16)
    longest, waves = -(-steps // (parts - 1)), -(-heads * parts // places)
    assert parts - 1 <= max(16, places // heads)
    assert waves * longest <= 2 * max(1, steps * heads / places) + 2


def test_the_merge_of_many_parts_holds_no_more_of_them_than_the_registers_do() -> None:
    case, at_once = Case(head_dim=128, steps=steps(1)), 256
    text = compile_kernel(render_module(case).merge, case, 90, 4, SPLITS_PADDED=8192, CHUNK=at_once).asm["ptx"]
    loads = len(re.findall(r"ld\.global\.v4\.b32", text))  # of a lane; a program has 128, and takes 32 channels
    assert 0 < 4 * 128 * loads <= 2 * at_once * 32


def test_blocks_that_kernels_cannot_read_are_refused() -> None:
    check_kernels(layer_plan(block=64))
    check_kernels(layer_plan(stages=(), block=16))
    for block in (16, 32, 96):
        with pytest.raises(InputError, match=f"a block of {block} tokens"):
            check_kernels(layer_plan(block=block, window=128))


WIDTHS = list(itertools.product(CODE_BITS, repeat=2))
LENGTHS = [steps(190, 1, 130, 1), RAGGED, steps(400, 1, 1), steps(1, 1, 250, 1, 64, 1)]


def covering() -> list[Case]:
    """Every head_dim with either axis and several groups, every pair of widths thrice."""
    cases = []
    shapes = itertools.product((64, 80, 96, 128, 256), ("token", "channel"))
    for number, (head_dim, axis) in enumerate(shapes):
        for turn in range(5):
            at = 5 * number + turn
            key_bits, value_bits = WIDTHS[at % len(WIDTHS)]
            case = Case(
                head_dim=head_dim,
                key_axis=axis,
                group=(1, 3, 4, 7, 8)[turn],
                key_bits=key_bits,
                value_bits=value_bits,
                block=(64, 128)[at % 2],
                window=(64, 128, 200)[at % 3] if at % 2 == 0 else 128,
                sink=(0, 4)[turn % 2],
                heads=1 + turn % 2,
                dtype=(torch.float16, torch.bfloat16)[number % 2],
                steps=LENGTHS[at % 4],
                direct=turn % 2 == 0,
            )
            if turn == 3:
                case = dataclasses.replace(case, sliding_window=150 + 40 * (number % 3), sink=0)
            if turn >= 3:
                case = dataclasses.replace(case, softcap=(None, 5.0)[number % 2], has_sinks=number % 3 == 0)
            cases.append(case)
    long = {"head_dim": 128, "group": 7, "key_bits": 2, "value_bits": 2, "window": 128, "max_len": 33000}
    cases += [Case(**long, key_axis=axis, steps=steps(32700, 1, 1), direct=True) for axis in ("token", "channel")]
    ragged = ((slice(0, 32700), slice(32699, 32700), slice(0, 9000)), *(((slice(0, 1),) * 3,) * 2))
    cases.append(Case(**{**long, "key_bits": 4, "value_bits": 4}, steps=ragged))
    cases.append(Case(**{**long, "key_bits": 8, "value_bits": 8}, sliding_window=4096, sink=0, steps=steps(20000, 1)))
    return cases


def with_history() -> list[Case]:
    """Prompts in chunks whose history the library reads, and layers that it cannot serve."""
    chunks = steps(330, 1, 140, 65, 190)
    cases = [
        Case(
            head_dim=head_dim,
            group=group,
            key_bits=bits[0],
            value_bits=bits[1],
            key_axis=axis,
            heads=1 + group % 2,
            dtype=dtype,
            has_sinks=group == 3,
            max_len=820,
            steps=chunks,
            tuning=LIBRARY,
        )
        for (head_dim, group, axis, dtype), bits in zip(
            (
                (64, 1, "token", torch.float16),
                (80, 2, "channel", torch.bfloat16),
                (96, 3, "token", torch.bfloat16),
                (128, 4, "channel", torch.float16),
                (128, 5, "token", torch.bfloat16),
                (256, 6, "channel", torch.bfloat16),
                (128, 7, "channel", torch.bfloat16),
                (64, 8, "channel", torch.float16),
            ),
            WIDTHS[::2],
            strict=True,
        )
    ]
    cases += [Case(heads=heads, group=3, steps=RAGGED_HISTORY, tuning=LIBRARY) for heads in (1, 2)]
    cases.append(Case(block=128, window=200, max_len=820, steps=chunks, tuning=LIBRARY))
    cases += [
        Case(softcap=5.0, max_len=820, steps=chunks, tuning=LIBRARY),
        Case(sliding_window=300, window=128, max_len=820, steps=chunks, tuning=LIBRARY),
        Case(dtype=torch.float32, key_bits=8, max_len=820, steps=chunks, tuning=LIBRARY),
    ]
    long = {"head_dim": 128, "group": 7, "heads": 2, "window": 128, "dtype": torch.bfloat16, "max_len": 33000}
    whole = dataclasses.replace(CONSERVATIVE, library_unit=512)
    ragged = (
        (slice(0, 20000), slice(19000, 20000), slice(0, 9000)),
        (slice(0, 4096), slice(1000, 4000), slice(0, 700)),
    )
    for bits in (2, 8):
        widths = {"key_bits": bits, "value_bits": bits, "direct": True}
        cases.append(Case(**long, **widths, steps=steps(20000, 1, 4096, 4000, 1), tuning=whole))
    cases.append(Case(**long, steps=ragged, tuning=whole))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize("case", with_history(), ids=str)
def test_history_read_by_the_library_on_the_device_equals_float64(case: Case) -> None:
    assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


@pytest.mark.gpu
def test_history_read_by_the_library_in_a_stream_of_ones_own_equals_float64() -> None:
    """The library's second stream waits for that one, and that one for it."""
    case = Case(steps=RAGGED_HISTORY, heads=2, group=3, tuning=LIBRARY)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", covering(), ids=str)
def test_kernels_on_the_device_equal_float64(case: Case) -> None:
    assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


def test_heads_that_are_too_wide_for_the_kernels_are_refused() -> None:
    check_kernels(layer_plan(key_head_dim=512, value_head_dim=512))
    with pytest.raises(InputError, match=r'head_dim 576 is more than 512.*load with backend="reference"'):
        check_kernels(layer_plan(key_head_dim=576, value_head_dim=512))
