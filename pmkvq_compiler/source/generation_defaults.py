"""The `generation_config.json` of a checkpoint. Options for sampling are kept. Options for caches and for speed are
left out, because the artifact has its own cache and code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.source.model_config import usable_ids

CACHES = ("use_cache", "cache_implementation", "cache_config", "max_cache_len", "return_legacy_cache")
SPECULATION = (
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_lookbehind",
    "assistant_ensemble_weight",
    "target_lookbehind",
    "prompt_lookup_num_tokens",
    "max_matching_ngram_size",
    "speculation_type",
    "use_mtp",
)
FOREIGN_CODE = (
    "custom_generate",
    "auto_map",
    "penalty_alpha",
    "low_memory",
    "dola_layers",
    "num_beam_groups",
    "diversity_penalty",
    "constraints",
    "force_words_ids",
)
"""Options of strategies whose code transformers would fetch from the hub."""
ARGUMENTS = (
    "assistant_model",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
)
"""Arguments of a call of `generate`, which are invalid in a configuration."""
RUNNING = ("compile_config", "disable_compile", "continuous_batching_config", "output_attentions")
DROPPED = frozenset({*CACHES, *SPECULATION, *FOREIGN_CODE, *ARGUMENTS, *RUNNING, "output_hidden_states"})

TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")
LENGTHS = ("max_length", "max_new_tokens")


def generation_defaults(values: dict[str, Any], vocab_size: int, where: str) -> GenerationConfig:
    """A configuration with those of the `values` that an artifact supports, and only with ids of its vocabulary.

    Raises `CompileError` if transformers refuses them; `where` says in the message where they come from.
    """
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if name in DROPPED or hasattr(GenerationConfig, name) or value is None:
            continue
        if name.endswith("_token_id") or name in TOKEN_LISTS:
            value = usable_ids(name, value, vocab_size)
        kept[name] = value
    try:
        config = GenerationConfig.from_dict(kept)
        config.to_json_string(use_diff=True)
    except Exception as error:  # values of wrong types cause many kinds of errors
        raise CompileError(f"{where} cannot be used: {first_line(error)}; correct it or remove it") from error
    return config


def save_generation_defaults(config: GenerationConfig, folder: Path, max_len: int) -> None:
    """Write `generation_config.json`, without lengths that are larger than the cache's `max_len` tokens."""
    values = config.to_diff_dict()
    for name in LENGTHS:
        if isinstance(values.get(name), int) and values[name] > max_len:
            del values[name]
    GenerationConfig.from_dict(values).to_json_file(folder / "generation_config.json", use_diff=True)
