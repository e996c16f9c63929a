"""One layout: cache, plan, kernels and ONNX function take it from `runtime.records`, and follow when it changes."""

import ast
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pmkvq_compiler.emit.kernel_source import kernel_source, tuning_table
from pmkvq_compiler.runtime import records
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.errors import ArtifactError
from pmkvq_compiler.runtime.layer_cache import Counts
from pmkvq_compiler.runtime.plan import CODE_BITS, FINAL_BITS, LayerPlan, block_bytes
from pmkvq_compiler.runtime.tuning import read_tunings
from tests.emit import test_onnx_attention
from tests.interpreted import run_interpreted

from . import test_attention
from .plans import cache_plan, layer_plan

ROOT = Path(__file__).parent.parent.parent

ORDERS = [
    (("values", "keys"), ("value_parameters", "key_parameters", "value_codes", "key_codes"), (3, 1, 0, 2)),
    (("keys", "values"), ("key_codes", "value_parameters", "key_parameters", "value_codes"), (2, 3, 1, 0)),
    (("values", "keys"), ("value_codes", "key_codes", "key_parameters", "value_parameters"), (1, 0, 3, 2)),
]
"""Orders of the rows of an arena, the fields of a record and the rows of `state` that are not the project's."""


@pytest.fixture(params=ORDERS, ids=["values first", "codes first", "codes before parameters"])
def reordered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fields, state = request.param
    monkeypatch.setattr(records, "ROWS", rows)
    monkeypatch.setattr(records, "FIELDS", fields)
    monkeypatch.setattr(records, "STATE", tuple(records.STATE[row] for row in state))


@pytest.mark.usefixtures("reordered")
def test_the_cache_and_the_reference_path_follow_another_order() -> None:
    for axis in ("token", "channel"):
        test_attention.test_every_step_of_a_run_to_max_len(axis, 100, (4, 2), 64, extras=True)
    test_attention.test_ragged_batch_equals_its_sequences_alone()


@pytest.mark.usefixtures("reordered")
@pytest.mark.parametrize("configuration", test_onnx_attention.CONFIGURATIONS[:2], ids=lambda one: one["key_axis"])
def test_the_onnx_function_agrees_with_a_cache_of_another_order(configuration: dict[str, object]) -> None:
    test_onnx_attention.test_function_computes_what_the_runtime_does(configuration)


@pytest.mark.usefixtures("reordered")
def test_a_record_and_an_arena_have_the_same_bytes_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [layer_plan(key_axis=axis, key_head_dim=80, value_head_dim=48) for axis in ("token", "channel")]
    there = [(plan.arena_bytes, [block_bytes(plan, *widths) for widths in plan.stages]) for plan in plans]
    monkeypatch.undo()
    assert [(plan.arena_bytes, [block_bytes(plan, *widths) for widths in plan.stages]) for plan in plans] == there


def test_kernels_follow_other_orders() -> None:
    """Interpreted, against float64 and the reference's cache to the last bit: append, lower, decode and prefill."""
    pytest.importorskip("triton", reason="Triton has no wheel for this machine")
    run_interpreted("tests.runtime.test_records")


def check_kernels_in_other_orders() -> None:
    """What the process of `test_kernels_follow_other_orders` does."""
    from ..kernel_checks import TOLERANCE, Case, check_lowering, repair_interpreter, run_case, steps

    repair_interpreter()
    torch.set_num_threads(1)
    names = records.STATE
    for (rows, fields, state), axis in zip(ORDERS, ("token", "channel", "token"), strict=True):
        records.ROWS, records.FIELDS, records.STATE = rows, fields, tuple(names[row] for row in state)  # type: ignore
        case = Case(key_axis=axis, steps=steps(132, 1), max_len=220)
        assert max(run_case(case, torch.device("cpu"))) < TOLERANCE
    check_lowering(4, torch.device("cpu"))


def test_state_says_what_its_rows_are_called() -> None:
    plan = layer_plan()
    cache = Cache(cache_plan(plan), 1, None, torch.float32, torch.device("cpu"))
    cache.layers[0].go_back(Counts([70], [3], 0))
    cache.length = [262]
    cache.state = torch.zeros(len(records.STATE), 1, dtype=torch.int32)
    cache.begin([slice(5, 7)])
    reached = plan.sink + plan.window + 2 * plan.block + 1
    expected = {"length": 262, "start": 5, "count": 2, "reached": max(262, reached)}
    assert {name: cache.state[records.state_row(name)].item() for name in records.STATE} == expected


def shapes() -> Iterator[LayerPlan]:
    for dim, axis in itertools.product((64, 80, 128), ("token", "channel")):
        yield layer_plan(key_axis=axis, key_head_dim=dim, value_head_dim=2 * dim)


