"""Decode by a captured step and by calls of the model, and compare; without a device, in Triton's interpreter, as

TRITON_INTERPRET=1 python -m tests.graph_checks ARTIFACT

where the step is not captured but run again each time: what it does, and what the host does around it, are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.fused import PLAIN, joined
from pmkvq_compiler.runtime.graph import Capture, GraphDecoder, Step, capture_cuda_graph

from .kernel_checks import repair_interpreter
from .runtime.test_attention import stored_numbers

PROMPTS = (191, 127)
"""Both are about to fill their windows, and the first its share."""


def compare(
    artifact: Path, device: str, dtype: torch.dtype, steps: int, tolerance: float, capture: Capture = capture_cuda_graph
) -> None:
    """Decode a ragged batch whose second sequence ends early, then use the cache in other ways and decode again."""
    torch.manual_seed(0)
    model = runtime.load(artifact, device, dtype, "triton")
    called, replayed = prompted_caches(model, PROMPTS)
    captured: list[list[tuple[int, int]]] = []

    def counted(step: Step) -> Step:
        captured.append(replayed.bits)
        return capture(step)

    decoder = GraphDecoder(model, replayed, counted)
    running = torch.ones(len(PROMPTS), dtype=torch.bool, device=model.device)
    widths, flushed = [called.bits], sum(called.layers[0].flushed)
    for step in range(steps):
        running[-1] = step < 2 * steps // 3
        if step % 50 == 1:
            assert replayed.length == called.length, "who looks in between sees what is there"
        tokens = torch.randint(3, 128, (len(PROMPTS),), device=model.device)
        expected = model(tokens.unsqueeze(-1), called, attention_mask=running.unsqueeze(-1))[:, -1]
        assert_close(decoder(tokens, running)[running], expected[running], tolerance)
        widths += [called.bits] * (called.bits != widths[-1])
    assert captured[-1] == called.bits
    assert len(captured) == len(widths) - (captured[0] != widths[0]), "a graph for every lowering, and no other"
    assert len(widths) > 1, "a layer was to be lowered in between"
    assert sum(called.layers[0].flushed) > flushed + 1, "blocks were to leave the window"
    assert_same(replayed, called, tolerance)

    # what follows a decoder's steps, each time without a word to the cache that they are over
    changes: list[Callable[[runtime.Cache], object]] = [
        lambda cache: cache.reorder([1, 0]),
        lambda cache: cache.crop(1),
        lambda cache: model(torch.full((2, 3), 5), cache),
    ]
    for change in changes:
        decoder(tokens, running)
        model(tokens.unsqueeze(-1), called, attention_mask=running.unsqueeze(-1))
        for cache in (replayed, called):
            change(cache)
        assert_same(replayed, called, tolerance)
    decoder(tokens, running)
    model(tokens.unsqueeze(-1), called, attention_mask=running.unsqueeze(-1))
    assert_same(replayed.select([1]), called.select([1]), tolerance)
    assert replayed.bytes_used == called.bytes_used
    decoder(tokens, running)
    replayed.reset()
    assert replayed.length == [0, 0]
    assert replayed.bytes_used == 0


def check_merged(artifact: Path, device: str, tolerance: float) -> None:
    """A model with kernels has projections side by side, whose one product is that of each by itself."""
    torch.manual_seed(0)
    merged, reference = (runtime.load(artifact, device, torch.float32, backend) for backend in ("triton", "reference"))
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    for model, together in ((merged, True), (reference, False)):
        assert (joined([model.weights[name] for name in names]) is not None) is together
    assert all(torch.equal(tensor, reference.weights[name]) for name, tensor in merged.weights.items())
    models, ids = (merged, replace(merged, ops=PLAIN)), torch.randint(3, 128, (2, 50))
    caches = [model.new_cache(batch_size=2) for model in models]
    for part in (ids[:, :46], ids[:, 46:49], ids[:, 49:]):
        found, expected = (model(part, cache) for model, cache in zip(models, caches, strict=True))
        assert_close(found, expected, tolerance)


def prompted_caches(model: runtime.CompiledModel, lengths: tuple[int, ...]) -> tuple[runtime.Cache, runtime.Cache]:
    """Two caches that hold the same random prompts of these lengths."""
    prompted = model.new_cache(batch_size=len(lengths))
    ids, mask = padded(lengths)
    model(ids, prompted, attention_mask=mask)
    return prompted.select(range(len(lengths))), prompted.select(range(len(lengths)))


def padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random prompts of these lengths, padded on the left, and their mask."""
    columns = torch.arange(max(lengths)).expand(len(lengths), -1)
    mask = columns >= max(lengths) - torch.tensor(lengths).unsqueeze(-1)
    return torch.randint(3, 128, mask.shape) * mask, mask


def assert_same(one: runtime.Cache, other: runtime.Cache, tolerance: float) -> None:
    """The same tokens in the same places, and (nearly) the same numbers for them."""
    assert one.length == other.length
    assert one.bits == other.bits
    for store, twin in zip(one.layers, other.layers, strict=True):
        assert (store.rows, store.flushed) == (twin.rows, twin.flushed)
        for sequence in range(one.batch_size):
            ours, expected = stored_numbers(store, sequence), stored_numbers(twin, sequence)
            assert torch.equal(ours[2], expected[2])
            for numbers, twins in zip(ours[:2], expected[:2], strict=True):
                assert_close(numbers, twins, tolerance)


def assert_close(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    error = ((ours.double() - expected.double()).norm() / expected.double().norm()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair_interpreter()
    compare(Path(sys.argv[1]), "cpu", torch.float32, steps=4, tolerance=0.0, capture=lambda step: step)
    check_merged(Path(sys.argv[1]), "cpu", tolerance=1e-5)
