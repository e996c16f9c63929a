"""Models in which some layers carry another state than keys and values from token to token."""

from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.attention_hook import run
from pmkvq_compiler.emit.onnx_export import check_expressible
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.runtime import linear_attention
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.runtime.reference import BESIDE_KERNELS
from pmkvq_compiler.source import state_functions
from pmkvq_compiler.source.capture import capture

from .conftest import CompileTiny
from .decode_steps import trace_decode_step
from .devices import EACH_GPU
from .families import HYBRID_FAMILIES
from .first_calls import check_first_calls
from .fuzz import LONG, rounds
from .fuzz.interrupts import Broken, Traced
from .hybrids import HYBRIDS, at_eight_bits, hybrid, located
from .interpreted import run_interpreted
from .models import SHAPE
from .programs import captured, relative_error

ROOT = Path(__file__).parent.parent
DEFAULT = ("qwen3_5_text", "lfm2", "nemotron_h")
"""One for each kind of state: gated delta rule, short convolution alone, Mamba-2's scan."""
FAMILIES = [name for name in HYBRIDS if name in CONFIG_MAPPING_NAMES and (name in DEFAULT or os.environ.get(LONG))]
every_family = pytest.mark.parametrize("family", FAMILIES)


def tokens(batch: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (batch, count), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: CompiledModel, ids: Tensor, size: int, mask: Tensor | None = None) -> Tensor:
    """Logits of `ids` [B, S], fed `size` columns at a time."""
    cache = model.new_cache(ids.shape[0])
    mask = torch.ones_like(ids) if mask is None else mask
    parts = [slice(start, start + size) for start in range(0, ids.shape[1], size)]
    return torch.cat([model(ids[:, part], cache, attention_mask=mask[:, part]) for part in parts], dim=1)


@every_family
@torch.no_grad()
def test_logits_are_those_of_transformers_however_the_text_is_fed(family: str) -> None:
    """In pieces it is a shorter text: within the chunks of a long one, transformers' own logits are 1e-5 from what it
    gives token by token."""
    source, model = hybrid(family)
    for length, sizes in ((150, (150, 70)), (40, (5, 1))):
        ids = tokens(2, length)
        expected = source(ids).logits
        for size in sizes:
            assert relative_error(in_pieces(model, ids, size), expected) <= 1e-5, (length, size)


@every_family
@pytest.mark.parametrize("size", [23, 5, 1])
@torch.no_grad()
def test_left_padding_enters_no_state(family: str, size: int) -> None:
    source, model = hybrid(family)
    ids, mask = tokens(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[0, :9], mask[2, :1] = 0, 0
    expected = source(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    out = in_pieces(model, ids, size, mask)
    assert relative_error(out[mask > 0], expected[mask > 0]) <= 1e-5
    for row in range(3):
        alone = in_pieces(model, ids[row : row + 1, mask[row] > 0], size)
        assert relative_error(out[row, mask[row] > 0], alone[0]) <= 1e-5


@torch.no_grad()
def test_left_padding_enters_no_state_where_a_bias_lets_it_into_that_of_transformers() -> None:
    """transformers zeroes padding before a projection, whose bias then enters the convolution."""
    source, model = hybrid("lfm2", conv_bias=True)
    ids, mask = tokens(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[0, :9] = 0
    out = in_pieces(model, ids, 5, mask)
    for row in range(2):
        own = mask[row] > 0
        assert relative_error(out[row, own], source(ids[row : row + 1, own]).logits[0]) <= 1e-5


@every_family
@torch.no_grad()
def test_eight_bits_change_little(family: str) -> None:
    source, model = hybrid(family)
    ids = tokens(2, 100)
    narrow = at_eight_bits(model)
    cache = narrow.new_cache(2)
    out = torch.cat([narrow(ids[:, start : start + 5], cache) for start in range(0, 100, 5)], dim=1)
    assert 0 < relative_error(out, source(ids).logits) <= 1e-2
    assert cache.bits == [(8, 8)] * len(cache.layers)


@every_family
def test_greedy_text_is_that_of_transformers(family: str) -> None:
    source, model = hybrid(family)
    ids = tokens(1, 11, seed=2)
    source.generation_config.eos_token_id = None
    expected = source.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, 64), expected)


@every_family
def test_the_plan_counts_what_the_cache_owns(family: str) -> None:
    _, model = hybrid(family)
    for one in (model, at_eight_bits(model)):
        cache = one.new_cache(3)
        model(tokens(3, 20), cache)
        assert cache.bytes_reserved == one.plan.arena_bytes == sum(layer.arena.nbytes for layer in cache.layers)
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in cache.states.tensors.values()}
        assert sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) == cache.state_bytes
        assert cache.state_bytes == one.plan.state_bytes(4, 3) > 0
    assert CachePlan.from_json(json.loads(json.dumps(model.plan.to_json()))) == model.plan


