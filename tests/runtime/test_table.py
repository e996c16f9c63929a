"""The table of pages' further blocks is what the host has told last, however many rows a step has."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from pmkvq_compiler.runtime.vllm.table import AT_ONCE, Table
from pmkvq_compiler.runtime.vllm.tiers import ROW

BLOCKS = 300


def random_rows(rng: random.Random, count: int) -> list[tuple[int, ...]]:
    """Rows of so many pages, each of which has 0, 1 or 3 further blocks."""
    rows = []
    for page in rng.sample(range(1, BLOCKS), count):
        further = [rng.randrange(1, BLOCKS) for _ in range(rng.choice((0, 1, 3)))]
        rows.append((page, *further, *[0] * (ROW - 1 - len(further))))
    return rows


@pytest.mark.parametrize("inference", [False, True])
def test_the_table_is_what_was_told_last(inference: bool) -> None:
    """Steps of few rows follow such of many, of which nothing may be written a second time."""
    rng, expected = random.Random(0), torch.zeros(BLOCKS, ROW - 1, dtype=torch.int32)
    table = Table(BLOCKS, torch.device("cpu"), in_flight=2)
    with torch.inference_mode(inference):
        for count in (1, AT_ONCE, 2, AT_ONCE - 1, AT_ONCE + 1, BLOCKS - 1, *(rng.randrange(1, 20) for _ in range(20))):
            rows = random_rows(rng, count)
            told = table.told(array("q", [number for row in rows for number in row]))
            assert told.rows[:count].tolist() == [list(row) for row in rows]
            told.note()
            for page, *further in rows:
                expected[page] = torch.tensor(further)
            assert torch.equal(table.ties, expected)


def test_a_step_is_told_in_one_copy_and_one_write() -> None:
    """On a GPU each would be a launch, and whatever a launch needs anew takes as long."""
    table = Table(BLOCKS, torch.device("cpu"))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        table.told(array("q", (7, 8, 0, 0))).note()
    called = [event.name for event in profile.events() if event.cpu_parent is None]
    assert called == ["aten::copy_", "aten::index_copy_"]
