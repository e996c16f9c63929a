"""What lies where in a pool: everything has a place, places do not overlap, and a sequence takes what was promised."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from pmkvq_compiler.runtime.plan import ALIGNMENT, LayerPlan, flushed_blocks, original_bytes, sequence_bytes
from pmkvq_compiler.runtime.vllm.layout import MOST_ROW_GROUPS, PagedLayer, offsets, pool_of

LAYER = LayerPlan(8, 128, 128, 4, 2, "channel", 4, 128, 64, None, ((4, 2),), 0)


def models() -> dict[str, tuple[list[PagedLayer], list[range]]]:
    """Layers of several models, and their pipeline stages."""
    rng = random.Random(0)
    widths = list(itertools.product((8, 4, 2), (8, 4, 2)))

    def mixed(count: int, sights: tuple[int | None, ...] = (None,), block: int = 64) -> list[PagedLayer]:
        made = []
        for index in range(count):
            bits, window = rng.choice(widths), rng.choice((64, 96, 128, 192, 256))
            sight = sights[index % len(sights)]
            sink = 4 if sight is None else 0
            one = replace(LAYER, stages=(bits,), key_bits=bits[0], value_bits=bits[1], window=max(window, block))
            made.append(PagedLayer(replace(one, sliding_window=sight, sink=sink, block=block), 8, 2))
        return made

    exact = replace(LAYER, stages=(), key_bits=16, value_bits=16, sink=0, window=4096)
    return {
        "one layer": (mixed(1), [range(1)]),
        "mixed": (mixed(30), [range(30)]),
        "blocks of 128": (mixed(28, block=128), [range(28)]),
        "mostly sliding": (mixed(24, (512, 512, 512, 512, 512, None)), [range(24)]),
        "all sliding": (mixed(8, (1024,)), [range(8)]),
        "some layers as they are": ([*mixed(6), PagedLayer(exact, 8, 2), *mixed(5)], [range(12)]),
        "stages": (mixed(20), [range(0, 7), range(7, 14), range(14, 20)]),
        "one head a rank": ([replace(layer, heads=1) for layer in mixed(80)], [range(80)]),
    }


MODELS = models()


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_a_place_of_its_own(name: str) -> None:
    layers, stages = MODELS[name]
    pool = pool_of(layers, 8192, stages)
    pages = [index for group in pool.groups if group.kind == "pages" for index in group.layers]
    rows = [index for group in pool.groups if group.kind == "rows" for index in group.layers]
    assert sorted(pages) == list(range(len(layers)))
    assert sorted(rows) == [index for index, layer in enumerate(layers) if not layer.exact]
    for group, stage in itertools.product(pool.groups, stages):
        taken = 0
        for index, start in sorted(offsets(group, layers, stage).items(), key=lambda item: item[1]):
            size = layers[index].page_bytes if group.kind == "pages" else group.block * layers[index].row_bytes
            assert start == taken
            assert start % ALIGNMENT == 0
            taken += size
        assert taken <= pool.block_bytes


@pytest.mark.parametrize("name", MODELS)
def test_groups_keep_what_their_layers_need(name: str) -> None:
    layers, stages = MODELS[name]
    pool = pool_of(layers, 8192, stages)
    block = layers[0].plan.block
    assert sum(group.kind == "rows" for group in pool.groups) <= MOST_ROW_GROUPS
    for group in pool.groups:
        assert block % group.block == 0, "blocks of a page's tokens are the unit of the scheduler"
        assert pool.block_bytes % (group.block * ALIGNMENT) == 0
        for index in group.layers:
            needed = layers[index].window if group.kind == "rows" else layers[index].plan.sliding_window
            assert (group.window is None) == (needed is None)
            assert needed is None or group.window is None or group.window >= needed


@pytest.mark.parametrize("max_len", [100, 2048, 32768])
def test_a_pool_is_charged_for_no_less_than_the_plan_and_little_more(max_len: int) -> None:
    layers, _ = MODELS["mixed"]
    pool = pool_of(layers, max_len)
    charged = pool.block_bytes * pool.blocks_per_sequence(max_len, 2048)
    final = sum(sequence_bytes(layer.plan, max_len, 2) for layer in layers)
    assert charged >= 0.9 * final, "pages of the window are codes, too, but a window in use is not always full"
    if max_len >= 2048:
        assert charged <= 1.25 * final
    assert pool.tokens(1 << 30, max_len, 2048) == int(
        (1 << 30) // pool.block_bytes / charged * pool.block_bytes * max_len
    )


def test_four_bits_hold_three_and_a_half_times_the_tokens_of_sixteen() -> None:
    """30 layers of 3 heads of 64, 8,192 tokens a request."""
    plan = replace(LAYER, num_key_value_heads=3, key_head_dim=64, value_head_dim=64, value_bits=4, stages=((4, 4),))
    pool = pool_of([PagedLayer(plan, 3, 2)] * 30, 8192)
    plain = (256 << 20) // (30 * original_bytes(plan, 16)) * 16
    assert pool.tokens(256 << 20, 8192, 512) >= 3.4 * plain


def test_a_query_sees_codes_up_to_where_the_cache_stands_with_its_token() -> None:
    layer = PagedLayer(replace(LAYER, window=100), 8, 2)
    for position in range(1000):
        assert layer.quantized_until(position) == 4 + 64 * flushed_blocks(layer.plan, position + 1)
        assert (
            layer.whole_blocks(position) * 64 + 4 >= min(layer.quantized_until(position), position + 1) or position < 4
        )


def test_ranks_share_heads_and_blocks_shrink_with_them() -> None:
    layers, _ = MODELS["mixed"]
    whole = pool_of(layers, 4096)
    half = pool_of([replace(layer, heads=4) for layer in layers], 4096)
    assert half.groups == whole.groups
    assert half.block_bytes == pytest.approx(whole.block_bytes / 2, rel=0.01)