@pytest.mark.parametrize("plan", list(shapes()), ids=lambda plan: f"{plan.key_head_dim} {plan.key_axis}")
def test_kernels_know_every_place_that_the_record_has(plan: LayerPlan) -> None:
    """The functions of the generated file, at every pair of widths."""
    tree = ast.parse(kernel_source(plan, 2, None, False, "a layer"))
    wanted = {*(f"{name}_at" for name in records.FIELDS), "record_words"}
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in wanted]
    for function in functions:
        function.decorator_list = []
    generated: dict[str, object] = {}
    exec(compile(ast.Module(functions, []), "generated", "exec"), generated)
    for widths in itertools.product(CODE_BITS, repeat=2):
        before = 0
        for name, field in plan.record.fields.items():
            assert 16 * generated[f"{name}_at"](*widths) == before  # type: ignore[operator]
            before += field.bits(*widths)
        assert 16 * generated["record_words"](*widths) == before == 8 * block_bytes(plan, *widths)  # type: ignore[operator]


# ---- widths ----


def listed_widths(path: Path) -> list[str]:
    """Lines in which a module has a literal of several widths: a tuple, a list, a set, the keys of a dictionary."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        numbers = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else []
        numbers = node.keys if isinstance(node, ast.Dict) else numbers
        values = {int(one.value) for one in numbers if isinstance(one, ast.Constant) and str(one.value).isdecimal()}
        if len(values) >= 3 and values <= {*CODE_BITS}:
            found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def test_widths_are_listed_in_one_place() -> None:
    modules = [path for folder in ("pmkvq_compiler", "passes", "runtime") for path in (ROOT / folder).rglob("*.py")]
    found = [line for path in modules for line in listed_widths(path)]
    assert [line.split(":")[0] for line in found] == ["runtime/plan.py"], found


def test_each_width_is_half_of_the_one_before() -> None:
    assert all(wide == 2 * narrow for wide, narrow in itertools.pairwise(CODE_BITS))
    assert CODE_BITS[1:] == FINAL_BITS


@pytest.mark.parametrize("bits", CODE_BITS)
def test_a_width_has_its_row_in_the_tables(bits: int) -> None:
    """What is measured or chosen for a width: how its kernel is launched, and its colour in the report."""
    assert all(bits in tuning.decode for tuning in read_tunings(tuning_table()).values())
    style = (ROOT / "templates" / "charts.css.j2").read_text(encoding="utf-8")
    assert style.count(f"--bits{bits}: #") == 2, "a colour for either theme"
    assert f".bits{bits} {{" in style
    assert f".on-bits{bits} {{" in style


@pytest.mark.parametrize("device", ["default", "H100", "H200"])
def test_every_tuning_can_be_launched(device: str) -> None:
    """On any device that the kernels support: 64 Ki registers and 99 KiB of shared memory, 227 on an H100."""
    tuning = read_tunings(tuning_table())[device]
    for bits, decode in tuning.decode.items():
        assert decode.cells in (1, 2), "words of a step, of which a lane loads up to four at once"
        assert 64 <= decode.registers <= 255, "what a lane can have"
        assert decode.registers % 8 == 0, "what is given out"
        assert decode.prefetch <= 4, bits
    for channels in (64, 128, 256, 512):
        tile, step = tuning.prefill_shape(channels, torch.float16)
        assert tile % 16 == step % 16 == 0, "rows and columns of the matrix unit"
        if channels <= 256:
            held = 2 * channels * (tile + 2 * step * tuning.prefill_stages)
            assert held <= (227 << 10 if device != "default" else 160 << 10)
    for warps in (tuning.prefill_warps, tuning.append_warps, tuning.lower_warps):
        assert warps in (1, 2, 4, 8, 16)
    assert (tuning.library_unit > 0) == (device != "default"), "multiprocessors of Hopper"


@pytest.mark.parametrize("unit", [-64, 100])
def test_a_unit_that_no_tile_divides_is_refused(unit: int) -> None:
    table = json.loads(tuning_table())
    table["default"]["library_unit"] = unit
    with pytest.raises(ArtifactError, match=r"tuning\.json has numbers that no kernel can be launched with"):
        read_tunings(json.dumps(table))


@pytest.mark.parametrize("lost", CODE_BITS)
def test_a_table_of_tunings_that_lacks_a_width_is_refused(lost: int) -> None:
    table = json.loads(tuning_table())
    del table["default"]["decode"][str(lost)]
    with pytest.raises(ArtifactError, match=r"tuning\.json does not say how V is decoded at exactly 16"):
        read_tunings(json.dumps(table))


def test_a_table_of_tunings_with_a_former_name_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"tuning\.json: .*shrink_warps") as refusal:
        read_tunings(tuning_table().replace("lower_warps", "shrink_warps"))
    assert "\n" not in str(refusal.value)


def test_help_does_not_wait_for_torch() -> None:
    command = (
        "import sys; from pmkvq_compiler import cli; cli._parser().format_help(); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


if __name__ == "__main__":
    check_kernels_in_other_orders()
