"""What a GGUF file says of its model is what is compiled; what is not understood is refused by its name."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source import source as source_module
from pmkvq_compiler.source.gguf_config import LLAMA3, llama3_factors
from pmkvq_compiler.source.gguf_header import GgufHeader, GgufTensor
from pmkvq_compiler.source.gguf_tensors import default_dtype
from pmkvq_compiler.source.source import open_source
from tests.gguf_files import gguf_file, logits
from tests.refusals import is_one_sentence, refusal

EXPERTS = {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ("llama", {"head_dim": 32}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
        ("phi3", {}),
        ("phi3", {"sliding_window": 24}),
        (
            "stablelm",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}},
        ),
        ("stablelm", {"use_qkv_bias": True}),
        ("starcoder2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
        ("starcoder2", {"sliding_window": 24, "tie_word_embeddings": False}),
        ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
        ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16, "final_logit_softcapping": 2.0}),
        ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}),
        ("nemotron", {"rope_parameters": {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5}}),
        ("gpt2", {}),
    ],
)
def test_a_gguf_file_is_the_model_it_was_written_from(
    tmp_path: Path, model_type: str, overrides: dict[str, Any]
) -> None:
    model = gguf_file(tmp_path / "model.gguf", model_type, **overrides)
    loaded = open_source(str(tmp_path / "model.gguf")).load_model("eager", dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    ("model_type", "header", "rope"),
    [
        ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        ("llama", {"rope.scale_linear": 4.0}, LINEAR),
        ("llama", {"rope.scaling.factor": 4.0}, LINEAR),
        ("qwen2", {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, LINEAR),
        (
            "qwen2",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.finetuned": True,
            },
            YARN,
        ),
        (
            "qwen3",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {**YARN, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
        ("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {"rope_type": "default"}),
        ("llama", {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0}, {"rope_type": "default"}),
    ],
)
def test_scaling_of_rope_in_the_header_is_applied(
    tmp_path: Path, model_type: str, header: dict[str, Any], rope: dict[str, Any]
) -> None:
    model = gguf_file(tmp_path / "model.gguf", model_type, header=header, rope_parameters={"rope_theta": 1e4, **rope})
    source = open_source(str(tmp_path / "model.gguf"))
    torch.testing.assert_close(
        logits(source.load_model("eager", dtype=torch.float64)), logits(model), rtol=0, atol=1e-4
    )


def test_yarn_turns_by_the_angles_of_llama_cpp(tmp_path: Path) -> None:
    """`rope_yarn` of llama.cpp, written again in float64."""
    theta, dimensions, original, factor = 1e4, 32, 256, 8.0
    header = {"rope.scaling.type": "yarn", "rope.scaling.factor": factor}
    header["rope.scaling.original_context_length"] = original
    gguf_file(tmp_path / "model.gguf", "qwen3", header=header, head_dim=dimensions)
    rotary = open_source(str(tmp_path / "model.gguf")).load_model("eager").model.rotary_emb

    def edge(turns: float) -> float:
        return dimensions * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(0, math.floor(edge(32))), min(dimensions - 1, math.ceil(edge(1)))
    pairs = torch.arange(dimensions // 2, dtype=torch.float64)
    mix = 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)
    extrapolated = theta ** (-2 * pairs / dimensions)
    expected = extrapolated / factor * (1 - mix) + extrapolated * mix
    torch.testing.assert_close(rotary.inv_freq.double(), expected, rtol=1e-5, atol=0)
    assert rotary.attention_scaling == pytest.approx(1 + 0.1 * math.log(factor))


def test_frequency_factors_of_llama_3_are_applied(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3}
    factors = llama3_factors(rope, 16)
    assert factors.max() == 8
    model = gguf_file(
        tmp_path / "model.gguf", tensors={"rope_freqs.weight": factors}, rope_parameters=rope, num_hidden_layers=2
    )
    plain = 5e5 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq.double(), plain / factors, rtol=1e-5, atol=0)
    source = open_source(str(tmp_path / "model.gguf"))
    torch.testing.assert_close(
        logits(source.load_model("eager", dtype=torch.float64)), logits(model), rtol=0, atol=1e-4
    )


def test_a_window_pattern_and_a_local_base_of_gemma_3_are_applied(tmp_path: Path) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    local, whole = ({"rope_type": "default", "rope_theta": theta} for theta in (2e4, 1e6))
    model = gguf_file(
        tmp_path / "model.gguf",
        "gemma3_text",
        header={"attention.sliding_window_pattern": 2, "rope.freq_base_swa": 2e4},
        num_hidden_layers=4,
        layer_types=kinds,
        sliding_window=8,
        query_pre_attn_scalar=16,
        rope_parameters={"sliding_attention": local, "full_attention": whole},
    )
    source = open_source(str(tmp_path / "model.gguf"))
    torch.testing.assert_close(
        logits(source.load_model("eager", dtype=torch.float64)), logits(model), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "RoPE scaling of type longrope"),
        ({"rope.scaling.type": "ntk", "rope.scaling.factor": 2.0}, "RoPE scaling of type ntk"),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.25}, "factor 0.25"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_ext_factor": 0.5}, "ext_factor"),
        ({"rope.dimension_count": 8}, "turns 8 of 16 channels"),
        ({"rope.dimension_sections": [4, 4, 0, 0]}, "rope.dimension_sections"),
        ({"attention.sliding_window": 64}, "llama.attention.sliding_window = 64"),
        ({"attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"attention.causal": False}, "attention.causal = False"),
        ({"attention.clamp_kqv": 8.0}, "attention.clamp_kqv"),
        ({"attention.value_length": 32}, "values of 32 channels"),
        ({"attention.head_count_kv": [2, 1, 2]}, r"head_count_kv is \[2, 1, 2\]"),
        ({"logit_scale": 0.0625}, "logit_scale"),
        ({"residual_scale": 0.2}, "residual_scale"),
        ({"embedding_scale": 12.0}, "embedding_scale"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"expert_count": 8, "expert_used_count": 2}, "expert_count = 8"),
        ({"a_key_of_tomorrow": 1.5}, "a_key_of_tomorrow"),
        ({"block_count": 2}, "block_count is 2, but the file has 3 layers"),
        ({"block_count": 1_000_000_000}, "block_count is 1,000,000,000"),
        ({"embedding_length": 1 << 40}, "token_embd.weight has shape"),
        ({"attention.head_count": 0}, "attention.head_count is 0"),
        ({"attention.head_count": None}, "attention.head_count is missing"),
        ({"attention.key_length": 1 << 40, "attention.value_length": 1 << 40}, "key_length"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
        ({"rope.freq_base": -1.0}, "base -1"),
        ({"rope.freq_base": 0.0}, "base 0"),
        ({"rope.dimension_count": 0}, "turns 0 of 16"),
        ({"attention.head_count_kv": 0}, "num_key_value_heads is 0"),
        ({"attention.key_length": 0}, "0"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.yarn_beta_fast": 0.0}, "from 1 to 0"),
        ({"context_length": "many"}, "context_length is 'many'"),
        ({"general.architecture": "mamba"}, "architecture is 'mamba'"),
        ({"tokenizer.ggml.tokens": ["x"] * 129}, "more than the 128 tokens"),
        ({"tokenizer.rope.freq_base": 5e5}, "but its architecture is llama"),
        ({"general.type": "adapter"}, "not a whole model"),
        ({"split.count": 3}, "one part of several files"),
    ],
)
def test_what_a_header_says_and_is_not_understood_is_refused(
    tmp_path: Path, header: dict[str, Any], words: str
) -> None:
    path = tmp_path / "model.gguf"
    gguf_file(path, header=header)
    with pytest.raises(CompileError, match=words) as caught:
        open_source(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "header",
    [
        {"attention.causal": True},
        {"general.name": "mistral"},
        {"general.name": None, "context_length": 2048},
        {"logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 0.0},
        {"attention.scale": 0.25},
        {"expert_count": 0, "expert_used_count": 0},
        {"tensor_data_layout": "Meta AI original pth", "general.license": "mit", "general.tags": ["whales"]},
        {"rope.dimension_count": None, "rope.freq_base": None, "attention.key_length": None},
    ],
)
def test_keys_that_change_nothing_are_passed_over(tmp_path: Path, header: dict[str, Any]) -> None:
    model = gguf_file(tmp_path / "model.gguf", header=header)
    loaded = open_source(str(tmp_path / "model.gguf")).load_model("eager", dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["blk.1.attn_q_norm.weight", "rope_factors_long.weight", "blk.0.attn_sinks.weight"])
def test_a_tensor_that_the_model_does_not_take_is_refused(tmp_path: Path, name: str) -> None:
    gguf_file(tmp_path / "model.gguf", tensors={name: torch.ones(16)})
    with pytest.raises(CompileError, match=f"takes no tensor {name}"):
        open_source(str(tmp_path / "model.gguf"))


def test_frequency_factors_of_nobody_are_refused(tmp_path: Path) -> None:
    gguf_file(tmp_path / "model.gguf", tensors={"rope_freqs.weight": torch.linspace(1, 8, 8)})
    with pytest.raises(CompileError, match=r"factors in rope_freqs\.weight are not those of Llama 3"):
        open_source(str(tmp_path / "model.gguf"))
    gguf_file(tmp_path / "model.gguf", tensors={"rope_freqs.weight": torch.ones(8)})
    assert open_source(str(tmp_path / "model.gguf")).config.rope_parameters["rope_type"] == "default"


def test_a_gguf_file_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    gguf_file(tmp_path / "model.gguf")
    assert open_source(str(tmp_path / "model.gguf")).tokenizer is None
    gguf_file(tmp_path / "model.gguf", tokenizer=True)
    tokenizer = open_source(str(tmp_path / "model.gguf")).tokenizer
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("the inner")) == "the inner"


@pytest.mark.parametrize(
    "header",
    [
        {"tokenizer.ggml.model": "whale"},
        {"tokenizer.ggml.tokens": None},
        {"tokenizer.ggml.merges": ["t"]},
        {"tokenizer.ggml.merges": ["t h e"]},
        {"tokenizer.ggml.bos_token_id": 4000},
        {"tokenizer.ggml.token_type": "x"},
        {"tokenizer.chat_template": 7},
    ],
)
def test_a_damaged_tokenizer_in_a_header_is_one_sentence_or_no_damage(tmp_path: Path, header: dict[str, Any]) -> None:
    gguf_file(tmp_path / "model.gguf", tokenizer=True, header=header)
    sentence = refusal(lambda: open_source(str(tmp_path / "model.gguf")).tokenizer)
    assert sentence is None or is_one_sentence(sentence)


def test_files_beside_a_gguf_file_or_in_the_current_folder_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "elsewhere").mkdir()
    model = gguf_file(tmp_path / "models" / "model.gguf", tokenizer=True)
    expected = open_source(str(tmp_path / "models" / "model.gguf"))
    ids, fingerprint = expected.tokenizer.encode("the inner"), expected.fingerprint
    for name in ("tokenizer_config.json", "config.json", "generation_config.json", "special_tokens_map.json"):
        (tmp_path / "models" / name).write_text('{"bos_token": "e", "add_bos_token": true, "auto_map": 1}')
    gguf_file(tmp_path / "elsewhere" / "model.gguf", seed=1)
    shutil.copy(tmp_path / "models" / "tokenizer_config.json", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    source = open_source("../models/model.gguf")
    assert source.tokenizer.encode("the inner") == ids
    assert source.fingerprint == fingerprint
    loaded = source.load_model("eager", dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("stored", "billions", "expected"),
    [
        (GGMLQuantizationType.Q4_K, 1.5, torch.bfloat16),
        (GGMLQuantizationType.F16, 7, torch.bfloat16),
        (GGMLQuantizationType.Q4_0, 0.9, torch.float32),
        (GGMLQuantizationType.F32, 7, torch.float32),
    ],
)
def test_auto_is_16_bits_for_models_above_a_billion_parameters(
    stored: GGMLQuantizationType, billions: float, expected: torch.dtype
) -> None:
    """Norms are in float32 whatever the rest is in."""
    rows = int(billions * 1e9) // 4096 // 8
    tensors = {f"blk.{layer}.ffn_up.weight": GgufTensor((rows, 4096), stored, 0, 0) for layer in range(8)}
    tensors |= {f"blk.{layer}.norm.weight": GgufTensor((4096,), GGMLQuantizationType.F32, 0, 0) for layer in range(8)}
    assert default_dtype(GgufHeader({}, tensors)) == expected


def test_auto_asks_the_file_and_the_user_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf_file(tmp_path / "model.gguf")
    assert open_source(str(tmp_path / "model.gguf")).dtype == torch.float32
    monkeypatch.setattr(source_module, "default_dtype", lambda header: torch.bfloat16)
    assert open_source(str(tmp_path / "model.gguf")).dtype == torch.bfloat16
    assert open_source(str(tmp_path / "model.gguf"), "float32").dtype == torch.float32
