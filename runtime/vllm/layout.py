"""What lies where in a pool of blocks: the byte counts of a plan that is served in pages.

A pool has blocks of one size, and any block may hold any of three things, for a *group* of layers:

    pages, all tokens     the records of `block` tokens of each layer, or these tokens themselves in layers that are
                          never quantized
    pages, a window       the same, of layers whose attention sees a sliding window
    rows                  fewer tokens of each layer in the model's dtype: those that are not quantized yet

A sequence takes blocks of every group. What it is charged is therefore counted in blocks, which `Pool` does; the
report of a compile and the server both ask here.

Records are those of the single-process cache: blocks of a sequence begin behind its sink. Record `i` lies in page `i +
sink_pages`, the page in which its last token lies, so that what a page holds never depends on tokens behind it and
sequences that begin alike can share pages. The pages before it hold the sink.

Where a server is progressive, a page may lie in several blocks: its own and *further* ones, as many as its *tier* says.
In `n` blocks its codes have `n` times the plan's final bits, and each block has an `n`-th of its tokens, whose codes
begin where they do in a page of one block. Ranges and middles of all its tokens stay in its own block. The parts of all
layers of a group lie alike. A layer that is in no need of so many bits uses the first of these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..plan import ALIGNMENT, CachePlan, LayerPlan, block_bytes, blocks_needed

MOST_ROW_GROUPS = 4
"""Groups of rows at most."""

MOST_PARTS = 8
"""Parts at most into which the largest group of pages is cut."""

GROUP_COST = 0.01
"""What a group must save, as a share of all bytes, to be worth its block table in every step."""

WINDOWS_WHILE_READING = 3
"""Windows of rows that a sequence takes while its prompt is read: what this step reads, what the next one will, and,
where vLLM schedules a step ahead, what the step before has not given back yet."""

WIDEST = 8
"""Bits of the codes of the highest tiers; with so many a text is that of the model's own dtype."""

TIERS = (1, 2, 4)
"""In how many blocks a page may lie."""

ENDLESS = 1 << 40


def tiers_to(highest: int) -> list[int]:
    """The tiers up to the highest one that a page may have."""
    return [tier for tier in TIERS if tier <= highest]


