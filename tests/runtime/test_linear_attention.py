"""Whether a library computes the recurrences, and that what it computes is the reference's."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pmkvq_compiler import runtime
from pmkvq_compiler.calibrate.attention_hook import run as run_source
from pmkvq_compiler.runtime import linear_attention, recurrence
from pmkvq_compiler.runtime.linear_attention import Kernels, Library, library_for
from pmkvq_compiler.runtime.reference import REFERENCE, Reference

from ..conftest import CompileTiny
from ..hybrids import HYBRIDS
from ..programs import relative_error
from .test_recurrence import fed, fresh

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SHAPE = (4, 128, 128)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not looked for the library yet."""
    monkeypatch.setattr(linear_attention, "_failures", [])
    for name in ("_imported", "_agrees"):
        monkeypatch.setattr(linear_attention, name, functools.cache(getattr(linear_attention, name).__wrapped__))
    for name in loaded():
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in loaded():
        del sys.modules[name]


def loaded() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == "fla"]


# ---- the choice ----


@pytest.mark.usefixtures("untried")
def test_where_the_library_is_not_installed_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library_for(SHAPE, torch.bfloat16, CUDA) is None


BROKEN = {
    "too old for this Triton": ("raise RuntimeError('Triton 9.1 is too new\\nUse 3.6')", "RuntimeError: Triton 9.1 is"),
    "without its dependency": ("import einops_that_is_missing", "No module named 'einops_that_is_missing'"),
    "another package of this name": ("__version__ = '1'", "No module named 'fla.ops'"),
    "damaged": ("def (:", "SyntaxError"),
    "for another torch": ("import torch; torch.no_such_function", "no_such_function"),
}


@pytest.mark.usefixtures("untried")
@pytest.mark.parametrize("kind", BROKEN)
def test_a_library_that_cannot_be_imported_is_tried_once_and_named_in_one_sentence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, reason = BROKEN[kind]
    (tmp_path / "fla").mkdir()
    (tmp_path / "fla" / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(RuntimeWarning) as caught:
        found = [library_for(SHAPE, torch.bfloat16, CUDA) for _ in range(3)]
    assert found == [None] * 3
    (warning,) = caught
    assert is_one_sentence(str(warning.message), "flash-linear-attention cannot be imported (", reason, "plain PyTorch")
    assert recurrence.computed_by(SHAPE, torch.bfloat16, CUDA, [Other()]) == "reference"


def is_one_sentence(text: str, *parts: str) -> bool:
    return all(part in text for part in parts) and "\n" not in text and ". " not in text


class Other(Reference):
    """An attention that is not the reference."""


def installed(monkeypatch: pytest.MonkeyPatch, library: Library) -> None:
    monkeypatch.setattr(linear_attention, "_imported", lambda: library)


@pytest.mark.usefixtures("untried")
def test_what_the_library_lacks_is_computed_by_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(steps_of_delta, steps_of_scan)
    installed(monkeypatch, library)
    for shape in (SHAPE, (2, 96, 192), (30, 8, 16), (2, 256, 512)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert library_for(shape, dtype, CUDA) is library
    for shape in ((4, 512, 128), (8192, 16, 1), (4, 2, 64)):
        assert library_for(shape, torch.bfloat16, CUDA) is None
    assert library_for(SHAPE, torch.float64, CUDA) is None
    assert library_for(SHAPE, torch.bfloat16, CPU) is None


@pytest.mark.usefixtures("untried")
def test_who_asked_for_plain_pytorch_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, library_of(steps_of_delta, steps_of_scan))
    assert recurrence.computed_by(SHAPE, torch.bfloat16, CUDA, [REFERENCE] * 2) == "reference"
    assert recurrence.computed_by(SHAPE, torch.bfloat16, CUDA, [REFERENCE, Other()]) == "fla 0"


# ---- the library's rules, as a loop from token to token computes them ----


def steps_of_delta(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, g: Tensor, beta: Tensor, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """What the library's two delta rules are documented to compute, in float64."""
    assert options == {"use_qk_l2norm_in_kernel": True, "output_final_state": True}
    heads, state, out = v.shape[2], initial_state.double(), []
    q, k = (F.normalize(x.double(), dim=-1).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k))
    for t in range(v.shape[1]):
        state = g[:, t].double().reshape(*g.shape[:1], heads, -1, 1).exp() * state
        missing = v[:, t].double() - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        written = beta[:, t].double().unsqueeze(-1) * missing
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], written)
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state) * scale)
    return torch.stack(out, dim=1).to(v.dtype), state.float()


