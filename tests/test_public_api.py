# ruff: noqa: E501 - a signature is a line
"""The names that programs of others are written with. What is meant to change is changed here, and in CHANGELOG.md."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator

import pytest

from pmkvq_compiler import runtime
from pmkvq_compiler.cli import _parser
from pmkvq_compiler.recipes import RECIPES
from pmkvq_compiler.templates import read, render

API = """
pmkvq_compiler.compile
    compile_model(options: CompileOptions, progress: Progress) -> CompileResult
    CompileResult(path: Path | None, plan: CachePlan, report: Report) -> None
pmkvq_compiler.explore
    explore(options: CompileOptions, budgets: Sequence[str], progress: Progress) -> list[Explored]
    Explored(budget: str, arena_bytes: int | None = None, true_bits: float | None = None, predicted_loss: float | None = None) -> None
pmkvq_compiler.options
    CompileOptions(model: str, output: Path, budget: str | None = None, max_len: int | None = None, batch_size: int = 1, serve: bool = False, recipe: str = best, bits: tuple[int, ...] | None = None, sink: int | None = None, window: int | None = None, block: int | None = None, calib: str = builtin, calib_samples: int = 4, calib_len: int = 1024, effective_len: int | None = None, device: str = auto, dtype: str = auto, aot: tuple[str, ...] = (), onnx: bool = False, whole: bool = False, dump_passes: Path | None = None, dry_run: bool = False, force: bool = False) -> None
pmkvq_compiler.cli
    main(argv: Sequence[str] | None = None) -> int
pmkvq_compiler.errors
    CompileError(Exception)
    UsageError(CompileError)
    Defect(CompileError)