@dataclass(frozen=True)
class PagedLayer:
    """A layer of a plan on one rank, which has `heads` of its key/value heads, in a dtype of `itemsize` bytes."""

    plan: LayerPlan
    heads: int
    itemsize: int

    @cached_property
    def exact(self) -> bool:
        """Whether the layer is never quantized, however long a sequence grows."""
        return not self.plan.quantized or blocks_needed(self.plan, ENDLESS) == 0

    @property
    def window(self) -> int:
        """The most recent tokens that rows are kept of. A block must be whole before its first token leaves them."""
        return max(self.plan.window, self.plan.block)

    @property
    def token_bytes(self) -> int:
        """Bytes of a token of one head in the model's dtype."""
        return (self.plan.key_head_dim + self.plan.value_head_dim) * self.itemsize

    @cached_property
    def sink_pages(self) -> int:
        return 0 if self.exact else -(-self.plan.sink // self.plan.block)

    @property
    def record_bytes(self) -> int:
        """Bytes of a page of one head: a record, or as many tokens of the sink as a page may have."""
        plan = self.plan
        if self.exact:
            return _aligned(plan.block * self.token_bytes, ALIGNMENT)
        sink = min(plan.sink, plan.block) * self.token_bytes
        return _aligned(max(block_bytes(plan, plan.key_bits, plan.value_bits), sink), ALIGNMENT)

    @property
    def page_bytes(self) -> int:
        return self.heads * self.record_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's row of all heads; an exact layer has no rows, for its pages are made of them."""
        return 0 if self.exact else self.heads * self.token_bytes

    def quantized_until(self, position: int) -> int:
        """The position up to which a query at `position` sees codes; from there on it sees tokens as they are.

        In the single-process cache the oldest block leaves the window when the next token needs its place. This is
        where the blocks end there once the query's own token is in. So what a query sees depends on its position alone,
        not on which tokens are fed together.
        """
        plan = self.plan
        blocks = -(-(position + 1 - plan.sink - self.window) // plan.block)
        return plan.sink + plan.block * max(0, blocks)

    @property
    def highest_tier(self) -> int:
        """The highest of the tiers that a page may have."""
        return 1 if self.exact else max(1, WIDEST // max(self.plan.key_bits, self.plan.value_bits))

    def widths(self, tier: int) -> tuple[int, int]:
        """Bits of the codes of K and V in pages of a tier, or of the highest one where that is higher."""
        times = min(tier, self.highest_tier)
        return self.plan.key_bits * times, self.plan.value_bits * times

    def pages_between(self, cached: int, end: int) -> slice:
        """The pages that are quantized when a sequence of `cached` tokens gets `end` of them."""
        return slice(self.whole_blocks(cached) + self.sink_pages, self.whole_blocks(end) + self.sink_pages)

    def whole_blocks(self, length: int) -> int:
        """Blocks behind the sink all of whose tokens a sequence of `length` tokens has."""
        plan = self.plan
        return (length - plan.sink) // plan.block if length > plan.sink else 0


@dataclass(frozen=True)
class Group:
    """Layers (their indices) that share a block table: `block` tokens a block. `window` is how many tokens are kept;
    None keeps all."""

    kind: Literal["pages", "rows"]
    layers: tuple[int, ...]
    block: int
    window: int | None

    def blocks(self, max_len: int, in_flight: int) -> int:
        """Blocks that a sequence of `max_len` tokens takes. Pages of a window also hold tokens that are fed at once, up
        to `in_flight` of them. Of these, rows are kept only where the next token still sees them."""
        if self.window is None:
            return -(-max_len // self.block)
        if self.kind == "pages":
            return -(-min(self.window - 1 + in_flight, max_len) // self.block) + 1
        return min(-(-max_len // self.block), -(-(self.window - 1) // self.block) + 1)


@dataclass(frozen=True)
class Pool:
    """The groups of a model's layers, and the bytes of a block, which holds one of any of them."""

    groups: tuple[Group, ...]
    block_bytes: int

    def blocks_per_sequence(self, max_len: int, in_flight: int) -> int:
        return sum(group.blocks(max_len, in_flight) for group in self.groups)

    def bytes_needed(self, sequences: int, max_len: int, in_flight: int) -> int:
        """Bytes in which so many sequences of `max_len` tokens fit while the prompt of one of them is read.

        Block 0 holds nothing.
        """
        rows = sum(group.blocks(max_len, 0) for group in self.groups if group.kind == "rows")
        more = (WINDOWS_WHILE_READING - 1) * rows
        return self.block_bytes * (1 + sequences * self.blocks_per_sequence(max_len, in_flight) + more)

    def sequences(self, pool_bytes: int, max_len: int, in_flight: int) -> float:
        """How many sequences of `max_len` tokens a pool of so many bytes holds while they decode."""
        return pool_bytes // self.block_bytes / self.blocks_per_sequence(max_len, in_flight)

    def tokens(self, pool_bytes: int, max_len: int, in_flight: int) -> int:
        """The same in tokens, which is what vLLM prints as its cache's size."""
        return int(self.sequences(pool_bytes, max_len, in_flight) * max_len)


def paged_layers(plan: CachePlan, itemsize: int, ranks: int = 1) -> list[PagedLayer]:
    """The plan's layers on one of `ranks` that share its heads; where there are more ranks than heads, each has one."""
    return [PagedLayer(layer, max(1, layer.num_key_value_heads // ranks), itemsize) for layer in plan.layers]


def pool_of(layers: Sequence[PagedLayer], max_len: int, stages: Sequence[range] | None = None) -> Pool:
    """The pool that holds sequences of `max_len` tokens in the fewest bytes, or nearly so in fewer groups.

    `stages` are the layers of each pipeline stage, whose blocks are alike; all layers are one stage unless told.
    """
    stages = [range(len(layers))] if stages is None else stages
    seen = {layer.plan.sliding_window for layer in layers}
    sights = {sight: [i for i, layer in enumerate(layers) if layer.plan.sliding_window == sight] for sight in seen}
    largest = max(_widest([(i, layers[i].page_bytes) for i in indices], stages) for indices in sights.values())
    targets = dict.fromkeys(-(-largest // parts) for parts in range(1, MOST_PARTS + 1))
    pools = [pool for target in targets for pool in _pools(layers, sights, target, stages)]

    def cost(pool: Pool) -> float:
        return pool.block_bytes * pool.blocks_per_sequence(max_len, 0) * (1 + GROUP_COST * len(pool.groups))

    return min(pools, key=cost)


def _pools(
    layers: Sequence[PagedLayer], sights: dict[int | None, list[int]], target: int, stages: Sequence[range]
) -> list[Pool]:
    """Groups of pages of about `target` bytes, the blocks that hold the largest of them, and groups of rows that fit
    into such blocks, more or fewer of them."""
    block = layers[0].plan.block
    groups: list[Group] = []
    widest = 0
    for sight, indices in sorted(sights.items(), key=lambda item: (item[0] is not None, item[0])):
        whole = _widest([(i, layers[i].page_bytes) for i in indices], stages)
        count = min(len(indices), -(-whole // target))
        for part in range(count):
            members = tuple(indices[part::count])
            widest = max(widest, _widest([(i, layers[i].page_bytes) for i in members], stages))
            groups.append(Group("pages", members, block, sight))
    block_bytes = _aligned(widest, ALIGNMENT * block)
    rows = [(i, layer) for i, layer in enumerate(layers) if not layer.exact]
    return [Pool((*groups, *found), block_bytes) for found in _row_groups(rows, block, block_bytes, stages)]


def _row_groups(
    rows: list[tuple[int, PagedLayer]], block: int, block_bytes: int, stages: Sequence[range]
) -> list[list[Group]]:
    """Rows in the groups that take a sequence the fewest blocks, for every number of groups that there may be.

    A group is a run of layers in the order of their windows. It keeps the longest window of them, and has blocks of as
    many tokens as fit, a divisor of a page's.
    """
    rows = sorted(rows, key=lambda row: row[1].window)
    best: list[list[tuple[int, list[Group]]]] = [[(0, [])]]  # best[n]: the first n layers, in 0, 1, ... groups
    for end in range(1, len(rows) + 1):
        found: dict[int, tuple[int, list[Group]]] = {}
        for start in range(end):
            group = _row_group(rows[start:end], block, block_bytes, stages)
            if group is None:
                continue
            for count, (blocks, groups) in enumerate(best[start]):
                total = blocks + group.blocks(ENDLESS, 0)
                if count < MOST_ROW_GROUPS and total < found.get(count + 1, (ENDLESS, []))[0]:
                    found[count + 1] = total, [*groups, group]
        best.append([found.get(count, (ENDLESS, [])) for count in range(MOST_ROW_GROUPS + 1)])
    return [groups for blocks, groups in best[-1] if blocks < ENDLESS]


def _row_group(
    members: list[tuple[int, PagedLayer]], block: int, block_bytes: int, stages: Sequence[range]
) -> Group | None:
    """These rows as one group; None where not even one token of all of them fits a block."""
    width = _widest([(i, layer.row_bytes) for i, layer in members], stages)
    fitting = [tokens for tokens in range(1, block + 1) if block % tokens == 0 and tokens * width <= block_bytes]
    if not fitting:
        return None
    return Group("rows", tuple(sorted(i for i, _ in members)), fitting[-1], members[-1][1].window)


def _widest(members: list[tuple[int, int]], stages: Sequence[range]) -> int:
    """Bytes of (index, bytes) on the pipeline stage that has the most of them."""
    return max(sum(size for index, size in members if index in stage) for stage in stages)


def _aligned(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def offsets(group: Group, layers: Sequence[PagedLayer], stage: range) -> dict[int, int]:
    """Where each layer of a group on this pipeline stage begins in a block, in bytes."""
    found, start = {}, 0
    for index in group.layers:
        if index in stage:
            found[index] = start
            layer = layers[index]
            start += layer.page_bytes if group.kind == "pages" else group.block * layer.row_bytes
    return found


def bits_of(layers: Sequence[PagedLayer]) -> dict[int, float]:
    """Bits of a number of K and V in the pages of these layers, on average, in each of the tiers that pages may
    have."""
    numbers = sum(layer.heads * (layer.plan.key_head_dim + layer.plan.value_head_dim) for layer in layers)
    highest = max((layer.highest_tier for layer in layers), default=1)
    bits = dict.fromkeys(tiers_to(highest), 0.0)
    for layer in layers:
        for tier in bits:
            key_bits, value_bits = layer.widths(tier)
            bits[tier] += layer.heads * (layer.plan.key_head_dim * key_bits + layer.plan.value_head_dim * value_bits)
    return {tier: total / max(1, numbers) for tier, total in bits.items()}
