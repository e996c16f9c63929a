"""Tiny hybrids: model types in which some layers have another state instead of attention, or beside it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, sequence_bytes
from pmkvq_compiler.unquantized import exact_plan

from .emit.test_emit import module_of
from .models import tiny_model
from .programs import captured_once, compiled_model

MAX_LEN, BATCH_SIZE = 160, 3

DELTA: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2}
LATENT: dict[str, Any] = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
THREE: dict[str, Any] = {"num_hidden_layers": 3}

HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 32},
    "olmo_hybrid": {**DELTA, "linear_num_value_heads": 2},
    "kimi_linear": {
        **LATENT,
        **EXPERTS,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "first_k_dense_replace": 1,
    },
    "lfm2": {**THREE, "layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3},
    "lfm2_moe": {**THREE, **EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "lfm3": {**THREE, "layer_types": ["conv", "full_attention", "conv"]},
    "granitemoehybrid": {
        **MAMBA2,
        **THREE,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_expand": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "bamba": {**MAMBA2, **THREE, "attn_layer_indices": [1], "mamba_expand": 2},
    "falcon_h1": {**MAMBA2, **THREE, "mamba_d_ssm": 128},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 32,
    },
    "jamba": {**THREE, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "bailing_hybrid": {
        **LATENT,
        **EXPERTS,
        **THREE,
        "layer_group_size": 3,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}
"""What makes a tiny model of each type, beside `tests.models.SHAPE`."""


@functools.cache
def located(model_type: str, **changes: Any) -> tuple[PreTrainedModel, Program]:
    """A tiny model of transformers with `changes` of its configuration, and its program."""
    source = tiny_model(model_type, **{**HYBRIDS[model_type], **changes})
    program = captured_once(source.config)
    locate(program, model_type)
    return source, program


@functools.cache
def hybrid(model_type: str, **changes: Any) -> tuple[PreTrainedModel, CompiledModel]:
    """The model, and its compiled form without quantization."""
    source, program = located(model_type, **changes)
    program = program.copy()
    plan = exact_plan(program.sites, MAX_LEN, BATCH_SIZE, torch.float32, 16, program.states)
    run_passes(program, pipeline({}, {}, {}, plan))
    return source, compiled_model(module_of(model_source(program)), plan, program, source.state_dict())


def at_eight_bits(model: CompiledModel) -> CompiledModel:
    """The same model with a cache whose blocks of 16 tokens are at 8 bits from the beginning."""
    return replace(model, plan=_eight_bits(model.plan))


def _eight_bits(plan: CachePlan) -> CachePlan:
    layers: list[LayerPlan] = []
    for exact in plan.layers:
        bits: dict[str, Any] = {"key_bits": 8, "value_bits": 8, "stages": ((8, 8),)}
        layer = replace(exact, **bits, key_axis="channel", sink=1, window=16, block=16)
        layers.append(replace(layer, arena_bytes=BATCH_SIZE * sequence_bytes(layer, MAX_LEN, 4)))
    return replace(plan, budget=sum(layer.arena_bytes for layer in layers), layers=tuple(layers))
