"""Reads and checks the `config.json` of a checkpoint: its size, its numbers and the token ids in it.

A config does not decide how the model runs here or whose code runs. Attention implementations, remote code, kernels and
caches that it names are left out.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    PretrainedConfig,
)

from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.source.checkpoint import StoredTensor

logger = logging.getLogger(__name__)

MOST_JSON_BYTES = 64 << 20
MOST_LAYERS = 10_000
"""A config with more layers is a mistake, which would otherwise take long to be found."""
BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), (1, MOST_LAYERS)),
    **dict.fromkeys(
        ("max_position_embeddings", "original_max_position_embeddings", "n_positions", "n_ctx"), (1, 1 << 40)
    ),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), (0, 1)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), (1, 1e18)),
    "factor": (1e-6, 1e6),
}
"""Bounds of a config's numbers that hold for all architectures; `factor` belongs to RoPE."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)
OPTIONAL = frozenset({"num_experts_per_tok", "shared_expert_intermediate_size", "n_routed_experts"})
"""Numbers that may be 0, which means that the model has none."""
SLACK = 1000
"""How many times a size may be larger than any size of a tensor: configs have sizes that their models do not use."""

FOREIGN = ("auto_map", "fusion_config", "transformers_weights", "distributed_config", "custom_generate")
"""Keys that name other code or other files."""
IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CompileError` if it cannot be read or holds something else."""
    if path.stat().st_size > MOST_JSON_BYTES:
        raise CompileError(f"{path} cannot be used: it is larger than {MOST_JSON_BYTES >> 20} MiB; fetch it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CompileError(f"{path} cannot be used: it is not JSON ({first_line(error)}); fetch it again") from error
    if not isinstance(value, dict):
        raise CompileError(f"{path} cannot be used: it is not a JSON object; fetch it again")
    return value


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in a folder. Raises `CompileError` if there is none that transformers can use."""
    file = folder / "config.json"
    if not file.is_file():
        raise CompileError(f"folder {folder} has no config.json; name the folder of a Hugging Face model")
    raw = read_json(file)
    for values in _nested(raw):
        for name, (least, most) in BOUNDS.items():
            number = values.get(name)
            if isinstance(number, (int, float)) and not least <= number <= most:
                raise CompileError(f"{name} in {file} is {_short(number)}, which no model has; correct it")
    if raw.get("auto_map") and raw.get("model_type") not in CONFIG_MAPPING:
        raise CompileError(
            f"the model in {folder} ({_short(raw.get('model_type'))}) needs Python code of its own, and code of a "
            f"checkpoint is never run; choose a model that transformers supports by itself"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=False, attn_implementation="eager", experts_implementation="eager"
        )
    except Exception as error:  # damaged files and unknown model types cause many kinds of errors
        raise CompileError(f"the config in {file} cannot be used: {first_line(error)}; correct it") from error
    return config


def _nested(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration and all configurations inside of it."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from _nested(value)


def check_causal_lm(name: str, config: PretrainedConfig) -> None:
    """Raises `CompileError` if the model is not a decoder-only language model with full-precision weights."""
    what = None
    if config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "an encoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "not a language model that transformers can generate with"
    if what:
        raise CompileError(f"model {name} ({config.model_type}) is {what}; only causal language models have a KV cache")
    if any(getattr(part, "quantization_config", None) for part in _parts(config)):
        raise CompileError(f"model {name} is stored quantized; compile its full-precision checkpoint")


def check_sizes(name: str, config: PretrainedConfig, stored: Mapping[str, StoredTensor]) -> None:
    """Raises `CompileError` if a size in the configuration is too large for the tensors of the checkpoint. This comes
    before anything is built from the configuration."""
    text = config.get_text_config()
    largest = max((size for tensor in stored.values() for size in tensor.shape), default=0)
    limits = dict.fromkeys(SIZES, SLACK * largest)
    limits |= dict.fromkeys(COUNTS, max(largest, len(stored)))  # each may be a module of its own, which takes time
    # where a layer has several attentions, num_hidden_layers counts these
    depth = "num_layers" if hasattr(type(text), "num_layers") else "num_hidden_layers"
    _check_size(name, depth, getattr(text, depth, None), layer_count(stored))
    # where layers differ, transformers does not tell a size of all of them
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    for layer in layers:
        for size, limit in limits.items():
            _check_size(name, size, getattr(layer, size, None), limit)


def _check_size(name: str, size: str, value: Any, limit: int) -> None:
    if isinstance(value, int) and not 1 <= value <= limit and not (value == 0 and size in OPTIONAL):
        raise CompileError(
            f"{size} in config.json of {name} is {value:,}, but the tensors of the checkpoint allow 1 to "
            f"{limit:,}; fetch config.json and the weights again"
        )


def layer_count(names: Collection[str]) -> int:
    """The number of layers by the names of a checkpoint's tensors: the length of the longest list of modules."""
    counts = [int(number) + 1 for name in names for number in re.findall(r"(?:^|\.)(\d{1,6})(?=\.)", name)[:1]]
    return max(counts, default=0)


def settle(config: PretrainedConfig) -> None:
    """Remove from a configuration all settings that decide how a model runs, and ids that are not tokens."""
    vocab_size = config.get_text_config().vocab_size
    for part in _parts(config):
        for name in FOREIGN:
            part.__dict__.pop(name, None)
        part._attn_implementation = part._experts_implementation = None
        part.use_cache, part.output_hidden_states, part.output_attentions = True, False, False
        for name in IDS:
            if getattr(part, name, None) is not None:
                setattr(part, name, usable_ids(name, getattr(part, name), vocab_size))


def _parts(config: PretrainedConfig) -> list[PretrainedConfig]:
    text = config.get_text_config()
    return [config] if text is config else [config, text]


def usable_ids(name: str, value: Any, vocab_size: int) -> Any:
    """A token id, or the ids of a list, that are tokens of the vocabulary; None if there are none.

    Other ids are left out with a warning and not refused: the model never makes such a token, and -1 is a common way to
    say "none".
    """
    ids = value if isinstance(value, list) else [value]
    kept = [token for token in ids if type(token) is int and 0 <= token < vocab_size]
    if len(kept) < len(ids):
        logger.warning("%s %s is not in the vocabulary of %s; left out", name, _short(value), f"{vocab_size:,}")
    if not kept:
        return None
    return kept if isinstance(value, list) else kept[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
