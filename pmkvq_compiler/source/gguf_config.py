"""From the header of a GGUF file to a configuration of transformers.

Every key of the model's architecture is read here, or listed as one that does not change what is computed; a file with
any other key is refused by the key's name. What transformers itself reads of a header is less than what a header says,
so its reading is not used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.gguf_header import GgufHeader
from pmkvq_compiler.source.gguf_tensors import ROPE_FREQUENCIES

HARMLESS = frozenset({"tensor_data_layout", "pooling_type", "rope.scaling.finetuned"})
"""Keys of an architecture that do not change what is computed."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.shared_kv_layers": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1, -1),
}
"""Keys that are understood with these values alone, where nothing else reads them; 0 says that there is none."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every model with RoPE of type llama3 was trained with; GGUF files hold only what it does to the frequencies."""

LOCAL_THETA = 10000.0
"""Gemma 3's base in layers with a window."""


@dataclass(frozen=True)
class Family:
    """An architecture of GGUF: `more` adds to the configuration what only this one has."""

    model_type: str
    epsilon: str
    more: Callable[[_Fields, dict[str, Any]], None] = lambda fields, values: None
    partial_rotary: bool = False
    rotary: bool = True


class _Fields:
    """The keys of the architecture; remembers which of them were read."""

    def __init__(self, header: GgufHeader) -> None:
        self.header = header
        self.architecture = header.fields.get("general.architecture")
        self.read: set[str] = set()

    def get(self, key: str, kind: type = int, default: Any = None) -> Any:
        """A value of `kind`, `default` where the header has none. Raises `ValueError` for another kind, such as a list
        of one value a layer."""
        self.read.add(key)
        value = self.header.fields.get(f"{self.architecture}.{key}")
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{self.architecture}.{key} is {_short(value)}, which is no single {_KINDS[kind]}")
        return value

    def size(self, key: str) -> int:
        """A size that the header must tell."""
        value = self.get(key)
        if value is None or value < 1:
            raise ValueError(f"{self.architecture}.{key} is {'missing' if value is None else value}")
        return int(value)

    def has_tensor(self, ending: str) -> bool:
        return any(name.endswith(ending) for name in self.header.tensors)


_KINDS = {int: "whole number", float: "number", bool: "truth value", str: "text"}


def gguf_config(path: Path, header: GgufHeader) -> PretrainedConfig:
    """The configuration of the model in a GGUF file.

    Raises `CompileError` where the header contradicts the tensors, or says something that is not understood.
    """
    try:
        return _config(path, header)
    except ValueError as error:
        raise CompileError(
            f"{path} cannot be compiled as it is: {error}; compile the model's safetensors checkpoint instead"
        ) from error


def _config(path: Path, header: GgufHeader) -> PretrainedConfig:
    fields = _Fields(header)
    family = FAMILIES.get(fields.architecture) if isinstance(fields.architecture, str) else None
    if family is None:
        raise ValueError(
            f"its architecture is {_short(fields.architecture)}, and GGUF files of {', '.join(FAMILIES)} are understood"
        )
    if header.fields.get("general.type", "model") != "model" or header.fields.get("split.count", 1) > 1:
        raise ValueError("it is an adapter or one part of several files, not a whole model")
    values = _sizes(fields)
    values[family.epsilon] = _epsilon(fields)
    if family.rotary:
        values["rope_parameters"] = _rope(path, fields, values, family.partial_rotary)
    family.more(fields, values)
    _check_understood(fields)
    config = AutoConfig.for_model(family.model_type, **values, **_token_ids(header))
    config.dtype = torch.float32
    return config


