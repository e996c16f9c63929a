"""In how many blocks each page of a pool lies: the books, which know nothing of vLLM.

A page that is quantized lies in a block of its own. While blocks are idle it is lent further ones, one or three, and
lies in two or four: that is its *tier*. Its codes have as many times the plan's final bits. When blocks are needed,
pages *fall* to half of their tier: they drop the lower half of their bits, and half of their blocks with it. The worker
codes them anew before it runs the next step.

Pages fall in this order: those that nobody owns, which are only kept for requests that may come, before others; of
these those of the highest tier, whose lowest bits are worth least; and of these the oldest.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from .layout import TIERS

TOLD = "pmkvq_tiers"
"""The attribute of vLLM's `SchedulerOutput` in which workers find `Changes`."""

ROW = TIERS[-1]
"""The blocks that a page may have."""

FILLING = tuple((0,) * (ROW - 1 - count) for count in range(ROW))
"""What follows so many further blocks in a row."""


@dataclass(frozen=True)
class Changes:
    """What workers must know before a step. `rows` have ROW numbers of 64 bits each, one row behind the other: the
    block of a page and all its further blocks, 0 where it has none. The first ones are of pages that have fallen, group
    by group: `fallen` are groups and how many these are."""

    rows: array[int]
    fallen: list[tuple[int, int]]


@dataclass(slots=True, eq=False)
class Page:
    """A quantized page in a block, of a group of layers, and its further blocks: 0, 1 or 3, at most `limit`. Of `told`
    of them workers know, None before they know of the page."""

    block: int
    group: int
    limit: int
    owned: bool = True
    further: list[int] = field(default_factory=list)
    told: int | None = None

    @property
    def height(self) -> int:
        """How often the page can fall: it lies in 2 ** height blocks."""
        return len(self.further).bit_length()


class Tiers:
    """The books of a pool whose groups have pages of up to so many further blocks (`limits`)."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits, self.most = limits, max(limits, default=0)
        self.pages: dict[int, Page] = {}
        self.lent = 0
        """Further blocks of all pages."""
        self.lowered = 0
        """How often pages fell that somebody owns."""
        self.counts = [[0] * (limit.bit_length() + 1) for limit in limits]
        """Pages that somebody owns, of every group, by their height."""
        self._top = self.most.bit_length()
        self._falling = [OrderedDict[int, Page]() for _ in range(2 * self._top)]
        """By their turn, the pages that will fall from a height at last. One that is higher is among those of lower
        heights, too, and keeps its age there."""
        self._changed: dict[int, Page] = {}
        """What workers must be told of, also of pages that were forgotten: kernels would write what lies in their block
        next into their further blocks, too."""

    def add(self, block: int, group: int) -> Page:
        """Note that a block is a page from now on, which somebody owns."""
        page = self.pages[block] = Page(block, group, self.limits[group])
        self.counts[group][0] += 1
        if block in self._changed:
            self._changed[block] = page
        return page

    def lend(self, pages: Sequence[Page], blocks: Sequence[int]) -> None:
        """Lift pages, which were quantized in this step and are all as high, to the next tier. Each gets as many of
        these blocks as any other, one or two."""
        number, first = len(blocks) // len(pages), 0
        falling, changed = self._falling[self.turn(True, number)], self._changed
        for page in pages:
            page.further += blocks[first : first + number]
            first += number
            counts = self.counts[page.group]
            counts[number - 1] -= 1
            counts[number] += 1
            falling[page.block] = changed[page.block] = page
        self.lent += first

    def turn(self, owned: bool, height: int) -> int:
        """When it is the turn of pages to fall from a height: 0 comes first."""
        return self._top * owned + self._top - height

    def fall(self, number: int, before: int | None = None) -> list[int]:
        """Lower pages, those that lose least first, until they have given back so many blocks, or one more: which these
        are. There are fewer where no other page's turn comes `before` this one."""
        given: list[int] = []
        for turn, falling in enumerate(self._falling[:before]):
            owned, height = divmod(turn, self._top)
            height = self._top - height
            left = (1 << height - 1) - 1
            while falling and len(given) < number:
                block, page = falling.popitem(last=False)
                given += page.further[left:]
                del page.further[left:]
                counts = self.counts[page.group]
                counts[height] -= owned
                counts[height - 1] += owned
                self.lowered += owned
                self._changed[block] = page
        self.lent -= len(given)
        return given

    def own(self, block: int, owned: bool) -> None:
        """Note whether somebody owns a block, should it be a page."""
        page = self.pages.get(block)
        if page is None or page.owned == owned:
            return
        for height in range(1, page.height + 1):
            del self._falling[self.turn(page.owned, height)][block]
            self._falling[self.turn(owned, height)][block] = page
        self.counts[page.group][page.height] += 1 if owned else -1
        page.owned = owned

    def forget(self, block: int) -> list[int]:
        """A block is no page any more, should it have been one: its further blocks, which hold nothing now."""
        page = self.pages.pop(block, None)
        if page is None:
            return []
        self.counts[page.group][page.height] -= page.owned
        for height in range(1, page.height + 1):
            del self._falling[self.turn(page.owned, height)][block]
        given, page.further = page.further, []
        self.lent -= len(given)
        if page.told or block in self._changed:
            self._changed[block] = page
        return given

    def changes(self) -> Changes | None:
        """What has changed since this was last asked; None where nothing has."""
        if not self._changed:
            return None
        fallen: dict[int, list[int]] = {}
        others: list[int] = []
        for block, page in self._changed.items():
            rows, count = others, len(page.further)
            if page.told is not None and self.pages.get(block) is page:
                rows = fallen.setdefault(page.group, [])
            rows += (block, *page.further, *FILLING[count])
            page.told = count
        self._changed.clear()
        counts = [(group, len(rows) // ROW) for group, rows in fallen.items()]
        return Changes(array("q", [*itertools.chain(*fallen.values()), *others]), counts)
