"""Trains a model from random weights for a few seconds, so that `scale.py` has weights that have learnt something.

Each byte of a text is a token. The text is the one that this package calibrates on, and the texts to calibrate the
model on come from the package's held-out text. Everything is bfloat16, which AdamW's steps of 1e-4 can still move. The
scales of norms and the biases get larger steps: a norm's scale is 1, to which bfloat16 adds no less than 4e-3.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

LEARNING_RATE, OF_VECTORS = 2e-4, 4e-3
WARM_UP = 20
SEQUENCES, TOKENS = 4, 1024
"""A batch."""


def byte_ids(name: str) -> Tensor:
    """A text of this package, int64 [bytes]."""
    text = files("pmkvq_compiler").joinpath(f"data/{name}.txt").read_bytes()
    return torch.tensor(list(text))


def trained(config: PretrainedConfig, seconds: float, device: str) -> PreTrainedModel:
    """A model that has learnt for so many seconds; prints its loss at first and at the end."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    groups = [{"params": matrices, "lr": LEARNING_RATE}, {"params": vectors, "lr": OF_VECTORS}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    losses: list[float] = []
    began = time.perf_counter()
    for ids in batches(device):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        losses.append(loss.item())
        if time.perf_counter() - began > seconds:
            break
        loss.backward()
        clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"{len(losses) - 1} steps of training: loss {losses[0]:.2f}, then {losses[-1]:.2f} nats a byte", flush=True)
    return model.requires_grad_(False)


def batches(device: str) -> Iterator[Tensor]:
    """Random pieces of the text, for ever."""
    text = byte_ids("calibration")
    while True:
        starts = torch.randint(len(text) - TOKENS, (SEQUENCES, 1))
        yield text[starts + torch.arange(TOKENS)].to(device)