@every_family
def test_what_is_folded_is_what_the_table_says(family: str) -> None:
    (row,) = (one for one in HYBRID_FAMILIES.values() if one.model_type == family)
    _, program = located(family)
    assert row.explains(program.sites)


def test_the_table_has_every_hybrid() -> None:
    assert {family.model_type for family in HYBRID_FAMILIES.values()} == {*HYBRIDS}


# ---- what a cache with states can do, and what not ----


@pytest.mark.parametrize("family", DEFAULT)
def test_reordered_selected_and_copied_states_go_on_as_the_text_would(family: str) -> None:
    _, model = hybrid(family)
    ids, later = tokens(3, 30), tokens(3, 7, seed=1)
    order = [2, 2, 0]
    expected = in_pieces(model, torch.cat([ids[order], later], dim=1), 37)[:, 30:]
    cache = model.new_cache(3)
    model(ids, cache)
    selected = cache.select(order)
    cache.reorder(order)
    copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache, selected]
    for twin in copies:
        assert relative_error(model(later, twin), expected) <= 1e-5
    assert len({id(twin.states.tensors[name]) for twin in copies for name in twin.states.tensors}) == 4 * len(
        cache.states.tensors
    )
    cache.reset()
    assert relative_error(model(ids, cache), model(ids)) <= 1e-6


@pytest.mark.parametrize("family", DEFAULT)
def test_sequences_may_pause_and_padding_may_lie_at_either_end(family: str) -> None:
    _, model = hybrid(family)
    ids = tokens(2, 40)
    whole = model(ids)
    cache = model.new_cache(2)
    found: list[list[Tensor]] = [[], []]
    places = [0, 0]
    for left, counts, right in ((2, (5, 3), 1), (0, (0, 6), 2), (1, (1, 0), 0), (0, (1, 1), 0), (3, (20, 9), 4)):
        width = left + max(counts) + right
        fed, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
        for row, count in enumerate(counts):
            start = left if row else width - right - count
            fed[row, start : start + count] = ids[row, places[row] : places[row] + count]
            mask[row, start : start + count] = 1
            places[row] += count
        out = model(fed, cache, attention_mask=mask)
        for row in range(2):
            found[row].append(out[row, mask[row] > 0])
    for row in range(2):
        assert relative_error(torch.cat(found[row]), whole[row, : places[row]]) <= 1e-5


def test_a_state_cannot_be_cropped() -> None:
    _, model = hybrid("lfm2")
    cache = model.new_cache(1)
    model(tokens(1, 5), cache)
    with pytest.raises(runtime.InputError, match=r"2 tokens cannot be taken back .* recurrent state, which is of all"):
        cache.crop(2)
    cache.crop(0)
    assert cache.length == [5]


