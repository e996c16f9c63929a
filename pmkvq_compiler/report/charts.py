"""The drawings of a plan, as SVG. Colours are classes of `templates/charts.css.j2`: they follow the reader's theme."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import groupby
from operator import attrgetter
from typing import Any

from pmkvq_compiler.plan.solution import PlanRow

WIDTH = 960
LEFT, RIGHT = 96, 12
PLOT = WIDTH - LEFT - RIGHT
PANELS, PANEL_GAP, PANEL_HEIGHT = 3, 30, 170
PANEL_WIDTH = (WIDTH - (PANELS - 1) * PANEL_GAP) / PANELS
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

NAMES = {"none": "as it is", "scale": "scaled", "rotate": "rotated", "match": "matched"}
"""What the transforms of K and V are called: the map of a layer multiplies each head by a matrix of that kind."""

PLAIN = ("none", "token")
"""What every layer has that nothing was chosen for: drawn hollow."""

Sample = dict[str, Any]
"""The cache at one moment: `tokens` a sequence, bytes `used` and `original` (16-bit), `bits` [[K, V], ...] and
`layer_bytes` [...] of every layer."""


def readable_bytes(count: float) -> str:
    """`22.0 MiB` and the like."""
    power = 0
    while abs(count) >= 1024 and power < len(UNITS) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.1f} {UNITS[power]}" if power else f"{count:.0f} B"


def plan_chart(rows: Sequence[PlanRow]) -> str:
    """Layers from left to right: bits of K and V as a heat map, what was folded, bytes and sensitivities as bars."""
    parts = [
        _legend({bits for row in rows for bits in (row.key_bits, row.value_bits)}),
        *_bit_cells(rows, "K bits", "key_bits", top=30),
        *_bit_cells(rows, "V bits", "value_bits", top=60),
        *_runs(rows, "K groups", "key_axis", top=98),
        *_runs(rows, "K map", "key_transform", top=118),
        *_runs(rows, "V map", "value_transform", top=138),
        *_runs(rows, "window", "window", top=158),
        *_bars(rows, "bytes", "arena_bytes", readable_bytes, top=192),
        *_bars(rows, "loss alone", "sensitivity", lambda value: f"{value:.2g}", top=268),
        *_layer_axis(len(rows), top=346),
    ]
    return _svg(parts, height=362, label="The plan: bits, groups, folds, windows, bytes and losses of every layer")


def filling_chart(trace: list[Sample], budget: int) -> str:
    """Tokens from left to right: bytes of the whole cache against the budget, and below them every layer's bits."""
    layers = len(trace[0]["bits"])
    row_height = min(14.0, max(4.0, 260 / layers))
    heat_top = 300
    height = heat_top + round(layers * row_height) + 42
    parts = [
        _legend({bits for sample in trace for pair in sample["bits"] for bits in pair}),
        *_filling(trace, budget, top=34, bottom=heat_top - 24),
        *_falling_bits(trace, heat_top, row_height),
        *_token_axis(trace[-1]["tokens"], top=height - 42),
    ]
    return _svg(parts, height, label="Bytes of the cache and bits of every layer while tokens come in")