def steps_of_scan(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, g: Tensor, scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Gated linear attention, in float64."""
    assert options == {"output_final_state": True}
    state, out = initial_state.double(), []
    for t in range(v.shape[1]):
        state = g[:, t].double()[..., None, None].exp() * state
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t].double(), v[:, t].double())
        out.append(torch.einsum("bhk,bhkv->bhv", q[:, t].double(), state) * scale)
    return torch.stack(out, dim=1).to(v.dtype), state.float()


Step = Callable[..., tuple[Tensor, Tensor]]


def library_of(delta: Step, scan: Step) -> Library:
    return Library("fla 0", Kernels(delta, delta), Kernels(delta, delta), Kernels(scan, scan))


def operands(kind: str, batch: int, width: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0, **shape: int):
    """Random operands of an op, with `key_heads` (2), `heads` (4), and `keys` (16) and `values` (24) channels."""
    sizes = {"key_heads": 2, "heads": 4, "keys": 16, "values": 24} | shape
    groups, heads, keys, values = sizes["key_heads"], sizes["heads"], sizes["keys"], sizes["values"]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if kind == "scan":
        x, key, query = normal(batch, width, heads, values), *(normal(batch, width, groups, keys) for _ in range(2))
        step, rate = F.softplus(normal(batch, width, heads) - 1), -torch.exp(normal(heads))
        return [x.to(dtype), step, rate, key.to(dtype), query.to(dtype)]
    q, k = (normal(batch, width, groups, keys).to(dtype) for _ in range(2))
    decay = -torch.exp(normal(heads, 1)) * F.softplus(normal(batch, width, heads, keys if kind == "channel" else 1) - 1)
    beta = torch.sigmoid(normal(batch, width, heads)).to(dtype)
    return [q, k, normal(batch, width, heads, values).to(dtype), decay if kind == "channel" else decay[..., 0], beta]


def run(kind: str, cache: Any, given: list[Tensor], columns: list[slice], on_device: bool = False) -> Tensor:
    options = () if kind == "scan" else (0.3, True)
    op = recurrence.selective_scan if kind == "scan" else recurrence.gated_delta_rule
    return op(*given, *options, fed(cache, columns, on_device), 0, 0)


def part(given: list[Tensor], columns: slice) -> list[Tensor]:
    return [x[:, columns] if x.dim() > 2 else x for x in given]


KINDS = ("head", "channel", "scan")


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, untried: None) -> Callable[[Library], None]:
    """Let a library compute on the CPU."""

    def use(library: Library) -> None:
        monkeypatch.setattr(linear_attention, "TRIALS", {True: 2, False: 70})
        monkeypatch.setattr(linear_attention, "STEPS", 16)
        monkeypatch.setattr(linear_attention, "library_for", lambda *_: None if linear_attention._failures else library)

    return use


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_agrees_computes_the_recurrence(
    kind: str, dtype: torch.dtype, on_the_cpu: Callable[[Library], None]
) -> None:
    calls: list[str] = []

    def named(name: str, step: Step) -> Step:
        return lambda *args, **kwargs: calls.append(name) or step(*args, **kwargs)  # type: ignore[func-returns-value]

    delta, scan = (Kernels(named("chunks", step), named("steps", step)) for step in (steps_of_delta, steps_of_scan))
    on_the_cpu(Library("fla 0", delta, delta, scan))
    given = operands(kind, 2, 60, dtype)
    caches = [fresh((4, 16, 24), dtype=torch.float32) for _ in range(2)]
    caches[1].attention = [Other()]
    for columns in (slice(0, 50), slice(50, 60), *(slice(t, t + 1) for t in range(57, 60))):
        some, own = part(given, columns), [slice(0, columns.stop - columns.start)] * 2
        expected, found = (run(kind, cache, some, own) for cache in caches)
        assert found.dtype == expected.dtype
        assert relative_error(found, expected) <= (1e-5 if dtype == torch.float32 else 1e-2)
    assert relative_error(caches[1].states.read(0, 0), caches[0].states.read(0, 0)) <= 1e-2
    compared = ["chunks"] * 2 + ["steps"] * 5 if dtype == torch.bfloat16 else ["steps"] * 6
    assert calls == compared, "each kernel once more than it is needed"


def transposed(step: Step) -> Step:
    def wrong(*args: Any, initial_state: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return step(*args, initial_state=initial_state.transpose(-1, -2), **kwargs)

    return wrong


def after(step: Step, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Step:
    return lambda *args, **kwargs: change(*step(*args, **kwargs))


def raising(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("PassManager::run failed\nat line 7")


WRONG: dict[str, tuple[Callable[[Step], Step], str]] = {
    "values first in its states": (transposed, "something else here than PyTorch does"),
    "another scale": (lambda step: after(step, lambda out, state: (out * 1.1, state)), "something else"),
    "a state in another dtype's rounding": (
        lambda step: after(step, lambda out, state: (out, (state * 20).round() / 20)),
        "something else",
    ),
    "not finite": (lambda step: after(step, lambda out, state: (out, state / 0)), "something else"),
    "another shape": (lambda step: after(step, lambda out, state: (out[:, :1], state)), "something else"),
    "a kernel that cannot be compiled": (lambda step: raising, "does not work here (RuntimeError: PassManager"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", WRONG)
def test_a_library_that_computes_something_else_is_given_up(
    fault: str, kind: str, on_the_cpu: Callable[[Library], None]
) -> None:
    wrong, reason = WRONG[fault]
    on_the_cpu(library_of(wrong(steps_of_delta), wrong(steps_of_scan)))
    shape = {"keys": 16, "values": 16}
    assert_given_up(kind, operands(kind, 2, 30, torch.float32, **shape), (4, 16, 16), reason)


def assert_given_up(kind: str, given: list[Tensor], state: tuple[int, ...], reason: str) -> None:
    """With the library, results and states are the reference's all the same, and one warning says why."""
    caches = [fresh(state, dtype=torch.float32) for _ in range(2)]
    caches[1].attention = [Other()]
    with pytest.warns(RuntimeWarning) as caught:
        pairs = [[run(kind, cache, given, [slice(0, 30)] * 2) for cache in caches] for _ in range(2)]
    assert all(torch.equal(*pair) for pair in pairs)
    assert torch.equal(caches[0].states.read(0, 0), caches[1].states.read(0, 0))
    (warning,) = caught
    assert is_one_sentence(str(warning.message), "flash-linear-attention (fla 0) ", reason, "plain PyTorch")


@pytest.mark.parametrize("kind", KINDS)
def test_a_library_that_fails_later_changes_no_result(kind: str, on_the_cpu: Callable[[Library], None]) -> None:
    """As where a kernel needs more of a device for a larger batch."""

    def small(step: Step) -> Step:
        def refuse(q: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if q.shape[0] > 1:
                raise RuntimeError("out of resource: shared memory")
            return step(q, *args, **kwargs)

        return refuse

    on_the_cpu(library_of(small(steps_of_delta), small(steps_of_scan)))
    assert_given_up(kind, operands(kind, 2, 30, torch.float32), (4, 16, 24), "shared memory")


def test_memory_that_runs_out_says_nothing_about_the_library(on_the_cpu: Callable[[Library], None]) -> None:
    def out_of_memory(*_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("no memory is left")

    on_the_cpu(library_of(out_of_memory, out_of_memory))
    cache = fresh((4, 16, 24), dtype=torch.float32)
    cache.attention = [Other()]
    with pytest.raises(torch.OutOfMemoryError):
        run("head", cache, operands("head", 2, 30, torch.float32), [slice(0, 30)] * 2)
    assert not linear_attention._failures
    assert not cache.states.overwritten


# ---- on a device ----


@pytest.fixture
def few_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles one configuration of each of the library's kernels. All of them would take minutes."""
    pytest.importorskip("fla")
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs
    monkeypatch.setattr(Autotuner, "prune_configs", lambda self, kwargs: prune(self, kwargs)[:1])
    monkeypatch.setenv("FLA_CACHE_RESULTS", "0")


DIMENSIONS = {
    "same": {"keys": 32, "values": 32},
    "narrow": {"keys": 8, "values": 8},
    "odd": {"key_heads": 4, "keys": 24, "values": 40},
    "wide": {"keys": 256, "values": 64},
}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.gpu
@pytest.mark.usefixtures("few_configurations")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_computes_what_float64_does(kind: str, dimensions: str, dtype: torch.dtype) -> None:
    """A ragged batch with padding at either end, then chunks, then single tokens of which one sequence has none, as
    columns and as counts on the device."""
    shape = DIMENSIONS[dimensions]
    if dtype == torch.float16 and dimensions != "same":
        pytest.skip("each takes seconds to compile")
    seed = int(torch.randint(1 << 30, ()))
    given = operands(kind, 3, 320, dtype, "cuda", seed, **shape)
    exact = [x.double() for x in given]
    size = (4, shape["keys"], shape["values"])
    library, reference = fresh(size, 3, torch.float32, "cuda"), fresh(size, 3, torch.float64, "cuda")
    library.attention = [Other()]
    assert recurrence.computed_by(size, dtype, CUDA, library.attention).startswith("fla ")
    calls = [
        (slice(0, 150), [slice(0, 150), slice(60, 150), slice(0, 100)], False),
        (slice(150, 190), [slice(0, 40), slice(0, 0), slice(3, 40)], False),
        (slice(190, 310), [slice(0, 120)] * 3, True),
        *((slice(t, t + 1), [slice(0, 1), slice(0, 1), slice(0, t % 2)], bool(t % 2)) for t in range(310, 320)),
    ]
    for columns, own, on_device in calls:
        found = run(kind, library, part(given, columns), own, on_device)
        expected = run(kind, reference, part(exact, columns), own, on_device)
        for row, tokens in enumerate(own):
            if tokens.start < tokens.stop:
                assert relative_error(found[row, tokens], expected[row, tokens]) <= ROUNDING[dtype], seed
        assert relative_error(library.states.read(0, 0), reference.states.read(0, 0)) <= ROUNDING[dtype], seed
    assert not linear_attention._failures


ON_DEVICE: dict[str, dict[str, Any]] = {
    "qwen3_next": {"linear_key_head_dim": 16, "linear_value_head_dim": 32},
    "kimi_linear": {"linear_head_dim": 16, "qk_rope_head_dim": 16},
    "kimi_linear, latents that our kernels cannot read": {"linear_head_dim": 16},
    "bamba": {"mamba_d_state": 16},
    "granitemoehybrid": {"mamba_d_state": 16},
    "nemotron_h": {"ssm_state_size": 16},
    "lfm2": {},
    "lfm2_moe": {},
}
"""Hybrids, with states and latents in dimensions that the kernels hold, but for one."""
LOGITS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@pytest.mark.gpu
@pytest.mark.usefixtures("few_configurations")
@pytest.mark.parametrize("dtype", LOGITS)
@pytest.mark.parametrize("family", ON_DEVICE)
def test_a_hybrid_on_the_library_writes_what_the_reference_writes(
    family: str, dtype: torch.dtype, compile_tiny: CompileTiny
) -> None:
    """Its experts too, and in a CUDA graph. In float32 that is the text of transformers."""
    model_type = family.partition(",")[0]
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have it")
    artifact = compile_tiny(model_type, {**HYBRIDS[model_type], **ON_DEVICE[family]}, recipe="none", batch_size=2)
    plain = runtime.load(artifact, "cuda", dtype, backend="reference")
    model = runtime.load(artifact, "cuda", dtype)
    has_recurrence = any(state.is_recurrence for state in model.plan.states)
    assert plain.recurrences_from == ("reference" if has_recurrence else "")
    assert model.recurrences_from.startswith("fla ") is has_recurrence
    torch.manual_seed(0)
    ids = torch.randint(3, 128, (2, 190), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    caches = [one.new_cache(2) for one in (plain, model)]
    for columns in (slice(0, 140), slice(140, 189), slice(189, 190)):
        expected, found = (
            one(ids[:, columns], cache, attention_mask=mask[:, columns])
            for one, cache in zip((plain, model), caches, strict=True)
        )
        own = mask[:, columns] > 0
        assert relative_error(found[own], expected[own]) <= LOGITS[dtype]
    for name, state in caches[1].states.tensors.items():
        assert relative_error(state, caches[0].states.tensors[name]) <= LOGITS[dtype]
    for _ in range(2):
        cache = model.new_cache(2)
        text = model.generate(ids, 60, attention_mask=mask, eos_token_id=(), cache=cache)
        assert (cache.graph is not None) is cache.replayable is (family == model_type), "its step was to be captured"
        assert_written_by(plain, text, mask, LOGITS[dtype])
    if dtype == torch.float32:
        source = AutoModelForCausalLM.from_pretrained(artifact.parent / "source")
        own = text[1:].cpu()
        logits = run_source(source, own, torch.arange(own.shape[1]).unsqueeze(0))
        chosen = logits[:, 189:-1].gather(-1, own[:, 190:].unsqueeze(-1)).squeeze(-1)
        assert bool((logits[:, 189:-1].amax(-1) - chosen <= 1e-3 * logits[:, 189:-1].norm(dim=-1)).all())
    assert not linear_attention._failures


def assert_written_by(model: runtime.CompiledModel, text: Tensor, mask: Tensor, tolerance: float) -> None:
    """A model, called for one token after the other, would have chosen this text, but for near ties."""
    cache, prompt = model.new_cache(len(text)), mask.shape[1]
    logits = model(text[:, :prompt], cache, attention_mask=mask)[:, -1]
    agreed = []
    for column in range(prompt, text.shape[1]):
        chosen = logits.gather(-1, text[:, column : column + 1])
        short = logits.amax(-1, keepdim=True) - chosen
        assert bool((short <= tolerance * logits.norm(dim=-1, keepdim=True)).all()), (column, short.tolist())
        agreed.append((short == 0).float().mean())
        logits = model(text[:, column : column + 1], cache)[:, -1]
    assert torch.stack(agreed).mean() >= 0.7
