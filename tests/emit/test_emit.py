from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.emit.package import emit_package, plan_source, write_project
from pmkvq_compiler.emit.tensor_file import DTYPE_NAMES, TensorSpec, write_tensors
from pmkvq_compiler.emit.weights import write_weights
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program, RowScale
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.source.source import open_source
from tests.conftest import silent
from tests.first_calls import check_first_calls
from tests.models import SHAPE, tiny_folder, tiny_model
from tests.programs import MAX_LEN, compiled_model, full_plan, located, relative_error

LATENT_ATTENTION = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
EXPERTS: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {}),
    ("qwen3_moe", {"mlp_only_layers": [1]}),
    ("gpt_oss", {"sliding_window": 8}),
    ("deepseek_v3", LATENT_ATTENTION),
]
ARCHITECTURES: list[tuple[str, dict[str, Any]]] = [
    *EXPERTS,
    ("llama", {"tie_word_embeddings": True}),
    ("qwen2", {}),
    ("mistral", {"sliding_window": 8}),
    ("qwen3", {}),
    ("gemma2", {"sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8}),
    ("gpt_neox", {}),
    ("starcoder2", {}),
    ("granite", {"attention_multiplier": 0.25}),  # its default of 1 makes attention so sharp that rounding shows
    ("olmo2", {}),
    ("stablelm", {}),
    ("stablelm", {"qk_layernorm": True}),  # a list of norms, called by numbers
    ("cohere", {}),
    ("gpt2", {}),
    ("opt", {}),
]


def lowered(model_type: str, **overrides: Any) -> Program:
    program = located(model_type, **overrides)
    run_passes(program, pipeline({}, {}, {}, full_plan(program.sites)))
    return program


@pytest.fixture
def emitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the package `tiny_llama`, importable, of a tiny Llama with its weights."""
    source = open_source(str(tiny_folder(tmp_path / "source", "llama")), "auto")
    emit_package(lowered("llama"), source, tmp_path / "artifact", "tiny_llama")
    monkeypatch.syspath_prepend(str(tmp_path / "artifact"))
    yield tmp_path / "artifact"
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_llama"]:
        del sys.modules[name]


def module_of(text: str) -> ModuleType:
    """Run a generated file beside the runtime of the compiler."""
    module = ModuleType("pmkvq_compiler._generated")
    module.__package__ = "pmkvq_compiler"
    exec(compile(text, "model.py", "exec"), module.__dict__)
    return module


def run_in_pieces(code: ModuleType, program: Program, weights: dict[str, Tensor], input_ids: Tensor) -> Tensor:
    """Logits of `input_ids` [B, S] given half first, then all but one, then one: prefill, more of it, a decode step."""
    hidden_states, logits = code.bind(weights)
    cache = Cache(full_plan(program.sites), input_ids.shape[0], MAX_LEN, torch.float32, torch.device("cpu"))
    length, outputs, start = input_ids.shape[1], [], 0
    for stop in (length // 2, length - 1, length):
        positions = torch.arange(start, stop).expand(input_ids.shape[0], -1)
        cache.begin([slice(0, stop - start)] * input_ids.shape[0])
        outputs.append(logits(hidden_states(input_ids[:, start:stop], positions, cache)))
        cache.end()
        start = stop
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("model_type", "overrides"), ARCHITECTURES)
@torch.no_grad()
def test_generated_code_computes_the_logits_of_transformers(model_type: str, overrides: dict[str, Any]) -> None:
    program, model = lowered(model_type, **overrides), tiny_model(model_type, **overrides)
    model.set_attn_implementation("eager")
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(3))
    weights = {name: model.state_dict()[name] for name in program.weights.values()}
    weights |= {constant.name: constant.value for constant in program.constants.values()}
    out = run_in_pieces(module_of(model_source(program)), program, weights, input_ids)
    assert relative_error(out, model(input_ids).logits) <= 1e-6


@pytest.mark.parametrize(("model_type", "overrides"), EXPERTS)
def test_the_first_calls_of_models_with_experts_are_found_in_every_dtype(
    model_type: str, overrides: dict[str, Any]
) -> None:
    program, weights = lowered(model_type, **overrides), tiny_model(model_type, **overrides).state_dict()
    text = model_source(program)
    assert "ops.grouped_mm(" in text
    check_first_calls(compiled_model(module_of(text), full_plan(program.sites), program, weights), program)


@torch.no_grad()
def test_generated_code_computes_in_the_dtype_of_its_weights() -> None:
    program, model = lowered("llama"), tiny_model("llama", dtype=torch.bfloat16)
    input_ids = torch.randint(3, SHAPE["vocab_size"], (2, 21), generator=torch.Generator().manual_seed(3))
    weights = {name: model.state_dict()[name] for name in program.weights.values()}
    weights |= {constant.name: constant.value for constant in program.constants.values()}
    out = run_in_pieces(module_of(model_source(program)), program, weights, input_ids)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, model(input_ids).logits) <= 2e-2


def test_generated_code_has_one_function_for_equal_layers() -> None:
    text = model_source(lowered("llama"))
    assert re.findall(r"^def (\w+)", text, re.MULTILINE) == ["decoder_layer", "hidden_states", "logits", "bind"]
    assert "for layer in range(3):" in text
    assert max(map(len, text.splitlines())) <= 120


def test_generated_code_calls_a_norm_in_one_line() -> None:
    text = model_source(lowered("olmo2"))
    assert 'F.rms_norm(down_proj, [64], weights[path + "post_feedforward_layernorm.weight"], 1e-05)' in text
    assert text.count("F.rms_norm(") == 5
    assert "rsqrt" not in text


def test_generated_code_calls_fused_ops_and_says_what_they_read() -> None:
    code = module_of(model_source(lowered("qwen2")))
    q, k, v = (f"model.layers.{{layer}}.self_attn.{name}_proj" for name in "qkv")
    gate, up = (f"model.layers.{{layer}}.mlp.{name}_proj.weight" for name in ("gate", "up"))
    biases = tuple(f"{name}.bias" for name in (q, k, v))
    assert {*code.JOINED} == {tuple(f"{name}.weight" for name in (q, k, v)), biases, (gate, up)}
    text = model_source(lowered("qwen2"))
    for call in ("ops.linears(", "ops.rope([", "ops.gated_linear(", "ops.linear_add("):
        assert call in text


def test_generated_code_without_joined_tensors_is_code() -> None:
    assert module_of(model_source(lowered("gpt_neox"))).JOINED == ()


def test_generated_code_is_the_same_each_time() -> None:
    assert len({model_source(lowered("gpt_oss")) for _ in range(6)}) == 1


def test_generated_code_of_two_kinds_of_layers() -> None:
    text = model_source(lowered("qwen3_moe", mlp_only_layers=[1]))
    calls = re.findall(r"hidden = (decoder_layer\w*)\(weights, (\w+)", text)
    assert calls == [("decoder_layer", "0"), ("decoder_layer_2", "1"), ("decoder_layer", "2")]


def test_package_needs_torch_and_safetensors_alone(emitted: Path) -> None:
    package = importlib.import_module("tiny_llama")
    assert package.__file__ == str(emitted / "tiny_llama" / "__init__.py")
    assert package.load.__module__ == "tiny_llama"
    plan = importlib.import_module("tiny_llama.plan").PLAN
    assert plan.to_json() == full_plan(located("llama").sites).to_json()
    for path in (emitted / "tiny_llama").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (transformers|pmkvq_compiler)", path.read_text(), re.MULTILINE)


def test_package_says_what_it_is(emitted: Path) -> None:
    card = ModelCard.load(emitted / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert {"kv-cache-quantization", "custom_code"} <= set(card.data.tags)
    assert "from tiny_llama import load" in card.text
    assert "an ordinary LlamaForCausalLM" in card.text
    assert list(load_file(emitted / "tiny_llama" / "constants.safetensors")) == ["model.rotary_emb.inv_freq"]


def test_card_names_the_model_that_it_comes_from(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "source", "llama")
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: some/model\n---\n")
    emit_package(lowered("llama"), open_source(str(folder), "auto"), tmp_path / "artifact", "tiny_llama")
    data = ModelCard.load(tmp_path / "artifact" / "README.md").data
    assert (data.license, data.base_model) == ("mit", "some/model")
    assert data.to_dict()["base_model_relation"] == "quantized"


def test_project_lists_everything_that_a_wheel_carries(emitted: Path) -> None:
    (emitted / "config.json").touch()
    write_project(emitted, "tiny_llama", "tiny llama")
    project = tomllib.loads((emitted / "pyproject.toml").read_text())
    assert project["project"]["name"] == "tiny-llama"
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert set(carried) == {path.name for path in emitted.iterdir()} - {"tiny_llama"} | {"pmkvq.json"}
    assert set(carried.values()) == {f"tiny_llama/artifact/{name}" for name in carried}


def test_plan_says_once_what_all_layers_share() -> None:
    program = lowered("gemma2", sliding_window=8)
    plan = full_plan(program.sites)
    text = plan_source(plan)
    assert text.count("num_key_value_heads") == 1
    assert text.count("sliding_window=8") == 2
    assert plan == module_of(text).PLAN


@pytest.fixture
def program() -> Program:
    return lowered("llama")


def test_weights_are_sharded_and_edited(program: Program, tmp_path: Path) -> None:
    state = tiny_model("llama").state_dict()
    scaled, factors = "model.layers.1.self_attn.k_proj.weight", torch.linspace(0.5, 2, 32, dtype=torch.float64)
    program.edits.append(RowScale(scaled, 0, factors))
    sizes = write_weights(program, state.__getitem__, tmp_path, torch.bfloat16, 20_000, silent)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(sizes) > 1
    assert set(index["weight_map"]) == set(program.weights.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    for name, size in sizes.items():
        tensors = load_file(tmp_path / name)
        assert size <= 20_000
        assert sum(value.nbytes for value in tensors.values()) == size
        for tensor, value in tensors.items():
            assert index["weight_map"][tensor] == name
            expected = state[tensor].double() * factors.unsqueeze(1) if tensor == scaled else state[tensor]
            assert torch.equal(value, expected.to(torch.bfloat16))


def test_few_weights_are_one_file(program: Program, tmp_path: Path) -> None:
    state = tiny_model("llama").state_dict()
    write_weights(program, state.__getitem__, tmp_path, torch.float32, 10**9, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "model.safetensors").items())


def test_a_file_of_tensors_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    """Every dtype, odd sizes that would misalign wider dtypes, empty tensors and names that are not ASCII."""
    tensors = {f"{dtype}": (7 * torch.rand(3, 5)).to(dtype) for dtype in DTYPE_NAMES}
    tensors |= {
        "b.empty": torch.zeros(0, 4),
        'a.\u00e9"quoted"': torch.ones(1, dtype=torch.bfloat16),
        "c": torch.ones(()),
    }
    specs = [TensorSpec(name, value.shape, value.dtype) for name, value in tensors.items()]
    write_tensors(tmp_path / "ours", specs, lambda spec: tensors[spec.name], {"format": "pt"})
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    loaded = load_file(tmp_path / "ours")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in tensors.items()
    )
    assert (tmp_path / "ours").stat().st_size == (tmp_path / "theirs").stat().st_size
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


PEAK = """
import re, resource, sys
from pathlib import Path
import torch
from pmkvq_compiler.emit import weights
from pmkvq_compiler.source.source import open_source
from tests.conftest import silent
from tests.programs import located
weights.SHARDS_AT_ONCE = 2
source = open_source(sys.argv[1])
program = located("llama", vocab_size=1 << 18, hidden_size=256)
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
weights.write_weights(program, source.read, Path(sys.argv[2]), torch.bfloat16, 150 << 20, silent)
print((int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10) - before)
"""


def test_writing_weights_takes_the_memory_of_the_tensors_that_are_written_at_the_moment(tmp_path: Path) -> None:
    """The embedding and the head have 128 MiB each, and are written at the same time."""
    (tmp_path / "out").mkdir()
    tiny_model("llama", vocab_size=1 << 18, hidden_size=256).to(torch.bfloat16).save_pretrained(tmp_path / "source")
    command = [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "out")]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert int(done.stdout.splitlines()[-1]) < 650, "MiB"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.full((64,), float("nan")), "model.norm.weight holds NaN or infinity in the checkpoint"),
        (torch.full((64,), 1e6), "model.norm.weight holds NaN or infinity in float16"),
        (torch.ones(32), r"model.norm.weight has shape \[32\], but the configuration says \[64\]"),
    ],
)
def test_unusable_weights_are_refused(program: Program, tmp_path: Path, value: Tensor, reason: str) -> None:
    state = {**tiny_model("llama").state_dict(), "model.norm.weight": value}
    with pytest.raises(CompileError, match=reason):
        write_weights(program, state.__getitem__, tmp_path, torch.float16, 10**9, silent)