def layers_chart(rows: Sequence[PlanRow], trace: list[Sample]) -> str:
    """A panel for each kind of layer: its bytes against its share, and its bits, while tokens come in."""
    kinds = list(_alike(rows, trace))
    parts = [_legend({bits for sample in trace for pair in sample["bits"] for bits in pair})]
    for place, layers in enumerate(kinds):
        down, across = divmod(place, PANELS)
        parts += _panel(rows, trace, layers, across * (PANEL_WIDTH + PANEL_GAP), 34 + down * PANEL_HEIGHT)
    height = 34 + -(-len(kinds) // PANELS) * PANEL_HEIGHT
    return _svg(parts, height, label="Bytes and bits of each kind of layer while tokens come in")


def comparison_chart(original: float, reserved: float) -> str:
    """The bytes at 16 bits a number and those of the plan, one bar above the other."""
    widest = max(original, reserved)
    parts = []
    for place, (name, count, kind) in enumerate((("16 bits", original, "strip"), ("this plan", reserved, "share"))):
        y, width = 6 + 34 * place, max(2.0, (PLOT - 110) * count / widest)
        parts += [
            _row_label(y + 17, name),
            _rect(LEFT, y, width, 26, kind, f"{name}: {readable_bytes(count)}"),
            _text(LEFT + width + 8, y + 18, readable_bytes(count), anchor="start"),
        ]
    return _svg(parts, height=72, label="The cache at 16 bits a number, and as planned")


def _svg(parts: Iterable[str], height: int, label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {WIDTH} {height}" role="img"'
    return "\n".join([f'{head} aria-label="{escape(label)}">', *parts, "</svg>"])


def _rect(x: float, y: float, width: float, height: float, kind: str, title: str) -> str:
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {place} class="{kind}"><title>{escape(title)}</title></rect>'


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x:.2f}" y="{y:.2f}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def _row_label(y: float, content: str) -> str:
    return _text(LEFT - 10, y, content, anchor="end")


def _shade(bits: int) -> str:
    return f"bits{min(bits, 16)}"


def _legend(widths: Iterable[int]) -> str:
    parts = [_text(LEFT, 15, "bits a number", "quiet", anchor="start")]
    for place, bits in enumerate(sorted(widths, reverse=True)):
        x = LEFT + 96 + 52 * place
        parts.append(_rect(x, 4, 14, 14, _shade(bits), f"{bits} bits"))
        parts.append(_text(x + 20, 15, str(bits), anchor="start"))
    return "\n".join(parts)


def _bit_cells(rows: Sequence[PlanRow], label: str, key: str, top: float) -> list[str]:
    width = PLOT / len(rows)
    parts = [_row_label(top + 19, label)]
    for place, row in enumerate(rows):
        x, bits = LEFT + place * width, getattr(row, key)
        parts.append(_rect(x + 0.5, top, width - 1, 28, _shade(bits), f"layer {row.layer}: {label[0]} {bits} bits"))
        if width >= 14:
            parts.append(_text(x + width / 2, top + 19, str(bits), f"on-{_shade(bits)}"))
    return parts


def _runs(rows: Sequence[PlanRow], label: str, key: str, top: float) -> list[str]:
    """Neighbouring layers with the same value as one strip, which is named where the name fits."""
    width, place = PLOT / len(rows), 0
    parts = [_row_label(top + 12, label)]
    for value, run in groupby(rows, key=attrgetter(key)):
        first, *_ = members = list(run)
        name = NAMES.get(value, str(value))
        span, x = width * len(members), LEFT + place * width
        title = f"layers {first.layer}-{members[-1].layer}: {label} {name}"
        parts.append(_rect(x + 0.5, top, span - 1, 16, "strip hollow" if value in PLAIN else "strip", title))
        if span >= 7 * len(name):
            parts.append(_text(x + span / 2, top + 12, name, "small"))
        place += len(members)
    return parts


def _bars(
    rows: Sequence[PlanRow], label: str, key: str, readable: Callable[[float], str], top: float, height: float = 60
) -> list[str]:
    width, largest = PLOT / len(rows), max(getattr(row, key) for row in rows) or 1
    parts = [_row_label(top + height / 2, label), _row_label(top + height / 2 + 15, f"≤ {readable(largest)}")]
    for place, row in enumerate(rows):
        tall = max(1.0, height * getattr(row, key) / largest)
        title = f"layer {row.layer}: {readable(getattr(row, key))}"
        parts.append(_rect(LEFT + place * width + 1, top + height - tall, width - 2, tall, "bar", title))
    return parts


def _layer_axis(count: int, top: float) -> list[str]:
    width, every = PLOT / count, max(1, -(-count // 32))
    ticks = [_text(LEFT + (layer + 0.5) * width, top, str(layer), "quiet") for layer in range(0, count, every)]
    return [_text(LEFT - 10, top, "layer", "quiet", anchor="end"), *ticks]


def _filling(trace: list[Sample], budget: int, top: float, bottom: float) -> list[str]:
    longest, ceiling = trace[-1]["tokens"], 1.3 * max(budget, max(sample["used"] for sample in trace))

    def x(tokens: float) -> float:
        return LEFT + PLOT * tokens / longest

    def y(count: float) -> float:
        return bottom - (bottom - top) * count / ceiling

    used = [f"{x(sample['tokens']):.1f},{y(sample['used']):.1f}" for sample in trace]
    original = [sample for sample in trace if sample["original"] <= ceiling]
    unquantized = [f"{x(sample['tokens']):.1f},{y(sample['original']):.1f}" for sample in original]
    parts = []
    for count in (0, budget / 2, budget):
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + PLOT}" y1="{y(count):.1f}" y2="{y(count):.1f}" class="grid"/>')
        parts.append(_row_label(y(count) + 4, readable_bytes(count)))
    parts += [
        f'<polygon points="{x(0):.1f},{bottom} {" ".join(used)} {x(longest):.1f},{bottom}" class="area"/>',
        f'<polyline points="{" ".join(unquantized)}" class="original"/>',
        f'<polyline points="{" ".join(used)}" class="used"/>',
        f'<line x1="{LEFT}" x2="{LEFT + PLOT}" y1="{y(budget):.1f}" y2="{y(budget):.1f}" class="budget"/>',
        _text(LEFT + PLOT, y(budget) - 6, "budget", "budget-name", anchor="end"),
        _text(
            x(original[-1]["tokens"]) + 8,
            max(y(original[-1]["original"]), top) + 10,
            f"16 bits a number: {readable_bytes(trace[-1]['original'])} at {longest:,} tokens",
            "quiet",
            anchor="start",
        ),
    ]
    return parts


def _falling_bits(trace: list[Sample], top: float, row_height: float) -> list[str]:
    longest, layers = trace[-1]["tokens"], len(trace[0]["bits"])
    every = max(1, -(-layers // 16))
    parts = []
    for layer in range(layers):
        y = top + layer * row_height
        if layer % every == 0:
            parts.append(_text(LEFT - 10, y + row_height / 2 + 4, f"layer {layer}", "quiet", anchor="end"))
        for half, name in enumerate("KV"):
            parts += [
                _rect(
                    LEFT + PLOT * start / longest,
                    y + half * row_height / 2,
                    PLOT * (stop - start) / longest,
                    row_height / 2 - (0.7 if half else 0),
                    _shade(bits),
                    f"layer {layer}: {name} {bits} bits from {start:,} to {stop:,} tokens",
                )
                for bits, start, stop in _stretches(trace, layer, half)
            ]
    return parts


def _stretches(trace: list[Sample], layer: int, half: int) -> list[tuple[int, int, int]]:
    """(bits, first token, last token) of each stretch in which a layer's K (`half` 0) or V (1) keeps its bits."""
    runs = [(bits, next(run)["tokens"]) for bits, run in groupby(trace, key=lambda sample: sample["bits"][layer][half])]
    ends = [start for _, start in runs[1:]] + [trace[-1]["tokens"]]
    return [(bits, start, end) for (bits, start), end in zip(runs, ends, strict=True)]


def _alike(rows: Sequence[PlanRow], trace: list[Sample]) -> Iterable[list[int]]:
    """Places of layers that hold the same bytes at the same bits at every moment, those with most bits first."""
    kinds: dict[Any, list[int]] = {}
    for place, row in enumerate(rows):
        curve = tuple((sample["layer_bytes"][place], *sample["bits"][place]) for sample in trace)
        kinds.setdefault((row.key_bits, row.value_bits, row.key_axis, curve), []).append(place)
    return (kinds[kind] for kind in sorted(kinds, key=lambda kind: (-kind[0] - kind[1], -kind[0])))


def _panel(rows: Sequence[PlanRow], trace: list[Sample], layers: list[int], left: float, top: float) -> list[str]:
    row, longest = rows[layers[0]], trace[-1]["tokens"]
    ceiling = 1.08 * max(row.arena_bytes, *(sample["layer_bytes"][layers[0]] for sample in trace))
    above, below = top + 24, top + PANEL_HEIGHT - 48

    def x(tokens: float) -> float:
        return left + PANEL_WIDTH * tokens / longest

    def y(count: float) -> float:
        return below - (below - above) * count / ceiling

    curve = [f"{x(sample['tokens']):.1f},{y(sample['layer_bytes'][layers[0]]):.1f}" for sample in trace]
    numbers = ", ".join(str(rows[place].layer) for place in layers)
    share = y(row.arena_bytes)
    name = f"K {row.key_bits}, V {row.value_bits} bits: " + (
        f"layer {numbers}" if len(layers) == 1 else f"{len(layers)} layers"
    )
    parts = [
        f"<g><title>{escape(f'layers {numbers}')}</title>{_text(left, top + 12, name, anchor='start')}</g>",
        _text(left + PANEL_WIDTH, top + 12, readable_bytes(row.arena_bytes), "budget-name", anchor="end"),
        f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{below}" y2="{below}" class="grid"/>',
        f'<polygon points="{x(0):.1f},{below} {" ".join(curve)} {x(longest):.1f},{below}" class="area"/>',
    ]
    for half, kind in enumerate("KV"):
        for bits, start, stop in _stretches(trace, layers[0], half):
            if start:
                parts.append(f'<line x1="{x(start):.1f}" x2="{x(start):.1f}" y1="{above}" y2="{below}" class="step"/>')
            title = f"{kind} {bits} bits from {start:,} to {stop:,} tokens"
            parts.append(_rect(x(start), below + 4 + 9 * half, x(stop) - x(start), 8, _shade(bits), title))
    return [
        *parts,
        f'<polyline points="{" ".join(curve)}" class="used"/>',
        f'<line x1="{left}" x2="{left + PANEL_WIDTH}" y1="{share:.1f}" y2="{share:.1f}" class="budget"/>',
        _text(left, below + 34, "0", "small", anchor="start"),
        _text(left + PANEL_WIDTH, below + 34, f"{longest:,} tokens", "small", anchor="end"),
    ]


def _token_axis(longest: int, top: float) -> list[str]:
    anchors = ("start", "middle", "middle", "middle", "end")
    ticks = [
        _text(LEFT + PLOT * quarter / 4, top + 18, f"{longest * quarter // 4:,}", "quiet", anchor)
        for quarter, anchor in enumerate(anchors)
    ]
    return [*ticks, _text(LEFT + PLOT / 2, top + 36, "tokens", "quiet")]
