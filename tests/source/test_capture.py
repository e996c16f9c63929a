from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.errors import CompileError, Defect
from pmkvq_compiler.passes.locate_attention import markers
from pmkvq_compiler.source.capture import capture
from tests.fuzz import LONG_ONLY
from tests.models import SHAPE, tiny_model
from tests.programs import captured, located


@pytest.mark.parametrize(
    ("model_type", "overrides", "windows"),
    [
        ("llama", {}, [0, 0, 0]),
        ("mistral", {"sliding_window": None}, [0, 0, 0]),
        ("mistral", {"sliding_window": 8}, [8, 8, 8]),
        ("mistral", {"sliding_window": 4096}, [0, 0, 0]),
        ("gemma2", {"sliding_window": 8}, [8, 0, 8]),
        (
            "gemma3_text",
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
            [8, 0, 8, 0],
        ),
    ],
)
def test_every_layer_has_a_marker_with_its_window(
    model_type: str, overrides: dict[str, Any], windows: list[int]
) -> None:
    found = markers(captured(model_type, **overrides).graph)
    assert [marker.args[5] for marker in found] == list(range(len(windows)))
    assert [marker.args[6] for marker in found] == windows


def test_inputs_come_first_and_sizes_are_dynamic() -> None:
    program = captured("llama")
    names = [node.name for node in program.graph.find_nodes(op="placeholder")]
    assert names[:3] == ["input_ids", "position_ids", "model_embed_tokens_weight"]
    (output,) = program.graph.find_nodes(op="output")
    batch, sequence, vocabulary = output.args[0].meta["val"].shape
    assert isinstance(batch, torch.SymInt)
    assert isinstance(sequence, torch.SymInt)
    assert vocabulary == SHAPE["vocab_size"]


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "gemma3_text"])
def test_weights_are_those_of_the_model(model_type: str) -> None:
    program, model = captured(model_type), tiny_model(model_type)
    assert set(program.weights.values()) == {name for name, _ in model.named_parameters()}
    for name, tensor in program.weights.items():
        (placeholder,) = (node for node in program.graph.find_nodes(op="placeholder") if node.name == name)
        assert placeholder.meta["val"].shape == model.state_dict()[tensor].shape


def test_tied_weights_appear_once_under_the_name_of_the_embedding() -> None:
    names = list(captured("llama", tie_word_embeddings=True).weights.values())
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names


def test_constants_have_the_values_of_a_float32_model() -> None:
    constants = {constant.name: constant.value for constant in captured("gemma2", hidden_size=72).constants.values()}
    model = tiny_model("gemma2", hidden_size=72)
    for name, value in constants.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.get_buffer(name))
    assert float(constants["model.embed_tokens.embed_scale"]) == pytest.approx(72**0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("model_type", "overrides", "reason"),
    [
        ("bert", {"is_decoder": False}, "neither causal nor a sliding window.*see those that come after them"),
        ("mistral", {"sliding_window": 0}, "tokens do not even see themselves"),
        ("mistral", {"sliding_window": -3}, "neither causal nor a sliding window"),
        ("mamba", {}, "mamba has no layer with attention"),
        ("minimax", {"head_dim": 16, "num_key_value_heads": 2}, "carries a recurrent state"),
        ("recurrent_gemma", {"num_hidden_layers": 3}, "carries a recurrent state"),
        ("zaya", {}, "carries a recurrent state"),
        ("zamba2", {"num_hidden_layers": 6, "layers_block_type": ["linear_attention", "hybrid"] * 3}, "several layers"),
        ("deepseek_v32", {}, "layers of type indexed_attention|cannot be captured as one graph"),
        ("rwkv", {"attention_hidden_size": 64}, "carries a recurrent state"),
        ("diffllama", {}, "computes attention 4 times in 2 layers"),
        ("doge", {}, "its control flow depends on the tokens"),
        ("t5", {}, "t5 is an encoder-decoder model"),
        ("bloom", {}, "but only 0 of them .* route their attention through|bloom cannot be captured"),
        ("gptj", {}, "does not route its attention through|cannot be captured as one graph"),
        ("llama", {"head_dim": 12}, "12 channels, which is not a multiple of 8"),
        ("vit", {}, "cannot be built as a causal language model"),
    ],
)
def test_what_the_marker_cannot_express_is_refused(model_type: str, overrides: dict[str, Any], reason: str) -> None:
    shape = {
        "vocab_size": 128,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **{**shape, **overrides})
    with pytest.raises(CompileError, match=reason):
        capture(config)


@pytest.mark.parametrize("model_type", ["jetmoe"])
def test_operations_that_cannot_be_written_are_refused_before_anything_is_measured(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **{**SHAPE, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
    with pytest.raises(CompileError, match=f"{model_type} computes something besides its attention") as caught:
        locate(capture(config), model_type)
    assert not isinstance(caught.value, Defect)
    assert "LocateAttention" not in str(caught.value)


def test_the_trial_of_the_passes_changes_nothing() -> None:
    program, untried = captured("llama"), located("llama")
    locate(program, "llama")
    assert program.sites == untried.sites
    assert program.edits == []
    assert str(program.graph) == str(untried.graph)


ROOT = Path(__file__).parent.parent.parent

LARGE = """
import re, sys
from pathlib import Path
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from tests.programs import full_plan
from transformers import LlamaConfig
layers = int(sys.argv[1])
config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=layers, num_attention_heads=64,
                     num_key_value_heads=8, vocab_size=128256)
program = capture(config)
assert len(program.weights) == layers * 9 + 3
run_passes(program, [LocateAttention()])
assert all(site.reason is None for site in program.sites)
run_passes(program, pipeline({}, {}, {}, full_plan(program.sites)))
assert f"for layer in range({layers}):" in model_source(program)
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("layers", [20, pytest.param(80, marks=LONG_ONLY)])
def test_twenty_or_seventy_billion_parameters_need_little_memory(layers: int) -> None:
    """A process of its own; what `getrusage` says of one would begin at the peak of the process that started it."""
    command = [sys.executable, "-c", LARGE, str(layers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    kibibytes = int(done.stdout)
    assert kibibytes < 1.2e6
