"""Tiny models with random weights, one per architecture that tests need."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SHAPE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A causal language model of `model_type` with random weights and biases (none left at zero)."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        model_type, **{**SHAPE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **copy.deepcopy(overrides)}
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
            elif parameter.dim() == 2:
                parameter.normal_(std=0.15)
    return model.to(dtype)


def tiny_folder(path: Path, model_type: str, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """A Hugging Face folder with such a model (safetensors, no tokenizer)."""
    tiny_model(model_type, seed, **overrides).save_pretrained(path, max_shard_size=max_shard_size)
    return path
