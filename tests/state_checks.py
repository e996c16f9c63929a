"""Decode a model with recurrent states by a captured step and by calls, and compare; without a device, as

TRITON_INTERPRET=1 python -m tests.state_checks ARTIFACT

where the step is not captured but run again each time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.runtime.graph import Capture, GraphDecoder, capture_cuda_graph

from .graph_checks import assert_close, assert_same, prompted_caches
from .kernel_checks import repair_interpreter

PROMPTS = (70, 33)


def compare(
    artifact: Path, device: str, dtype: torch.dtype, steps: int, tolerance: float, capture: Capture = capture_cuda_graph
) -> None:
    """A ragged batch whose second sequence ends early: its states stay as they are from then on."""
    torch.manual_seed(0)
    model = runtime.load(artifact, device, dtype, "triton")
    called, replayed = prompted_caches(model, PROMPTS)
    decoder = GraphDecoder(model, replayed, capture)
    running = torch.ones(len(PROMPTS), dtype=torch.bool, device=model.device)
    ended: list[torch.Tensor] = []
    for step in range(steps):
        running[-1] = step < steps // 2
        tokens = torch.randint(3, 128, (len(PROMPTS),), device=model.device)
        expected = model(tokens.unsqueeze(-1), called, attention_mask=running.unsqueeze(-1))[:, -1]
        assert_close(decoder(tokens, running)[running], expected[running], tolerance)
        ended.append(torch.cat([state[-1].flatten().float() for state in replayed.states.tensors.values()]))
    assert torch.equal(ended[-1], ended[steps // 2 - 1])
    assert not torch.equal(ended[0], ended[steps // 2 - 1])
    assert_same(replayed, called, tolerance)
    for change in (lambda cache: cache.reorder([1, 0]), lambda cache: model(torch.full((2, 3), 5), cache)):
        for cache in (replayed, called):
            change(cache)
        for name, state in replayed.states.tensors.items():
            assert_close(state, called.states.tensors[name], tolerance)


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair_interpreter()
    compare(Path(sys.argv[1]), "cpu", torch.float32, steps=4, tolerance=1e-6, capture=lambda step: step)
