"""Model types that people download: what makes a tiny model of each, and what the compiler folds into its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite

PART = "RoPE turns only"
NEIGHBOURS = "RoPE pairs neighbouring channels"
HALVES = "concatenates halves that RoPE has turned"
LATENT = "the cache holds latents"
NO_ROPE = "there is no RoPE between k_proj"
NORM = "a norm sits between k_proj and the attention"
SHARED = "several layers attend to the same keys and values"
BEFORE = "sits between k_proj and RoPE"
FUSED = "concatenates the channels that RoPE has turned with a part that has no channels"

IN_WORDS = {
    PART: "RoPE turns only some channels",
    NEIGHBOURS: "RoPE pairs neighbouring channels",
    HALVES: "RoPE has another form",
    LATENT: "keys are also values",
    NO_ROPE: "there is no RoPE",
    NORM: "a norm comes last",
    SHARED: "several layers read the keys",
    BEFORE: "something else comes before RoPE",
    FUSED: "q, k and v come from one projection",
}
"""The reasons as the guide says them."""


@dataclass(frozen=True)
class Family:
    """`keys` are the reasons, by layer, why scales of K are not folded (None: they are), and `values` says whether maps
    of V are. One entry stands for all layers. `note` is what is special about the family's attention."""

    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str | None, ...] = (None,)
    values: bool = True
    note: str = ""

    def explains(self, sites: Sequence[AttentionSite]) -> bool:
        """Whether what can be folded at these attentions, and why not, is what the table says."""
        reasons = self.keys * len(sites) if len(self.keys) == 1 else self.keys
        return all(
            (site.reason is None if reason is None else reason in str(site.reason))
            and can_transform(site) == self.values
            for site, reason in zip(sites, reasons, strict=False)
        )

    def row(self, name: str) -> str:
        """The family's row of the table in the guide `examples/how_it_works`."""
        reasons = list(dict.fromkeys(reason for reason in self.keys if reason is not None))
        answer = "in some layers; in others " if None in self.keys else "no: "
        keys = answer + " or ".join(IN_WORDS[reason] for reason in reasons) if reasons else "yes"
        return f"| {name} | {self.note} | {keys} | {'yes' if self.values else 'no'} |"


SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 8}
FIVE = {"num_hidden_layers": 5, "layer_types": ["sliding_attention", *["sliding_attention", "full_attention"] * 2]}
FIVE |= {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
ROUTED |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LATENTS = {"q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
LATENTS |= {"head_dim": 8, "num_key_value_heads": 4}
PER_LAYER = {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2}

LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 128}
LONGROPE |= {"short_factor": [1 + n / 8 for n in range(8)], "long_factor": [2 + n / 8 for n in range(8)]}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "mistral": Family("mistral", {"sliding_window": 8}, note="sliding windows"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", note="norms of Q and K"),
    "qwen3_moe": Family("qwen3_moe", EXPERTS, note="norms of Q and K"),
    "gemma2": Family("gemma2", SLIDING, note="sliding windows, soft caps"),
    "gemma3_text": Family("gemma3_text", SLIDING, note="sliding windows, norms of Q and K"),
    "gemma3n": Family(
        "gemma3n_text",
        {
            **FIVE,
            **PER_LAYER,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0, 0.0],
        },
        keys=(None, SHARED, SHARED, SHARED, SHARED),
        values=False,
        note="the last layers share caches, sliding windows",
    ),
    "gemma4": Family(
        "gemma4_text",
        {**FIVE, **PER_LAYER, "global_head_dim": 32, "num_global_key_value_heads": 1},
        keys=(None, SHARED, SHARED, SHARED, SHARED),
        values=False,
        note="the last layers share caches, sliding windows",
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
        keys=(HALVES,),
        note="sliding windows, sinks",
    ),
    "deepseek_v2": Family("deepseek_v2", {**ROUTED, **LATENTS}, keys=(LATENT,), values=False, note="latent attention"),
    "deepseek_v3": Family("deepseek_v3", {**ROUTED, **LATENTS}, keys=(LATENT,), values=False, note="latent attention"),
    "glm4_moe": Family("glm4_moe", ROUTED, keys=(PART,), note="partial RoPE"),
    "glm4_moe_lite": Family(
        "glm4_moe_lite", {**ROUTED, **LATENTS}, keys=(LATENT,), values=False, note="latent attention"
    ),
    "minicpm3": Family("minicpm3", LATENTS, keys=(LATENT,), values=False, note="latent attention"),
    "olmo2": Family("olmo2", note="norms of Q and K"),
    "olmo3": Family("olmo3", SLIDING, note="sliding windows, norms of Q and K"),
    "phi3": Family("phi3", keys=(FUSED,), values=False),
    "phi3, longrope": Family(
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
        keys=(FUSED,),
        values=False,
        note="up to the length where the frequencies change",
    ),
    "llama, dynamic": Family(
        "llama",
        {"rope_parameters": DYNAMIC, "max_position_embeddings": 128},
        note="up to the length where the frequencies change",
    ),
    "smollm3": Family(
        "smollm3", {"num_hidden_layers": 4}, keys=(None, None, None, NO_ROPE), note="one layer in four without RoPE"
    ),
    "llama4": Family(
        "llama4_text",
        {"num_hidden_layers": 4, "attention_chunk_size": 12, "num_local_experts": 4, "intermediate_size_mlp": 96}
        | {"floor_scale": 16},
        keys=(NORM, NORM, NORM, NO_ROPE),
        note="chunks, layers without RoPE",
    ),
    "cohere2": Family(
        "cohere2", SLIDING, keys=(NEIGHBOURS, NO_ROPE, NEIGHBOURS), note="sliding windows, layers without RoPE"
    ),
    "exaone4": Family(
        "exaone4", SLIDING, keys=(None, NORM, None), note="sliding windows, norms of Q and K, layers without RoPE"
    ),
    "ernie4_5": Family("ernie4_5", keys=(NEIGHBOURS,)),
}

DELTA, CONVOLUTIONS, SCANS = "gated delta rules beside it", "short convolutions beside it", "Mamba scans beside it"
HYBRID_FAMILIES: dict[str, Family] = {
    "qwen3_next": Family("qwen3_next", keys=(PART,), values=False, note=f"{DELTA}, partial RoPE"),
    "qwen3_5": Family("qwen3_5_text", keys=(PART,), values=False, note=f"{DELTA}, partial RoPE"),
    "qwen3_5_moe": Family("qwen3_5_moe_text", keys=(PART,), values=False, note=f"{DELTA}, partial RoPE"),
    "olmo_hybrid": Family("olmo_hybrid", note=DELTA),
    "kimi_linear": Family("kimi_linear", keys=(LATENT,), values=False, note=f"{DELTA}, latent attention"),
    "bailing_hybrid": Family("bailing_hybrid", keys=(LATENT,), values=False, note=f"{DELTA}, latent attention"),
    "lfm2": Family("lfm2", note=CONVOLUTIONS),
    "lfm2_moe": Family("lfm2_moe", note=CONVOLUTIONS),
    "lfm3": Family("lfm3", values=False, note=CONVOLUTIONS),
    "granitemoehybrid": Family("granitemoehybrid", keys=(NO_ROPE,), note=f"{SCANS}, without RoPE"),
    "bamba": Family("bamba", keys=(PART,), note=f"{SCANS}, partial RoPE"),
    "falcon_h1": Family("falcon_h1", keys=(BEFORE,), note=f"{SCANS}, in every layer"),
    "nemotron_h": Family("nemotron_h", keys=(NO_ROPE,), note=f"{SCANS}, without RoPE"),
    "jamba": Family("jamba", keys=(NO_ROPE,), note=f"{SCANS}, without RoPE"),
}
"""Families whose tiny models are made in `hybrids`."""