def test_a_call_that_breaks_off_leaves_no_half_state() -> None:
    _, model = hybrid("qwen3_5_text")
    cache = model.new_cache(1)
    model(tokens(1, 5), cache)
    broken = copy.copy(model)
    object.__setattr__(broken, "logits", lambda hidden: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken(tokens(1, 3), cache)
    with pytest.raises(runtime.InputError, match=r"holds half of it; reset\(\) it"):
        model(tokens(1, 3), cache)
    cache.reset()
    assert torch.equal(model(tokens(1, 5), cache), model(tokens(1, 5)))


@pytest.mark.parametrize("break_off", [Broken, Traced])
def test_an_interrupt_leaves_the_states_as_they_were_or_says_so(break_off: Any) -> None:
    _, model = hybrid("lfm2")
    ids, later = tokens(2, 9), tokens(2, 3, seed=1)
    cache = model.new_cache(2)
    model(ids, cache)
    uses: list[Callable[[Cache], object]] = [
        lambda cache: model(later, cache),
        lambda cache: cache.reorder([1, 0]),
        lambda cache: cache.reset(),
    ]
    afterwards = [model(later, cache.select([0, 1]))]
    for use in uses:
        with break_off() as counted:
            use(done := copy.deepcopy(cache))
        afterwards.append(model(later, done))
        for at in random.Random(0).sample(range(1, counted.count + 1), min(counted.count, rounds(8, 400))):
            broken = copy.deepcopy(cache)
            with suppress(KeyboardInterrupt), break_off(at=at):
                use(broken)
            try:
                out = model(later, broken)
            except runtime.InputError:
                with pytest.raises(runtime.InputError, match=r"holds half of it; reset\(\) it"):
                    model(later, broken)
                broken.reset()
                assert torch.equal(model(ids, broken), model(ids))
                continue
            assert any(torch.equal(out, one) for one in (afterwards[0], afterwards[-1])), at


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3_5_text", "reference"), ("nemotron_h", "reference"), ("lfm2", "")]
)
def test_a_model_says_what_computes_its_recurrences(
    family: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution is no recurrence. On a CPU the library is not even looked for."""
    _, model = hybrid(family)
    model = replace(model, attention=[BESIDE_KERNELS] * len(model.plan.layers))
    monkeypatch.setattr(linear_attention, "_imported", lambda: pytest.fail("it was looked for"))
    model(tokens(1, 20))
    assert model.recurrences_from == expected
    library = linear_attention.Library("fla 1.2", *[linear_attention.Kernels(max, max)] * 3)
    monkeypatch.setattr(linear_attention, "_imported", lambda: library)
    assert replace(model, device=torch.device("cuda")).recurrences_from == ("fla 1.2" if expected else "")


@pytest.mark.parametrize("family", DEFAULT)
@torch.no_grad()
def test_measures_do_not_depend_on_libraries_that_transformers_calls(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are installed, they take the places of its own functions, on the CPU as well, where they cannot
    run."""
    source, _ = hybrid(family)
    ids, positions = tokens(1, 20), torch.arange(20).unsqueeze(0)
    expected = run(source, ids, positions)
    module, replaced = sys.modules[type(source).__module__], []
    for name in state_functions.NAMES.keys() & vars(module).keys():

        @functools.wraps(vars(module)[name])
        def library(*_: Any, **__: Any) -> Tensor:
            raise RuntimeError("0 active drivers")

        monkeypatch.setattr(module, name, library)
        replaced.append((name, library))
    with pytest.raises(RuntimeError, match="active drivers"):
        source(ids)
    assert torch.equal(run(source, ids, positions), expected)
    assert all(vars(module)[name] is function for name, function in replaced)


def test_another_models_states_are_refused() -> None:
    (_, one), (_, other) = hybrid("qwen3_5_text"), hybrid("lfm2")
    with pytest.raises(runtime.InputError, match="the cache is another model's"):
        one(tokens(1, 3), other.new_cache(1))


# ---- the whole road ----


@pytest.fixture(scope="module")
def artifact(compile_tiny: CompileTiny) -> Path:
    options: dict[str, Any] = {"budget": "75%", "bits": (8, 4), "batch_size": 2, "block": 64, "calib_len": 160}
    return compile_tiny("qwen3_5_text", HYBRIDS["qwen3_5_text"], **options)


def test_only_attention_is_planned_and_states_are_reported_apart(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    assert [row["layer"] for row in report["rows"]] == [3]
    plan = runtime.load(artifact).plan
    assert plan.attention_layers == (3,)
    assert {state.layer for state in plan.states} == {0, 1, 2}
    assert report["state_bytes"] == plan.state_bytes(4) == runtime.load(artifact).new_cache(2).state_bytes
    assert report["arena_bytes"] == plan.arena_bytes <= report["budget"]
    assert "recurrent states" in (artifact / "report.html").read_text()
    assert "pip install fla-core" in (artifact / "README.md").read_text()
    assert report["check"]["largest_layer_error"] <= 1e-4
    assert "serving" not in report, "vLLM refuses it"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention_layers", [3, 3], "attention_layers"),
        ("attention_layers", [0, 3], "attention_layers"),
        ("attention_layers", [-1], "attention_layers"),
        ("states", [{"layer": 0, "index": 0, "shape": [0, 3], "float32": True}], "states must (have|each|fit)"),
        ("states", [{"layer": 0, "index": 0, "shape": [1 << 30] * 4, "float32": True}], "states must (have|each|fit)"),
        ("states", [{"layer": 0, "index": 0, "shape": [3], "float32": True}] * 2, "states must (have|each|fit)"),
        ("states", [{"layer": 0, "index": 0, "shape": 3, "float32": True}], "shape is 3 instead of a list"),
        ("states", [], "different plans"),
    ],
)
def test_a_plan_with_other_states_is_refused(
    artifact: Path, tmp_path: Path, key: str, value: list[Any], reason: str
) -> None:
    copied = shutil.copytree(artifact, tmp_path / "artifact")
    manifest = json.loads((copied / "pmkvq.json").read_text())
    manifest["plan"][key] = value
    (copied / "pmkvq.json").write_text(json.dumps(manifest))
    with pytest.raises(runtime.ArtifactError, match=reason) as caught:
        runtime.load(copied)
    assert "\n" not in str(caught.value)


