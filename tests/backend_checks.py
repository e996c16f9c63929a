"""Run an artifact through both backends; in Triton's interpreter as

TRITON_INTERPRET=1 python -m tests.backend_checks ARTIFACT cpu
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from pmkvq_compiler import runtime

from .kernel_checks import repair_interpreter

LENGTHS = (100, 1, 1, 150, 1, 160, 1)


def compare(artifact: Path, device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Logits of the same calls through kernels and reference; the last row of the batch is shorter by padding."""
    torch.manual_seed(0)
    models = [runtime.load(artifact, device, dtype, backend) for backend in ("triton", "reference")]  # type: ignore[arg-type]
    assert [model.kernels_from for model in models] == ["triton", "reference"]
    caches = [model.new_cache(batch_size=1) for model in models]
    for count in LENGTHS:
        ids = torch.randint(3, 128, (1, count))
        ours, expected = (model(ids, cache).double() for model, cache in zip(models, caches, strict=True))
        error = ((ours - expected).norm() / expected.norm()).item()
        assert error < tolerance, f"after {caches[0].length} tokens the logits differ by {error:.1e}"
        assert caches[0].bits == caches[1].bits
    assert caches[0].bits[0] == caches[0].layers[0].plan.stages[-1], "the run was to reach the final widths"


if __name__ == "__main__":
    torch.set_num_threads(1)
    repair_interpreter()
    compare(Path(sys.argv[1]), sys.argv[2], torch.float32, 1e-2)