pmkvq_compiler.runtime
    load(path: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None, backend: Backend | None = None, trust_code: bool = True, verify: Verify = digests) -> CompiledModel
    CompiledModel.__call__(self, input_ids: Tensor, cache: Cache | None = None, position_ids: Tensor | None = None, attention_mask: Tensor | None = None, only: tuple[Tensor, Tensor] | None = None) -> Tensor
    CompiledModel.generate(self, input_ids: Tensor, max_new_tokens: int, do_sample: bool = False, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, eos_token_id: int | Sequence[int] | None = None, seed: int | None = None, streamer: Streamer | None = None, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor
    CompiledModel.new_cache(self, batch_size: int = 1, max_len: int | None = None) -> Cache
    CompiledModel.kernels_from: str
    CompiledModel.recurrences_from: str
    Cache.bits: list[tuple[int, int]]
    Cache.bytes_reserved: int
    Cache.bytes_used: int
    Cache.state_bytes: int
    Cache.device: torch.device
    Cache.length: list[int]
    Cache.crop(self, count: int) -> None
    Cache.reorder(self, sequences: Sequence[int]) -> None
    Cache.reset(self) -> None
    Cache.select(self, sequences: Sequence[int]) -> Cache
    Cache.to(self, device: str | torch.device) -> Cache
    CachePlan(recipe: str, budget: int, max_len: int, batch_size: int, dtype: str, layers: tuple[LayerPlan, ...], attention_layers: tuple[int, ...] = (), states: tuple[StatePlan, ...] = ()) -> None
    CachePlan.to_json(self) -> dict[str, Any]
    CachePlan.from_json(data: dict[str, Any]) -> CachePlan
    LayerPlan(num_key_value_heads: int, key_head_dim: int, value_head_dim: int, key_bits: int, value_bits: int, key_axis: KeyAxis, sink: int, window: int, block: int, sliding_window: int | None, stages: tuple[tuple[int, int], ...], arena_bytes: int, chunked: bool = False) -> None
    ArtifactError(Exception)
    InputError(ValueError)
    CacheFull(RuntimeError)
pmkvq_compiler.passes.base
    Pass.requires(self, program: Program) -> None
    Pass.ensures(self, program: Program) -> None
    Pass.run(self, program: Program) -> bool
    Pass.__call__(self, program: Program) -> PassResult
    Pass.name: str
    PassResult(modified: bool) -> None
    PassError(Defect)
    PreconditionError(PassError)
    PostconditionError(PassError)
    run_passes(program: Program, passes: Sequence[Pass], dump: Path | None = None) -> dict[str, PassResult]
pmkvq_compiler.passes.pipeline
    pipeline(key_scales: Mapping[int, Tensor], key_rotations: Mapping[int, Tensor], value_transforms: Mapping[int, Tensor], plan: CachePlan) -> list[Pass]
"""

OPTIONS = """
MODEL
--budget SIZE
--budgets LIST = ()
--max-len N
--batch-size N = 1
--serve
-o --output OUT
--force
--recipe RECIPE = best
--bits LIST
--window N
--sink N
--calib FILE = builtin
--calib-samples N = 4
--calib-len N = 1024
--effective-len N
--device NAME = auto
--dtype auto|float32|bfloat16|float16 = auto
--aot LIST = ()
--onnx
--whole
--dump-passes DIR
--dry-run
--json
"""

PACKAGE = """
load(device: str | torch.device | None=None, dtype: str | torch.dtype | None=None, backend: runtime.Backend | None=None) -> runtime.CompiledModel
load_tokenizer() -> Tokenizer
"""

TOKENIZER = """
__init__(self, folder: Path) -> None
encode(self, text: str) -> Tensor
encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None=None, documents: Sequence[Mapping[str, str]] | None=None, add_generation_prompt: bool=True, **variables: Any) -> Tensor
render_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None=None, documents: Sequence[Mapping[str, str]] | None=None, add_generation_prompt: bool=True, **variables: Any) -> str
decode(self, token_ids: Tensor) -> str
stream(self) -> Stream
"""


def lines(text: str) -> list[str]:
    return text.strip().splitlines()


def members() -> Iterator[tuple[str, str]]:
    """Modules and the lines of their members."""
    module = ""
    for line in lines(API):
        if line.startswith(" "):
            yield module, line.strip()
        else:
            module = line


def named(line: str) -> str:
    return re.split(r"[(:]", line)[0]


def described(module: str, name: str) -> str:
    """A function with its signature, a property with its type, an error with what it is a kind of."""
    found = pkgutil.resolve_name(f"{module}:{name}")
    if isinstance(found, property):
        return f"{name}: {inspect.signature(found.fget).return_annotation}"  # type: ignore[arg-type]
    if isinstance(found, type) and issubclass(found, Exception):
        return f"{name}({found.__base__.__name__})"  # type: ignore[union-attr]
    return f"{name}{inspect.signature(found)}".replace("'", "")


@pytest.mark.parametrize(
    ("module", "line"), list(members()), ids=[f"{module}.{named(line)}" for module, line in members()]
)
def test_a_public_name_is_what_it_was(module: str, line: str) -> None:
    assert described(module, named(line)) == line


def test_the_runtime_exports_what_it_did() -> None:
    assert sorted(runtime.__all__) == [
        "ArtifactError",
        "Backend",
        "Cache",
        "CacheFull",
        "CachePlan",
        "CompiledModel",
        "FORMAT_VERSION",
        "InputError",
        "LayerPlan",
        "PREFILL_CHUNK",
        "choose_attention",
        "choose_backend",
        "load",
        "open_artifact",
    ]


def test_the_command_has_the_options_that_it_had() -> None:
    found = []
    for action in _parser()._actions[1:]:  # without --help
        words = [*action.option_strings] or [str(action.metavar)]
        if action.option_strings and action.nargs != 0:
            choices = "RECIPE" if action.dest == "recipe" else "|".join(action.choices or ())
            words.append(choices or str(action.metavar))
        if action.nargs != 0 and action.default is not None:
            words.append(f"= {action.default}")
        found.append(" ".join(words))
    assert found == lines(OPTIONS)


def test_an_artifacts_package_has_the_functions_that_it_had() -> None:
    source = render("package_init.py.j2", package="tiny", version="0")
    assert '__all__ = ["FOLDER", "__version__", "load", "load_tokenizer", "runtime"]' in source
    assert functions(ast.parse(source)) == lines(PACKAGE)
    (tokenizer,) = (
        node for node in ast.parse(read("text.py")).body if isinstance(node, ast.ClassDef) and node.name == "Tokenizer"
    )
    assert functions(tokenizer) == lines(TOKENIZER)


def functions(place: ast.Module | ast.ClassDef) -> list[str]:
    """The public functions of a module or class, as it defines them."""
    return [
        f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in place.body
        if isinstance(node, ast.FunctionDef) and node.returns and (node.name == "__init__" or node.name[0] != "_")
    ]


def test_no_recipe_is_taken_away() -> None:
    assert {"best", "pm-kvq", "kivi", "rotation", "uniform", "none"} <= RECIPES.keys()