def _sizes(fields: _Fields) -> dict[str, Any]:
    """What every architecture has, held against the tensors so that no size can be absurd."""
    tensors = fields.header.tensors
    layers = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no tensor token_embd.weight")
    vocab_size, hidden_size = tensors["token_embd.weight"].shape
    values = {
        "vocab_size": vocab_size,
        "hidden_size": fields.size("embedding_length"),
        "intermediate_size": fields.size("feed_forward_length"),
        "num_hidden_layers": fields.size("block_count"),
        "num_attention_heads": fields.size("attention.head_count"),
        "max_position_embeddings": fields.size("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    values["num_key_value_heads"] = fields.get("attention.head_count_kv", default=values["num_attention_heads"])
    if values["num_hidden_layers"] != len(layers):
        raise ValueError(f"block_count is {values['num_hidden_layers']:,} and the file has {len(layers)} layers")
    if values["hidden_size"] != hidden_size or fields.get("vocab_size", default=vocab_size) != vocab_size:
        raise ValueError(f"token_embd.weight has shape {[vocab_size, hidden_size]}, which the header contradicts")
    tokens = fields.header.fields.get("tokenizer.ggml.tokens", [])
    if not isinstance(tokens, list) or len(tokens) > vocab_size:
        raise ValueError(f"its tokenizer has more than the {vocab_size:,} tokens of token_embd.weight")
    largest = max(max(tensor.shape) for tensor in tensors.values())
    for name in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        if not 0 < values[name] <= largest:
            raise ValueError(f"{name} is {values[name]:,} and the file has no tensor of that size")
    key_length, value_length = fields.get("attention.key_length"), fields.get("attention.value_length")
    values["head_dim"] = hidden_size // values["num_attention_heads"] if key_length is None else key_length
    if values["head_dim"] != (values["head_dim"] if value_length is None else value_length):
        raise ValueError(f"keys of {values['head_dim']} and values of {value_length} channels a head are not supported")
    if not 0 < values["head_dim"] <= largest:
        raise ValueError(f"attention.key_length is {values['head_dim']:,} and the file has no tensor of that size")
    scale = fields.get("attention.scale", float)
    if scale not in (None, 0.0) and not math.isclose(scale, values["head_dim"] ** -0.5, rel_tol=1e-5):
        raise ValueError(f"attention.scale is {scale:g} where head_dim ** -0.5 is {values['head_dim'] ** -0.5:g}")
    return values


def _epsilon(fields: _Fields) -> float:
    rms, layer_norm = (fields.get(f"attention.{name}_epsilon", float) for name in ("layer_norm_rms", "layer_norm"))
    epsilon = rms or layer_norm
    if epsilon is None or not 0 < epsilon < 1 or (rms and layer_norm and rms != layer_norm):
        raise ValueError(f"the epsilon of its norms is {epsilon}")
    return float(epsilon)


def _rope(path: Path, fields: _Fields, values: dict[str, Any], partial: bool) -> dict[str, Any]:
    head_dim = values["head_dim"]
    dimensions = fields.get("rope.dimension_count", default=head_dim)
    theta = fields.get("rope.freq_base", float, LOCAL_THETA)
    if theta < 1 or not 0 < dimensions <= head_dim or (dimensions != head_dim and not partial):
        raise ValueError(f"RoPE turns {dimensions} of {head_dim} channels with base {theta:g}, which is not supported")
    parameters = {"rope_type": "default", "rope_theta": theta, **_scaling(fields, values["max_position_embeddings"])}
    if partial:
        parameters["partial_rotary_factor"] = dimensions / head_dim
    factors = _frequency_factors(path, fields.header)
    if factors is None:
        return parameters
    llama3 = {**parameters, "rope_type": "llama3", "factor": float(factors.max()), **LLAMA3}
    expected = llama3_factors(llama3, dimensions)
    if parameters["rope_type"] != "default" or factors.shape != expected.shape:
        raise ValueError(f"{ROPE_FREQUENCIES} has {factors.numel()} factors for RoPE of type {parameters['rope_type']}")
    if not torch.allclose(factors.double(), expected, rtol=1e-4):
        raise ValueError(f"the factors in {ROPE_FREQUENCIES} are not those of Llama 3's RoPE")
    return llama3


def _scaling(fields: _Fields, context_length: int) -> dict[str, Any]:
    """What is done to RoPE's frequencies, in transformers' words."""
    older = fields.get("rope.scale_linear", float, 1.0)
    factor = fields.get("rope.scaling.factor", float) or older or 1.0
    kind = fields.get("rope.scaling.type", str, "linear")  # what llama.cpp takes a factor for where no type is said
    original = fields.get("rope.scaling.original_context_length", default=context_length)
    beta_fast = fields.get("rope.scaling.yarn_beta_fast", float, 32.0)
    beta_slow = fields.get("rope.scaling.yarn_beta_slow", float, 1.0)
    logarithm = fields.get("rope.scaling.yarn_log_multiplier", float, 0.0)
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"RoPE of type {kind} is not supported: none, linear and yarn are")
    if factor < 1 or original < 1 or not beta_fast > beta_slow > 0:
        raise ValueError(
            f"RoPE is scaled with factor {factor:g}, {original} tokens, {beta_slow:g} to {beta_fast:g} turns"
        )
    if kind == "none" or factor == 1:
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if logarithm:
        raise ValueError("rope.scaling.yarn_log_multiplier is not supported")
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
    }


def llama3_factors(parameters: dict[str, Any], dimensions: int) -> Tensor:
    """By what RoPE of type llama3 divides the frequencies (float64 [dimensions / 2])."""
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = parameters["rope_theta"] ** (-torch.arange(0, dimensions, 2, dtype=torch.float64) / dimensions)
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _frequency_factors(path: Path, header: GgufHeader) -> Tensor | None:
    """The tensor that RoPE's frequencies are divided by; None where there is none, or only ones."""
    if ROPE_FREQUENCIES not in header.tensors:
        return None
    (tensor,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FREQUENCIES)
    factors = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).flatten()
    return None if bool((factors == 1).all()) else factors


def _check_understood(fields: _Fields) -> None:
    for key, value in fields.header.fields.items():
        prefix, _, name = key.partition(".")
        if prefix != fields.architecture and name in fields.read:
            raise ValueError(f"its header has {key}, of another architecture than its own, {fields.architecture}")
        if prefix != fields.architecture or name in fields.read | HARMLESS:
            continue
        if name not in NEUTRAL or isinstance(value, (str, list)) or value not in NEUTRAL[name]:
            raise ValueError(f"what its header's {key} = {_short(value)} does to the model is not understood")


