"""What a layer counts: it changes through the layer's own methods, and is what storing tokens would have counted."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pmkvq_compiler.runtime.layer_cache import Counts, LayerCache

from .plans import layer_plan

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
MAX_LEN = 700
KINDS: list[dict[str, Any]] = [
    {},
    {"key_axis": "channel", "key_bits": 2, "value_bits": 2},
    {"window": 64, "sink": 0},
    {"sliding_window": 200, "sink": 0},
    {"sliding_window": 90, "sink": 0, "window": 64},
    {"stages": ((8, 4), (4, 4)), "key_bits": 4, "value_bits": 4},
    {"stages": (), "key_bits": 32, "value_bits": 32, "sink": 0, "window": MAX_LEN},
]


def layer(kind: dict[str, Any], sequences: int = 2, device: torch.device = CPU) -> LayerCache:
    return LayerCache(layer_plan(MAX_LEN, sequences, **kind), sequences, MAX_LEN, torch.float32, device)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_seeking_counts_what_storing_counts(kind: dict[str, Any]) -> None:
    """At every length on the way, and with no memory at all."""
    stored, sought = layer(kind), layer(kind, device=torch.device("meta"))
    tokens = torch.zeros(3, 1, 64)
    for length in range(1, MAX_LEN + 1):
        for sequence in range(2) if length <= 300 else (0,):  # the second one stops growing
            stored.append(sequence, tokens, tokens)
        sought.seek([length, min(length, 300)])
        assert sought.counts == stored.counts, length
        assert (sought.bits, sought.bytes_used) == (stored.bits, stored.bytes_used)
    assert stored.stage == max(0, len(stored.plan.stages) - 1), "the run was to go through every stage"


def test_seeking_goes_back_and_to_a_stage_that_is_given() -> None:
    store = layer({})
    store.seek([MAX_LEN, 3])
    last = store.stage
    assert last > 0
    store.seek([5, 3])
    assert store.counts == Counts(rows=[5, 3], flushed=[0, 0], stage=0)
    store.seek([5, 3], stage=last)
    assert store.counts == Counts(rows=[5, 3], flushed=[0, 0], stage=last)


def test_counts_stay_as_they_were_taken() -> None:
    """Whatever the layer counts afterwards, also after it went back to them."""
    store, tokens = layer({}), torch.zeros(3, 200, 64)
    store.append(0, tokens, tokens)
    before = store.counts
    kept = dataclasses.replace(before, rows=list(before.rows), flushed=list(before.flushed))
    for _ in range(2):
        store.append(0, tokens, tokens)
        store.append(1, tokens, tokens)
        assert store.counts != before == kept
        store.go_back(before)
        assert store.counts == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError])
def test_a_lowering_that_breaks_off_is_not_counted_but_known(error: type[BaseException]) -> None:
    store = layer({})

    def break_off() -> None:
        with store.lowering() as widths:
            assert widths == store.plan.stages[:2]
            raise error("broken off")

    with pytest.raises(error, match="broken off"):
        break_off()
    assert (store.stage, store.overwritten) == (0, True)
    with store.lowering():
        assert store.stage == 0
    assert store.bits == store.plan.stages[1]


def test_nobody_else_writes_what_a_layer_counts() -> None:
    """In no code of the project, tests and examples included. Pages of a server have rows that are something else."""
    files = [
        path
        for folder in ("runtime", "passes", "pmkvq_compiler", "templates", "examples", "tests")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "runtime" / "layer_cache.py" and not {"vllm", "serve"} & {*path.parts}
    ]
    assert len(files) > 100
    found = [f"{path.relative_to(ROOT)}:{line}" for path in files for line in written_counts(path.read_text("utf-8"))]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "store.rows = [1]",
        "store.stage += 1",
        "cache.layers[0].flushed[0] = 8",
        "one.layers[0].rows, one.length = [3], [3]",
        "for layer.stage in range(3): pass",
    ],
)
def test_a_count_that_is_written_is_seen(text: str) -> None:
    assert list(written_counts(f"\n{text}")) == [2]
    assert list(written_counts("print(store.rows, store.flushed[0], store.stage)\nstage = rows = 3")) == []


def written_counts(text: str) -> list[int]:
    """Lines that assign to a `rows`, `flushed` or `stage` of something, or into it."""
    lines = []
    for node in ast.walk(ast.parse(text)):
        target = node.value if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) else node
        if isinstance(target, ast.Attribute) and target.attr in ("rows", "flushed", "stage"):
            written = target is not node or isinstance(target.ctx, ast.Store)
            lines += [target.lineno] if written else []
    return lines
