"""Finds the language model inside a multimodal model, which is what can be compiled.

Such a model's config holds the config of a language model, and its checkpoint holds that model's tensors under names of
its own. What turns images, video or sound into embeddings is not compiled: it is left out, or copied beside what is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PretrainedConfig,
)

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.checkpoint import Checkpoint, StoredTensor

SAME_AS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
}
"""Language models that are, for text alone, a model type that transformers can generate with, with these settings. They
differ in the positions of images; a text's positions are the same along all three axes."""

SECTIONS = ("mrope_section", "mrope_interleaved")
"""Parameters of RoPE that divide its channels among these axes."""

EMBEDDING, FIRST_LAYER, HEAD = "embed_tokens.weight", "layers.0.", "lm_head.weight"
INNER = "model."
"""How the names of a causal language model's tensors begin, but for that of its head."""


@dataclass(frozen=True)
class LanguageModel:
    """The config of the language model inside a multimodal one, and the config of the whole."""

    config: PretrainedConfig
    whole: PretrainedConfig


@dataclass(frozen=True)
class Whole:
    """The multimodal model around a language model: its config, how the names of the language model's tensors begin
    alone and in this model's checkpoint, and the tensors of its other `modules`."""

    config: PretrainedConfig
    beginnings: Mapping[str, str]
    modules: tuple[str, ...]
    others: Checkpoint

    @property
    def architecture(self) -> str | None:
        """transformers' class for the whole model, if it is one of images and text."""
        found: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(self.config), None)
        return None if found is None else str(found.__name__)


def language_model(name: str, whole: PretrainedConfig) -> LanguageModel | None:
    """The language model inside the multimodal model called `name`; None if `whole` is the config of another model.

    Raises `CompileError` if transformers cannot generate with this language model alone, or if it is not causal.
    """
    text = getattr(whole, "text_config", None)
    if not isinstance(text, PretrainedConfig) or whole.is_encoder_decoder or text.is_encoder_decoder:
        return None
    if getattr(text, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise CompileError(
            f"model {name} ({whole.model_type}) lets the tokens of a prompt see those that come after them, which a "
            f"cache that grows token by token cannot represent; choose another model"
        )
    config = _as_known_type(text)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(whole) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            return None
        raise CompileError(
            f"model {name} ({whole.model_type}) is multimodal, and transformers has no causal language model for the "
            f"{text.model_type} inside it; choose a model whose language model it can generate with"
        )
    config.tie_word_embeddings = bool(getattr(whole, "tie_word_embeddings", config.tie_word_embeddings))
    for setting in ("dtype", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, setting, None) is None and getattr(whole, setting, None) is not None:
            setattr(config, setting, getattr(whole, setting))
    return LanguageModel(config, whole)


def _as_known_type(text: PretrainedConfig) -> PretrainedConfig:
    if text.model_type not in SAME_AS:
        return text
    values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    parameters = {name: value for name, value in (text.rope_parameters or {}).items() if name not in SECTIONS}
    if parameters.get("rope_type") == "mrope":
        parameters["rope_type"] = "default"
    model_type, settings = SAME_AS[text.model_type]
    config: PretrainedConfig = CONFIG_MAPPING[model_type](**{**values, **settings, "rope_parameters": parameters})
    return config


def only_language(name: str, found: LanguageModel, checkpoint: Checkpoint) -> tuple[Checkpoint, Whole]:
    """The tensors of the language model under the names of a model of its own, and the whole model around it.

    Raises `CompileError` if the checkpoint does not hold exactly one language model.
    """
    prefixes = [
        stored.removesuffix(EMBEDDING)
        for stored in checkpoint.tensors
        if stored.endswith(EMBEDDING) and _has_layers(stored.removesuffix(EMBEDDING), checkpoint.tensors)
    ]
    if len(prefixes) != 1:
        raise CompileError(
            f"the checkpoint of {name} ({found.whole.model_type}) holds {len(prefixes)} language models by the names "
            f"of its tensors, where one was expected; fetch it again, or choose another model"
        )
    names = {
        stored: INNER + stored[len(prefixes[0]) :] for stored in checkpoint.tensors if stored.startswith(prefixes[0])
    }
    names |= {stored: HEAD for stored in checkpoint.tensors if stored.endswith(HEAD)}
    if HEAD not in names.values():
        found.config.tie_word_embeddings = True
    others = [stored for stored in checkpoint.tensors if stored not in names]
    beginnings = {own: stored for stored, own in names.items() if own == HEAD} | {INNER: prefixes[0]}
    kept = checkpoint.renamed({stored: stored for stored in others})
    whole = Whole(found.whole, beginnings, _modules(others), kept)
    return checkpoint.renamed(names), whole


def _has_layers(prefix: str, tensors: Mapping[str, StoredTensor]) -> bool:
    return any(stored.startswith(prefix + FIRST_LAYER) for stored in tensors)


def _modules(stored: list[str]) -> tuple[str, ...]:
    """The outermost modules that tensors belong to, by their names."""
    return tuple(dict.fromkeys(name.removeprefix(INNER).partition(".")[0] for name in stored))
