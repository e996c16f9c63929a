"""The books of the blocks that pages lie in: which pages fall, and what workers are told of it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from pmkvq_compiler.runtime.vllm.tiers import ROW, Changes, Page, Tiers

NOTHING = Changes(array("q"), [])


def rows_of(changes: Changes) -> list[tuple[int, ...]]:
    return [*zip(*[iter(changes.rows)] * ROW, strict=True)]


def told(tiers: Tiers) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]] | None:
    """The rows that workers are told next, and how many of each group are of pages that have fallen."""
    changes = tiers.changes()
    return changes and (rows_of(changes), changes.fallen)


def page_of(tiers: Tiers, block: int, further: Sequence[int], group: int = 0) -> Page:
    """A new page, lent its further blocks as the pool does: one, and then two more."""
    page = tiers.add(block, group)
    for some in (further[:1], further[1:]):
        if some:
            tiers.lend([page], some)
    return page


def test_pages_fall_where_it_costs_least() -> None:
    tiers = Tiers([3])
    page_of(tiers, 1, (10, 11, 12))
    page_of(tiers, 2, (20,))
    page_of(tiers, 3, (30, 31, 32))
    page_of(tiers, 4, (40, 41, 42))
    tiers.own(3, False)
    assert [tiers.fall(1) for _ in range(7)] == [[31, 32], [30], [11, 12], [41, 42], [10], [20], [40]]
    assert tiers.fall(1) == []
    assert (tiers.lowered, tiers.lent) == (5, 0), "what nobody owns is not counted"


def test_pages_fall_until_so_many_blocks_are_given_back() -> None:
    tiers = Tiers([3])
    for block in (1, 2, 3):
        page_of(tiers, block, (10 * block, 10 * block + 1, 10 * block + 2))
    assert tiers.fall(3) == [11, 12, 21, 22]
    assert tiers.fall(9) == [31, 32, 10, 20, 30]


def test_a_page_gives_way_only_to_one_that_is_worth_more() -> None:
    tiers = Tiers([3])
    page_of(tiers, 1, (10, 11, 12))
    assert tiers.fall(1, before=tiers.turn(True, 2)) == []
    assert tiers.fall(5, before=tiers.turn(True, 1)) == [11, 12]


def test_workers_are_told_of_pages_that_are_new_or_have_fallen() -> None:
    tiers = Tiers([0, 3, 1])
    tiers.add(4, 0)
    page_of(tiers, 5, (50, 51, 52), group=1)
    page_of(tiers, 6, (60,), group=2)
    assert told(tiers) == ([(5, 50, 51, 52), (6, 60, 0, 0)], [])
    assert told(tiers) is None
    assert tiers.counts == [[1], [0, 0, 1], [0, 1]]
    page_of(tiers, 7, (70,), group=1)
    assert tiers.fall(4) == [51, 52, 50, 60]
    assert told(tiers) == ([(5, 0, 0, 0), (6, 0, 0, 0), (7, 70, 0, 0)], [(1, 1), (2, 1)])
    assert tiers.counts == [[1], [1, 1, 0], [1, 0]]


def test_a_page_that_falls_twice_before_a_step_is_told_once() -> None:
    tiers = Tiers([3])
    page_of(tiers, 5, (50, 51, 52))
    tiers.changes()
    tiers.fall(3)
    assert told(tiers) == ([(5, 0, 0, 0)], [(0, 1)])


def test_a_new_page_that_falls_before_its_first_step_has_nothing_to_be_coded_anew() -> None:
    tiers = Tiers([3])
    page_of(tiers, 5, (50, 51, 52))
    tiers.fall(1)
    assert told(tiers) == ([(5, 50, 0, 0)], [])


def test_a_block_that_becomes_another_page_is_told_as_a_new_one() -> None:
    """What lies in it, and in the further blocks that workers have in their tables, is not to be coded anew."""
    tiers = Tiers([3])
    page_of(tiers, 5, (50, 51, 52))
    tiers.changes()
    tiers.fall(1)
    assert tiers.forget(5) == [50]
    page_of(tiers, 5, (9,))
    assert told(tiers) == ([(5, 9, 0, 0)], [])
    tiers.forget(5)
    tiers.add(5, 0)
    assert told(tiers) == ([(5, 0, 0, 0)], []), "it would be written into the block of the page before"
    tiers.forget(5)
    tiers.add(5, 0)
    assert told(tiers) is None


def test_workers_forget_the_further_blocks_of_a_page_that_is_forgotten() -> None:
    tiers = Tiers([3])
    page_of(tiers, 5, (50, 51, 52))
    tiers.changes()
    assert tiers.forget(5) == [50, 51, 52]
    page_of(tiers, 5, (9,))
    assert tiers.forget(5) == [9]
    assert (told(tiers), told(tiers)) == (([(5, 0, 0, 0)], []), None)
    page_of(tiers, 5, (50,))
    assert tiers.forget(5) == [50]
    assert told(tiers) == ([(5, 0, 0, 0)], []), "which costs nothing"
    assert tiers.lent == 0
