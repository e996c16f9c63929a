"""Which blocks of a pool are planes of which pages: the books, which know nothing of vLLM.

A page that is quantized lies in a block of its own. While blocks are idle, further ones keep its *planes*: each holds
the next lower bits of the page's codes, as many as the codes themselves have, so every plane makes the page more
precise. A page whose plane is given away is less precise from then on, and nothing else happens to it.

Planes fall in this order: those of pages that nobody owns, which are only kept for requests that may come, before
those of other pages; of these the lowest bits first, for they are worth least; and of these the oldest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

CHANGES = "pmkvq_planes"
"""The attribute of vLLM's `SchedulerOutput` in which workers find `Planes.changes` of a step."""


@dataclass
class Page:
    """A quantized page in a block, of a group of layers, and the blocks of its planes. It may have up to `limit`."""

    block: int
    group: int
    limit: int
    owned: bool = True
    planes: list[int] = field(default_factory=list)


class Planes:
    """The books of a pool whose groups have pages of up to so many planes (`limits`)."""

    def __init__(self, limits: Sequence[int]) -> None:
        self.limits, self.most = limits, max(limits, default=0)
        self.pages: dict[int, Page] = {}
        self.lowered = 0
        """Planes that were taken from pages which somebody owns."""
        self.counts = [[0] * (limit + 1) for limit in limits]
        """Pages that somebody owns, of every group, with 0, 1, ... planes."""
        self._refined: dict[int, Page] = {}
        self._falling: list[dict[int, None]] = [{} for _ in range(2 * self.most)]
        self._changed: set[int] = set()

    def __len__(self) -> int:
        return len(self._refined)

    def __contains__(self, block: int) -> bool:
        return block in self._refined

    def add(self, block: int, group: int) -> Page:
        """Note that a block is a page from now on, which somebody owns."""
        page = self.pages[block] = Page(block, group, self.limits[group])
        self.counts[group][0] += 1
        return page

    def tie(self, page: Page, plane: int) -> None:
        """Give a page its next plane."""
        self._count(page, -1)
        page.planes.append(plane)
        self._count(page, 1)
        self._refined[plane] = page
        self._falling[self.rank(page.owned, len(page.planes))][plane] = None
        self._changed.add(page.block)

    def rank(self, owned: bool, number: int) -> int:
        """The turn in which the planes of this number (1, 2, ...) fall."""
        return self.most * owned + self.most - number

    def fall(self, before: int | None = None) -> int | None:
        """Take the plane that is worth least of those whose turn comes `before` this one; None if there is none."""
        for falling in self._falling[:before]:
            if falling:
                plane = next(iter(falling))
                page = self._refined[plane]
                self.lowered += page.owned
                self._count(page, -1)
                self._untie(page)
                self._count(page, 1)
                return plane
        return None

    def own(self, block: int, owned: bool) -> None:
        """Note whether somebody owns a block, should it be a page."""
        page = self.pages.get(block)
        if page is None or page.owned == owned:
            return
        self._count(page, -1)
        for number, plane in enumerate(page.planes, start=1):
            del self._falling[self.rank(page.owned, number)][plane]
            self._falling[self.rank(owned, number)][plane] = None
        page.owned = owned
        self._count(page, 1)

    def forget(self, block: int) -> list[int]:
        """A block is no page any more, should it have been one: the blocks of its planes, which hold nothing now."""
        page = self.pages.pop(block, None)
        if page is None:
            return []
        self._count(page, -1)
        return [self._untie(page) for _ in range(len(page.planes))]

    def changes(self) -> list[tuple[int, ...]]:
        """What has changed since this was last asked: blocks of pages and of all their planes, 0 where one has none."""
        planes = {block: self.pages[block].planes if block in self.pages else [] for block in self._changed}
        self._changed.clear()
        return [(block, *own, *[0] * (self.most - len(own))) for block, own in planes.items()]

    def _untie(self, page: Page) -> int:
        plane = page.planes[-1]
        del self._falling[self.rank(page.owned, len(page.planes))][plane]
        del self._refined[plane]
        page.planes.pop()
        self._changed.add(page.block)
        return plane

    def _count(self, page: Page, change: int) -> None:
        if page.owned:
            self.counts[page.group][len(page.planes)] += change
