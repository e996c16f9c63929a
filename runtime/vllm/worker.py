"""What a worker of a progressive server does before a step: it notes which pages have got or lost planes."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from .planes import CHANGES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""Modules of a `GPUModelRunner`, of which a worker has one; that for CPUs is derived from it."""

_following: set[type] = set()


def follow_scheduler() -> None:
    """Make this process's runners note the changes that come with a step, before they run the model."""
    for module in RUNNERS:
        runner = getattr(sys.modules.get(module), "GPUModelRunner", None)
        if runner is not None and runner not in _following:
            _following.add(runner)
            _wrap(runner)


def _wrap(runner: Any) -> None:
    original = runner.execute_model

    @functools.wraps(original)
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        changes = getattr(scheduler_output, CHANGES, None)
        if changes:
            _note(self.vllm_config, changes)
        return original(self, scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model


def _note(config: VllmConfig, changes: list[tuple[int, ...]]) -> None:
    """Write `Planes.changes` to the table that kernels read, after what was launched before and before this step."""
    from .backend import Store

    for layer in config.compilation_config.static_forward_context.values():
        if isinstance(layer, Store):
            ties = layer.served.ties
            assert ties is not None
            told = torch.tensor(changes, dtype=torch.int32, pin_memory=ties.is_cuda).to(ties.device, non_blocking=True)
            with torch.inference_mode():
                ties[told[:, 0].long()] = told[:, 1:]
            return