def _token_ids(header: GgufHeader) -> dict[str, Any]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: header.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}


def _llama(fields: _Fields, values: dict[str, Any]) -> None:
    values["attention_bias"] = fields.has_tensor("attn_q.bias")
    values["mlp_bias"] = fields.has_tensor("ffn_up.bias")


def _experts(fields: _Fields, values: dict[str, Any]) -> None:
    largest = max(max(tensor.shape) for tensor in fields.header.tensors.values())
    values["moe_intermediate_size"] = fields.size("expert_feed_forward_length")
    values["num_experts_per_tok"], values["num_experts"] = fields.size("expert_used_count"), fields.size("expert_count")
    if not values["num_experts_per_tok"] <= values["num_experts"] <= largest:
        raise ValueError(f"expert_count is {values['num_experts']:,}")
    if values["moe_intermediate_size"] > largest:
        raise ValueError(f"expert_feed_forward_length is {values['moe_intermediate_size']:,}")
    values["decoder_sparse_step"], values["mlp_only_layers"] = 1, []


def _qwen2moe(fields: _Fields, values: dict[str, Any]) -> None:
    _experts(fields, values)
    shared = fields.get("expert_shared_feed_forward_length", default=values["intermediate_size"])
    values["shared_expert_intermediate_size"] = shared
    values["norm_topk_prob"] = False


def _qwen3moe(fields: _Fields, values: dict[str, Any]) -> None:
    _experts(fields, values)
    values["norm_topk_prob"] = True  # what llama.cpp does for this architecture
    values["attention_bias"] = fields.has_tensor("attn_q.bias")


def _qwen3(fields: _Fields, values: dict[str, Any]) -> None:
    values["attention_bias"] = fields.has_tensor("attn_q.bias")


def _window(fields: _Fields, values: dict[str, Any]) -> None:
    values["sliding_window"] = fields.get("attention.sliding_window") or None


def _stablelm(fields: _Fields, values: dict[str, Any]) -> None:
    said = fields.get("use_parallel_residual", bool)
    values["use_parallel_residual"] = not fields.has_tensor("ffn_norm.weight") if said is None else said
    values["use_qkv_bias"] = fields.has_tensor("attn_q.bias")


def _starcoder2(fields: _Fields, values: dict[str, Any]) -> None:
    _window(fields, values)
    values["use_bias"] = fields.has_tensor("attn_q.bias")


def _gemma(fields: _Fields, values: dict[str, Any], layers_of_27b: int) -> None:
    """Of the largest model of each generation, queries are scaled by another number."""
    largest = values["num_hidden_layers"] == layers_of_27b
    values["query_pre_attn_scalar"] = (
        values["hidden_size"] // values["num_attention_heads"] if largest else values["head_dim"]
    )


def _gemma2(fields: _Fields, values: dict[str, Any]) -> None:
    _gemma(fields, values, layers_of_27b=46)
    values["sliding_window"] = fields.get("attention.sliding_window", default=4096)
    values["attn_logit_softcapping"] = fields.get("attn_logit_softcapping", float, 50.0) or None
    values["final_logit_softcapping"] = fields.get("final_logit_softcapping", float, 30.0) or None


def _gemma3(fields: _Fields, values: dict[str, Any]) -> None:
    _gemma(fields, values, layers_of_27b=62)
    values["sliding_window"] = fields.size("attention.sliding_window")
    values["final_logit_softcapping"] = fields.get("final_logit_softcapping", float) or None
    period = fields.get("attention.sliding_window_pattern", default=6)
    if values["sliding_window"] < 1 or period < 1:
        raise ValueError(f"attention.sliding_window_pattern is {period}")
    values["layer_types"] = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(values["num_hidden_layers"])
    ]
    local = {"rope_type": "default", "rope_theta": fields.get("rope.freq_base_swa", float, LOCAL_THETA)}
    values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}


def _gpt2(fields: _Fields, values: dict[str, Any]) -> None:
    values["n_inner"] = values.pop("intermediate_size")
    for name in ("num_key_value_heads", "head_dim"):
        del values[name]


FAMILIES = {
    "llama": Family("llama", "rms_norm_eps", _llama),
    "qwen2": Family("qwen2", "rms_norm_eps"),
    "qwen3": Family("qwen3", "rms_norm_eps", _qwen3),
    "qwen2moe": Family("qwen2_moe", "rms_norm_eps", _qwen2moe),
    "qwen3moe": Family("qwen3_moe", "rms_norm_eps", _qwen3moe),
    "phi3": Family("phi3", "rms_norm_eps", _window, partial_rotary=True),
    "gemma2": Family("gemma2", "rms_norm_eps", _gemma2),
    "gemma3": Family("gemma3_text", "rms_norm_eps", _gemma3),
    "stablelm": Family("stablelm", "layer_norm_eps", _stablelm, partial_rotary=True),
    "starcoder2": Family("starcoder2", "norm_epsilon", _starcoder2),
    "nemotron": Family("nemotron", "norm_eps", partial_rotary=True),
    "gpt2": Family("gpt2", "layer_norm_epsilon", _gpt2, rotary=False),
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