def test_generated_code_names_its_states(artifact: Path) -> None:
    (path,) = artifact.glob("*/model.py")
    text = path.read_text()
    assert "from .runtime.recurrence import causal_conv1d, gated_delta_rule" in text
    assert "for layer in range(3):" in text
    assert "hidden = decoder_layer_2(weights, 3," in text


def test_the_artifact_generates_by_itself_and_in_transformers(artifact: Path) -> None:
    model = runtime.load(artifact, trust_code=False)
    ids = tokens(2, 300)
    cache = model.new_cache(2)
    expected = model.generate(ids, 40, cache=cache, eos_token_id=())
    assert cache.bits != [(16, 16)]
    hugging = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True)
    hugging.generation_config.eos_token_id = None
    assert torch.equal(hugging.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=0), expected)
    assert not hugging.new_cache().is_croppable
    with pytest.raises(ValueError, match=r"or a recurrent state, cannot; generate without it$"):
        hugging.generate(ids[:1], max_new_tokens=4, prompt_lookup_num_tokens=2)
    assert hugging.generate(ids[:1, :9], max_new_tokens=6, num_beams=2, pad_token_id=0).shape == (1, 15)


def test_an_artifact_runs_by_itself_beside_a_broken_library(artifact: Path, tmp_path: Path) -> None:
    """On the CPU nothing looks for it, and nothing else than torch and safetensors is needed."""
    copied = shutil.copytree(artifact, tmp_path / "moved" / "artifact")
    (tmp_path / "broken" / "fla").mkdir(parents=True)
    (tmp_path / "broken" / "fla" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    package = json.loads((copied / "pmkvq.json").read_text())["package"]
    program = f"""
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {{"transformers", "pmkvq_compiler", "einops"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
sys.path[:0] = [{str(copied)!r}, {str(tmp_path / "broken")!r}]
import {package}
model = {package}.load()
import torch
print(model.generate(torch.arange(3, 43).unsqueeze(0), 8, eos_token_id=()).tolist()[0], model.recurrences_from)
assert not {{"transformers", "pmkvq_compiler", "fla"}} & set(sys.modules)
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    expected = runtime.load(artifact).generate(torch.arange(3, 43).unsqueeze(0), 8, eos_token_id=()).tolist()[0]
    assert done.stdout.strip() == f"{expected} reference"


def test_onnx_is_refused_before_anything_is_measured() -> None:
    with pytest.raises(CompileError, match=r"recurrent state .* compile it without --onnx"):
        check_expressible(replace(captured("llama"), states=hybrid("lfm2")[1].plan.states))


@pytest.mark.parametrize("by_library", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "nemotron_h", *(HYBRIDS if os.environ.get(LONG) else [])])
def test_a_decode_step_asks_the_host_for_nothing(
    family: str, by_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a CUDA graph can hold it. Tensors of their shapes stand for what the library's kernels return."""
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    launched: list[Tensor] = []

    def kernel(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        launched.append(q)
        return torch.empty_like(v), torch.empty_like(initial_state)

    library = linear_attention.Library("fla 0", *[linear_attention.Kernels(kernel, kernel)] * 3)
    monkeypatch.setattr(linear_attention, "library_for", lambda *_: library if by_library else None)
    monkeypatch.setattr(linear_attention, "_agrees", lambda *_: True)
    _, model = hybrid(family)
    trace_decode_step(model)
    known = by_library and family != "jamba"  # it has Mamba 1, which the library does not
    assert len(launched) == (sum(state.is_recurrence for state in model.plan.states) if known else 0)
    with pytest.raises(AssertionError, match="the host tells the device numbers"):
        trace_decode_step(model, announced=False)


@every_family
def test_the_first_calls_are_found_in_every_dtype(family: str) -> None:
    check_first_calls(hybrid(family)[1], located(family)[1])


@pytest.mark.skipif(not os.environ.get(LONG), reason="Triton's interpreter is slow")
def test_replayed_steps_leave_the_states_that_calls_leave(artifact: Path) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    run_interpreted("tests.state_checks", artifact)


@pytest.mark.gpu
@pytest.mark.parametrize("device", EACH_GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_leave_the_states_that_calls_leave(artifact: Path, dtype: torch.dtype, device: str) -> None:
    from .state_checks import compare

    compare(artifact, device, dtype, steps=40, tolerance=2e-2 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.skipif(not os.environ.get(LONG), reason="each compiles a model")
@pytest.mark.parametrize("family", [name for name in HYBRIDS if name != "qwen3_5_text"])
def test_every_family_compiles_into_a_budget(family: str, compile_tiny: CompileTiny) -> None:
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    artifact = compile_tiny(family, HYBRIDS[family], budget="80%")
    model = runtime.load(artifact, trust_code=False)
    source = AutoModelForCausalLM.from_pretrained(artifact.parent / "source")
    with torch.no_grad():
        assert relative_error(model(tokens(1, 60)), source(tokens(1, 60)).logits) <= 1e-3


# ---- what is not known is refused ----


def test_a_function_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.lfm2 import modeling_lfm2

    right = modeling_lfm2.causal_conv1d_fn

    def wrong(*args: Any, **kwargs: Any) -> Tensor:
        return right(*args, **kwargs) + 1

    monkeypatch.setattr(modeling_lfm2, "causal_conv1d_fn", wrong)
    config = AutoConfig.for_model("lfm2", **{**SHAPE, **HYBRIDS["lfm2"]})
    with pytest.raises(CompileError, match="causal_conv1d_fn whose recurrent state this version does not know"):
        capture(config)
    assert modeling_lfm2.causal_conv1d_fn is wrong, "the model's code is as it was"


def test_a_state_that_goes_through_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name: method for name, method in state_functions.NAMES.items() if method != "mamba_scan"}
    monkeypatch.setattr(state_functions, "NAMES", names)
    config = AutoConfig.for_model("jamba", **{**SHAPE, **HYBRIDS["jamba"]})
    with pytest.raises(CompileError, match=r"jamba (mixes tokens outside|cannot be captured as one graph)"):
        capture(config)
