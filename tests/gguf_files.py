"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGUFWriter, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedModel

from tests.models import tiny_model

ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "mistral": "llama"}
"""What GGUF calls a model type, where it is another name."""

OFFSET_NORMS = ("gemma2", "gemma3", "nemotron")
TRANSPOSED = ("attn_qkv.weight", "ffn_down.weight", "ffn_up.weight", "attn_output.weight")


def gguf_file(
    path: Path,
    model_type: str = "llama",
    header: dict[str, Any] | None = None,
    tensors: dict[str, Tensor] | None = None,
    tokenizer: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """Write a tiny model's file, and return the model. `header` and `tensors` are added, or take the place of what is
    there; None in `header` takes a key away. Keys get the prefix of the architecture unless they have a known one."""
    model = tiny_model(model_type, **overrides)
    architecture = ARCHITECTURES.get(model_type, model_type)
    values = {"general.name": "tiny", **{f"{architecture}.{key}": value for key, value in _header(model).items()}}
    if tokenizer:
        values |= _tokenizer()
    for key, value in (header or {}).items():
        whole = key.startswith(("general.", "tokenizer.", "split.", f"{architecture}."))
        values[key if whole else f"{architecture}.{key}"] = value
    writer = GGUFWriter(path, architecture)
    for key, value in values.items():
        _add(writer, key, value)
    for name, tensor in {**_tensors(model, architecture), **(tensors or {})}.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _header(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    norms = "layer_norm" if config.model_type in ("gpt2", "stablelm", "starcoder2", "nemotron") else "layer_norm_rms"
    epsilon = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_epsilon")
    header = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": 4 * config.hidden_size if config.model_type == "gpt2" else config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        f"attention.{norms}_epsilon": next(getattr(config, name) for name in epsilon if hasattr(config, name)),
    }
    if config.model_type == "gpt2":
        return header
    header["attention.head_count_kv"] = config.num_key_value_heads
    header["attention.key_length"] = header["attention.value_length"] = head_dim
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    header["rope.freq_base"] = float(rope["rope_theta"])
    header["rope.dimension_count"] = int(rope.get("partial_rotary_factor", 1) * head_dim)
    if config.model_type in ("gemma2", "gemma3_text", "phi3", "starcoder2") and config.sliding_window:
        header["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        header["attn_logit_softcapping"] = config.attn_logit_softcapping
        header["final_logit_softcapping"] = config.final_logit_softcapping
    if config.model_type.endswith("_moe"):
        header["expert_count"], header["expert_used_count"] = config.num_experts, config.num_experts_per_tok
        header["expert_feed_forward_length"] = config.moe_intermediate_size
    if config.model_type == "qwen2_moe":
        header["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    return header


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, Tensor]:
    config: Any = model.config
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            block = name.split(".")[2]
            gate, up = value.chunk(2, dim=1)
            tensors |= {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        stored = stored if stored.endswith((".weight", ".bias")) else f"{stored}.weight"
        if architecture == "llama" and (".attn_q." in stored or ".attn_k." in stored):
            heads = config.num_attention_heads if ".attn_q." in stored else config.num_key_value_heads
            value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        if architecture in OFFSET_NORMS and stored.endswith("norm.weight"):
            value = value + 1
        if architecture == "gpt2" and stored.endswith(TRANSPOSED):
            value = value.T
        tensors[stored] = value.squeeze(0) if "gate_inp_shexp" in stored else value
    return tensors


def _tokenizer() -> dict[str, Any]:
    """One token a byte, and pairs of letters."""
    alphabet = [chr(code) for code in range(33, 127)]
    tokens = ["<s>", "</s>", *alphabet, "\u0120"]
    tokens += ["th", "he", "in", "er"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.merges": ["t h", "h e", "i n", "e r"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def logits(model: PreTrainedModel) -> Tensor:
    """Logits of a fixed text, in float64."""
    ids = torch.arange(3, 67).unsqueeze(0)
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"  # the others have no float64
    with torch.no_grad():
        out: Tensor = model.double()(ids).logits
    return out
