"""Every family of models that people download: a tiny random one, compiled, against its source.

`make test` takes a few families, `make fuzz` all of them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from pmkvq_compiler import runtime
from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.runtime.load import import_generated
from pmkvq_compiler.runtime.model import CompiledModel
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, sequence_bytes
from pmkvq_compiler.source.source import Source, open_source
from pmkvq_compiler.unquantized import exact_plan
from tests.conftest import CompileTiny
from tests.decode_steps import trace_decode_step
from tests.families import FAMILIES, HYBRID_FAMILIES, Family
from tests.first_calls import check_first_calls
from tests.fuzz import LONG_ONLY, chosen
from tests.models import tiny_folder
from tests.programs import captured_once, compiled_model, relative_error

BATCH, LENGTH, MAX_LEN, NEW_TOKENS = 3, 40, 128, 64
BLOCK, WINDOW = 16, 32


@dataclass(frozen=True)
class Compiled:
    """A family's source model, and its compiled model with an exact cache and with one of 8 bits."""

    family: Family
    source: PreTrainedModel
    program: Program
    exact: CompiledModel
    eight_bit: CompiledModel


@pytest.fixture(scope="module", params=chosen(FAMILIES, "gemma4", "minicpm3", "smollm3", "llama4"))
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family.model_type)
    tiny_folder(folder, family.model_type, **family.overrides)
    source, program = located_source(folder)
    exact = exact_plan(program.cached_sites, MAX_LEN, BATCH, torch.float32, BLOCK)
    layers = tuple(at_8_bits(layer) for layer in exact.layers)
    quantized = dataclasses.replace(
        exact, recipe="8 bits", budget=sum(one.arena_bytes for one in layers), layers=layers
    )
    models = [generated(program, source, plan, folder) for plan in (exact, quantized)]
    return Compiled(family, source.load_model("eager"), program, *models)


def located_source(folder: Path) -> tuple[Source, Program]:
    source = open_source(str(folder))
    program = captured_once(source.config)
    locate(program, source.config.model_type)
    return source, program


def exact_model(source: Source, program: Program, folder: Path) -> CompiledModel:
    plan = exact_plan(program.cached_sites, MAX_LEN, BATCH, torch.float32, BLOCK, program.states)
    return generated(program, source, plan, folder)


def at_8_bits(layer: LayerPlan) -> LayerPlan:
    plan = dataclasses.replace(layer, key_bits=8, value_bits=8, key_axis="channel", window=WINDOW, stages=((8, 8),))
    return dataclasses.replace(plan, arena_bytes=BATCH * sequence_bytes(plan, MAX_LEN, 4))


def generated(program: Program, source: Source, plan: CachePlan, folder: Path) -> CompiledModel:
    """The model that an artifact with this plan would hold, without the artifact."""
    program = program.copy()
    run_passes(program, pipeline({}, {}, {}, plan))
    path = folder / f"model_{plan.recipe.replace(' ', '_')}.py"
    path.write_text(model_source(program))
    weights = {name: source.read(name) for name in program.weights.values()}
    return compiled_model(import_generated(path), plan, program, weights)


def tokens(length: int) -> Tensor:
    return torch.randint(3, 128, (BATCH, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def expected(compiled: Compiled, ids: Tensor) -> Tensor:
    logits: Tensor = compiled.source(ids).logits
    return logits


def in_pieces(model: CompiledModel, ids: Tensor, piece: int, mask: Tensor | None = None) -> Tensor:
    cache = model.new_cache(BATCH)
    masks = (torch.ones_like(ids) if mask is None else mask).split(piece, dim=1)
    parts = zip(ids.split(piece, dim=1), masks, strict=True)
    return torch.cat([model(part, cache, attention_mask=own) for part, own in parts], dim=1)


def test_logits_are_those_of_the_source_in_one_call_in_pieces_and_token_by_token(compiled: Compiled) -> None:
    ids = tokens(LENGTH)
    reference = expected(compiled, ids)
    assert relative_error(compiled.exact(ids), reference) <= 1e-5
    for piece in (5, 1):
        assert relative_error(in_pieces(compiled.exact, ids, piece), reference) <= 1e-5


@pytest.mark.parametrize("piece", [LENGTH, 5, 1])
def test_padding_on_the_left_changes_nothing(compiled: Compiled, piece: int) -> None:
    ids, lengths = tokens(LENGTH), torch.tensor([LENGTH, 23, 11])
    mask = torch.arange(LENGTH) >= LENGTH - lengths.unsqueeze(1)
    found = in_pieces(compiled.exact, ids * mask, piece, mask)
    for row, length in enumerate(lengths.tolist()):
        alone = expected(compiled, ids[row : row + 1, LENGTH - length :])
        assert relative_error(found[row : row + 1, LENGTH - length :], alone) <= 1e-5


def test_eight_bits_stay_close(compiled: Compiled) -> None:
    ids = tokens(2 * LENGTH)
    assert relative_error(in_pieces(compiled.eight_bit, ids, 5), expected(compiled, ids)) <= 1e-2


def test_greedy_text_is_that_of_transformers(compiled: Compiled) -> None:
    ids = tokens(8)[:1]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = compiled.source.generate(ids, max_new_tokens=NEW_TOKENS, **options)  # type: ignore[operator]
    assert compiled.exact.generate(ids, NEW_TOKENS).tolist() == text.tolist()


def test_a_decode_step_asks_the_host_for_nothing(compiled: Compiled) -> None:
    """So a CUDA graph can hold it."""
    trace_decode_step(compiled.exact)


def test_the_first_calls_are_found_in_every_dtype(compiled: Compiled) -> None:
    check_first_calls(compiled.exact, compiled.program)


def test_the_bytes_of_the_plan_are_those_that_the_cache_owns(compiled: Compiled) -> None:
    for model in (compiled.exact, compiled.eight_bit):
        cache = model.new_cache(BATCH)
        owned = {layer.arena.untyped_storage().data_ptr(): layer.arena.untyped_storage() for layer in cache.layers}
        assert sum(storage.nbytes() for storage in owned.values()) == cache.bytes_reserved == model.plan.arena_bytes


def test_the_guide_has_the_row_of_every_family() -> None:
    guide = (Path(__file__).parent.parent / "examples/how_it_works/README.md").read_text()
    rows = [family.row(name) for name, family in (FAMILIES | HYBRID_FAMILIES).items()]
    table = guide[guide.index("| family | attention |") :].split("\n\n")[0].splitlines()
    assert table[2:] == rows


def test_layers_that_share_a_cache_have_one(compiled: Compiled) -> None:
    shared = compiled.source.config.get_text_config().to_dict().get("num_kv_shared_layers") or 0
    assert len(compiled.program.sites) - len(compiled.exact.plan.layers) == shared


def test_what_is_folded_is_what_the_table_says(compiled: Compiled) -> None:
    assert compiled.family.explains(compiled.program.sites)


SMALL: dict[str, Any] = {"budget": "56KiB", "bits": (4,), "window": 16, "block": 16, "max_len": 120, "calib_len": 64}


@LONG_ONLY
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_compiles_into_a_budget(name: str, compile_tiny: CompileTiny) -> None:
    artifact = compile_tiny(FAMILIES[name].model_type, FAMILIES[name].overrides, **SMALL)
    model = runtime.load(artifact, trust_code=False)
    source = AutoModelForCausalLM.from_pretrained(artifact.parent / "source")
    with torch.no_grad():
        assert relative_error(model(tokens(60)[:1]), source(tokens(60)[:1]).logits) <= 1e-5
