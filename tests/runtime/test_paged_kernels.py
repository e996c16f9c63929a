"""The kernels that read pages: in Triton's interpreter, compiled for devices that are not here, and on one that is."""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

from ..fuzz import LONG_ONLY
from ..interpreted import run_interpreted
from ..kernel_checks import CONSERVATIVE, LIBRARY, TOLERANCE, Case, steps
from ..kernel_compile import compile_pages
from ..page_checks import (
    FAR,
    LONG,
    MORE,
    ROTATED,
    SMALL,
    PagedCase,
    check_far_blocks,
    check_graph,
    check_rotation,
    run_case,
)


def test_kernels_over_pages_in_the_interpreter_are_the_reference() -> None:
    run_interpreted("tests.page_checks")


@LONG_ONLY
def test_programs_that_read_many_pages_of_three_tiers_in_the_interpreter_are_the_reference() -> None:
    run_interpreted("tests.page_checks", *range(len(SMALL), len(SMALL) + len(LONG)))


def test_kernels_over_pages_of_several_tiers_compile_without_a_device() -> None:
    case = Case(head_dim=128, group=7, key_bits=2, value_bits=4, sliding_window=200, steps=steps(1))
    compiled = compile_pages(case, 90, highest=2)
    names = {"rotate", "append", "sort", "decode", "merge", "unpack", "prefill", "lower"}
    assert names == {name.split()[0] for name in compiled}
    assert all(kernel.asm["cubin"] for kernel in compiled.values())
    assert "mma.sync" in compiled["decode"].asm["ptx"], "the matrix unit does the products"


@LONG_ONLY
@pytest.mark.parametrize("highest", [1, 4])
def test_kernels_over_pages_compile_without_a_device(highest: int) -> None:
    compiled = compile_pages(Case(head_dim=128, group=7, key_bits=2, value_bits=2, steps=steps(1)), 90, highest=highest)
    assert all(kernel.asm["cubin"] for kernel in compiled.values())


LENGTHS = [
    ((150, 1, 0), (1, 70, 0), (1, 1, 290), (1, 1, 1)),
    ((400, 40), (1, 290), (64, 1), (1, 1)),
    ((1, 1, 1, 1, 1), (63, 64, 65, 200, 2), (1, 1, 1, 1, 1)),
]


def covering() -> list[PagedCase]:
    """Every head_dim with either axis and several groups, every pair of widths thrice."""
    cases = list(MORE)
    widths = list(itertools.product((16, 8, 4, 2), repeat=2))
    shapes = itertools.product((64, 80, 96, 128, 256), ("token", "channel"))
    for number, (head_dim, axis) in enumerate(shapes):
        for turn in range(5):
            at = 5 * number + turn
            layer = Case(
                head_dim=head_dim,
                key_axis=axis,
                group=(1, 3, 4, 7, 8)[turn],
                key_bits=widths[at % 16][0],
                value_bits=widths[at % 16][1],
                block=(64, 128)[at % 2],
                window=(64, 128, 200)[at % 3] if at % 2 == 0 else 128,
                sink=(0, 4, 70)[at % 3],
                heads=1 + turn % 2,
                dtype=(torch.float16, torch.bfloat16)[number % 2],
                max_len=500,
            )
            if turn == 3:
                layer = dataclasses.replace(layer, sliding_window=150 + 40 * (number % 3), sink=0)
            if turn >= 3:
                layer = dataclasses.replace(layer, softcap=(None, 5.0)[number % 2], has_sinks=number % 3 == 0)
            cases.append(PagedCase(layer, LENGTHS[at % 3], row_block=(1, 8, 64)[at % 3], exact=at % 9 == 8))
    return cases


