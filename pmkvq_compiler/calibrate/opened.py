"""Opens a model for measurements: whole where it fits the memory that is free, else layer by layer."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import ATTENTION
from pmkvq_compiler.calibrate.streamed_model import StreamedModel
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.source.source import Source

NUMBERS_A_TOKEN = 12, 4
"""How many times its hidden size, and its intermediate size, a layer keeps for a backward pass, for each token."""


SPREAD = 0.9
"""The share of the free memory of several devices that a model may need."""

Placement = Literal["one device", "all GPUs", "layer by layer"]


def opened(source: Source, problem: Problem) -> PreTrainedModel | StreamedModel:
    """The model on the problem's device, in the dtype that it runs in there. Raises the errors of `load_model`.

    The device "cuda" stands for all GPUs if the model does not fit one. Some models cannot be read layer by layer and
    are loaded whole in any case: those that are not stored as transformers keeps them, such as GGUF files, and those
    in which a layer takes more than hidden states from another one, keeps latents, or has no attention.
    """
    gc.collect()  # a model that was opened before and is no longer used refers to itself, and would stay
    devices = _devices(problem.device)
    dtype = source.running_dtype(problem.device)
    needed = needed_bytes(source.config, source.stored_bytes(dtype), problem.calib_len, dtype)
    free = [free_bytes(device) for device in devices]
    where = placement(needed, free)
    if where == "layer by layer" and source.has_plain_tensors and _has_plain_layers(problem):
        return StreamedModel(source, problem.sites, problem.device)
    spread = len(devices) > 1 and where != "one device"
    return source.load_model(ATTENTION, problem.device, spread=spread).requires_grad_(False)


def _has_plain_layers(problem: Problem) -> bool:
    """Whether every layer attends to keys and values of its own, as far as the problem says."""
    return not (problem.states or problem.readers or any(site.latent is not None for site in problem.sites))


def placement(needed: int, free: Sequence[int]) -> Placement:
    """Where to load a model that needs so many bytes, with these bytes free on the devices; the first one is preferred.

    Layers are not split, so the free memory of several devices is never quite used up.
    """
    if needed <= free[0]:
        return "one device"
    return "all GPUs" if needed <= SPREAD * sum(free) else "layer by layer"


def rooms_of(device: str) -> dict[str, int]:
    """The free bytes of a device, for a process that begins now; "cuda" stands for all GPUs."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # the other process cannot use what this one holds in reserve
    return {one: free_bytes(one) for one in _devices(device)}


def _devices(device: str) -> list[str]:
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else [device]


def needed_bytes(config: PretrainedConfig, weight_bytes: int, calib_len: int, dtype: torch.dtype) -> int:
    """The bytes of the weights, and of what a backward pass over a calibration text keeps in `dtype`."""
    config = config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    widest = max(inner) if isinstance(inner, list) else inner  # some models have one for each layer
    numbers = NUMBERS_A_TOKEN[0] * config.hidden_size + NUMBERS_A_TOKEN[1] * widest
    return weight_bytes + calib_len * config.num_hidden_layers * numbers * dtype.itemsize


def free_bytes(device: str) -> int:
    """The memory of a device that is free or can be made free."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available_bytes(), _group_bytes())


def _available_bytes() -> int:
    """What Linux says is available; on other systems, all of the machine's memory."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 62


def _group_bytes() -> int:
    """What is left of the limit of a container; a large number where there is none."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
        return 1 << 62 if limit == "max" else int(limit) - int(used)
    except (OSError, ValueError):
        return 1 << 62
