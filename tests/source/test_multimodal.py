"""Of a multimodal model the language model inside is compiled; for text alone it computes what the whole model does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.source import open_source
from tests.families import EXPERTS, FAMILIES
from tests.fuzz import chosen
from tests.hybrids import HYBRIDS
from tests.models import SHAPE
from tests.programs import relative_error
from tests.test_families import exact_model, located_source

TEXT = {**SHAPE, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = {**VISION, "image_size": 16, "patch_size": 8}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
INTERLEAVED = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
QWEN = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64, "patch_size": 8}

WHOLE: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 16},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGLIP, "model_type": "clip_vision_model"},
        "image_token_id": 3,
    },
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
        "image_token_id": 3,
        "scale_factor": 2,
    },
    "qwen2_vl": {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": {**QWEN, "embed_dim": 32}},
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN, "image_token_id": 3},
    "qwen3_vl": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, **EXPERTS, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **HYBRIDS["qwen3_5_text"], "rope_parameters": INTERLEAVED},
        "vision_config": {**QWEN, "num_position_embeddings": 16},
    },
    "qwen3_5_moe": {
        "text_config": {**TEXT, **HYBRIDS["qwen3_5_moe_text"], "rope_parameters": INTERLEAVED},
        "vision_config": {**QWEN, "num_position_embeddings": 16},
    },
    "lfm2_vl": {
        "text_config": {**TEXT, **HYBRIDS["lfm2"], "model_type": "lfm2"},
        "vision_config": {**SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 4},
    },
    "gemma4": {
        "text_config": {**TEXT, **FAMILIES["gemma4"].overrides},
        "vision_config": {**SIGLIP, "head_dim": 16, "num_key_value_heads": 2, "global_head_dim": 16},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [8, 8]},
    },
    "llama4": {
        "text_config": {**TEXT, **FAMILIES["llama4"].overrides},
        "vision_config": {**SIGLIP, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
    },
}
REFUSED: dict[str, dict[str, Any]] = {
    "glm4v": {
        "text_config": {**TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        "vision_config": QWEN,
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma"},
        "vision_config": {**SIGLIP, "model_type": "siglip_vision_model", "projection_dim": 64},
        "image_token_id": 3,
        "projection_dim": 64,
    },
}
"""One whose language model transformers cannot generate with alone, and one that reads prompts in both directions."""
EARLIER = {
    "gemma3": {"model.language_model.": "language_model.model.", "model.": ""},
    "qwen2_5_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "llava": {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""},
}
"""How the tensors of checkpoints of earlier versions are called: beginnings of names, and what they were."""


def whole_model(model_type: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**WHOLE, **REFUSED}[model_type])
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    return model


def rename(folder: Path, names: dict[str, str]) -> None:
    """Store the tensors under other names: of each, the first beginning that fits is replaced."""

    def renamed(name: str) -> str:
        old = next((one for one in names if name.startswith(one)), None)
        return name if old is None else names[old] + name[len(old) :]

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("model_type", chosen(WHOLE, "gemma3", "qwen2_5_vl"))
def test_the_language_model_computes_what_the_whole_one_does(model_type: str, tmp_path: Path) -> None:
    whole = whole_model(model_type, tmp_path)
    source, program = located_source(tmp_path)
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected: Tensor = whole(input_ids=ids).logits
    assert relative_error(exact_model(source, program, tmp_path)(ids), expected) <= 1e-5
    with torch.no_grad():
        assert relative_error(source.load_model("eager")(ids).logits, expected) <= 1e-5
    assert source.whole is not None
    assert source.whole.modules
    assert all("lang" not in module and module != "layers" for module in source.whole.modules)


@pytest.mark.parametrize("model_type", chosen(EARLIER, "llava", "qwen2_5_vl"))
def test_names_of_earlier_checkpoints_are_known(model_type: str, tmp_path: Path) -> None:
    whole_model(model_type, tmp_path)
    before = open_source(str(tmp_path))
    rename(tmp_path, {"model.language_model.": "model.language_model.", "lm_head.": "lm_head.", "model.": "model."})
    rename(tmp_path, EARLIER[model_type])
    after = open_source(str(tmp_path))
    assert after.config.to_dict() == before.config.to_dict()
    for name in before.load_model("eager").state_dict():
        assert torch.equal(after.read(name), before.read(name))


def test_two_language_models_are_refused(tmp_path: Path) -> None:
    whole_model("llava", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("embed_tokens.weight", "layers.0.weight"):
        tensors[f"draft.{name}"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompileError, match="holds 2 language models"):
        open_source(str(tmp_path))


def test_a_language_model_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    whole_model("llava", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = {"model_type": "qwen2_5_omni_text", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CompileError, match="no causal language model for the qwen2_5_omni_text inside it"):
        open_source(str(tmp_path))


def test_a_known_model_without_a_language_model_of_its_own_is_refused(tmp_path: Path) -> None:
    whole_model("glm4v", tmp_path)
    with pytest.raises(CompileError, match="no causal language model for the glm4v_text inside it"):
        open_source(str(tmp_path))


def test_a_model_whose_prompts_are_not_read_causally_is_refused(tmp_path: Path) -> None:
    whole_model("paligemma", tmp_path)
    with pytest.raises(CompileError, match=r"\(paligemma\) lets the tokens of a prompt see those that come after them"):
        open_source(str(tmp_path))
