"""What a worker of a progressive server does before a step: it codes pages anew that have fallen, and notes where all
lie now."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

from .tiers import TOLD, Changes

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from .attach import Served

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
        changes = getattr(scheduler_output, TOLD, None)
        if changes is not None:
            _note(self.vllm_config, changes)
        return original(self, scheduler_output, *args, **kwargs)

    runner.execute_model = execute_model


def _note(config: VllmConfig, changes: Changes) -> None:
    """Code pages that have fallen anew, and write where pages lie to the table that kernels read. Both happen after
    what was launched before, and before this step."""
    served = _served(config)
    table = served.table
    assert table is not None
    told, first = table.told(changes.rows), 0
    for group, count in changes.fallen:
        served.stores[group].lower(told.rows[first : first + count])
        first += count
    told.note()


def _served(config: VllmConfig) -> Served:
    from .backend import Store

    return next(
        layer.served for layer in config.compilation_config.static_forward_context.values() if isinstance(layer, Store)
    )