def with_history() -> list[PagedCase]:
    """Prompts in chunks whose history the library reads, beside sequences with few tokens and with none."""
    lengths = ((330, 1, 70), (140, 65, 0), (1, 190, 100), (190, 1, 1))
    shapes = zip((64, 80, 96, 128, 256, 128), (1, 2, 3, 5, 7, 8), strict=True)
    return [
        PagedCase(
            Case(
                head_dim=head_dim,
                group=group,
                heads=1 + group % 2,
                key_axis=("token", "channel")[group % 2],
                dtype=(torch.float16, torch.bfloat16)[group % 2],
                block=(64, 128)[group == 7],
                window=128,
                sink=(0, 4, 70)[group % 3],
                has_sinks=group == 3,
                max_len=720,
            ),
            lengths,
            tuning=LIBRARY,
        )
        for head_dim, group in shapes
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("case", with_history(), ids=lambda case: f"{case.layer.head_dim} x {case.layer.group}")
def test_history_in_pages_read_by_the_library_on_the_device_is_the_reference(case: PagedCase) -> None:
    assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", covering(), ids=lambda case: "exact" if case.exact else "packed")
def test_kernels_over_pages_on_the_device_are_the_reference(case: PagedCase) -> None:
    assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


def with_tiers() -> list[PagedCase]:
    """Batches that have pages of all tiers, of all widths that may have some, and of one that has none. Programs read
    few pages, or many and then a share of each of three tiers."""
    widths = ((2, 2), (4, 4), (4, 2), (2, 4))
    cases = []
    for number, ((key_bits, value_bits), axis) in enumerate(itertools.product(widths, ("token", "channel"))):
        layer = Case(
            head_dim=(64, 96, 128)[number % 3],
            group=(3, 7, 8)[number % 3],
            heads=1 + number % 2,
            key_axis=axis,
            key_bits=key_bits,
            value_bits=value_bits,
            dtype=(torch.float16, torch.bfloat16)[number % 2],
            sink=(0, 4, 70)[(number + 1) % 3],
            softcap=(None, 5.0)[number % 4 == 1],
            has_sinks=number % 4 == 2,
            sliding_window=(150, None)[number % 3 > 0],
            max_len=720,
        )
        lengths = ((330, 1, 70), (140, 65, 0), (1, 190, 100), (190, 1, 1), (1, 1, 1))
        cases.append(PagedCase(layer, lengths, tuning=(LIBRARY, CONSERVATIVE)[number % 2], tiers=True))
    others = [
        Case(head_dim=256, group=1, key_bits=2, value_bits=2, block=128, window=128, max_len=720),
        Case(head_dim=64, group=12, key_bits=4, value_bits=4, max_len=720),
        Case(key_bits=8, value_bits=4, max_len=720),
    ]
    cases += [PagedCase(layer, ((530, 1), (1, 270), (1, 1)), tiers=True) for layer in others]
    for bits, axis in ((2, "channel"), (2, "token"), (4, "channel")):
        layer = Case(head_dim=128, group=7, heads=1, key_bits=bits, value_bits=bits, key_axis=axis, max_len=2510)
        cases.append(PagedCase(layer, ((2500,), (1,), (1,)), tiers=True, two_programs=True))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize("case", with_tiers(), ids=lambda case: f"K{case.layer.key_bits} V{case.layer.value_bits}")
def test_pages_of_several_tiers_on_the_device_are_the_reference(case: PagedCase) -> None:
    assert max(run_case(case, torch.device("cuda"))) < TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("case", FAR, ids=lambda case: f"{case.layer.key_bits} bits")
def test_further_blocks_are_found_behind_more_bytes_than_32_bits_count(case: PagedCase) -> None:
    check_far_blocks(case, torch.device("cuda"))


@pytest.mark.gpu
def test_a_graph_reads_pages_of_several_tiers_where_they_lie_when_it_is_replayed() -> None:
    layer = Case(key_bits=2, value_bits=2, max_len=720)
    check_graph(PagedCase(layer, ((600, 300), (1, 1)), tiers=True), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ROTATED, ids=lambda case: str(case.dtype))
def test_keys_and_queries_are_rotated_on_the_device(case: Case) -> None:
    check_rotation(case, torch.device("cuda"))
