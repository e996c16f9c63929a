"""`--dump-passes` shows the program after each pass, as Python that can be read and compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pmkvq_compiler.passes.base import Pass, PassError, run_passes
from pmkvq_compiler.passes.dump import write_dump
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.verify import Stage
from tests.programs import captured, full_plan


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dumps of a whole pipeline that folds key scales of one layer and maps V of another."""
    folder = tmp_path_factory.mktemp("dump") / "new" / "folder"
    program = captured("llama")
    write_dump(program, folder)
    run_passes(program, [LocateAttention()], folder)
    site = program.sites[0]
    scales = {0: torch.full((site.num_key_value_heads, site.key_head_dim), 2.0, dtype=torch.float64)}
    maps = {1: torch.eye(site.value_head_dim, dtype=torch.float64).repeat(site.num_key_value_heads, 1, 1)}
    run_passes(program, pipeline(scales, {}, maps, full_plan(program.sites)), folder)
    return folder


def test_every_pass_leaves_a_file_in_the_order_in_which_it_ran(dumped: Path) -> None:
    assert [path.stem for path in sorted(dumped.iterdir())] == [
        "00-capture",
        "01-LocateAttention",
        "02-FoldKeyScales",
        "03-FoldValueTransform",
        "04-RewriteAttention",
        "05-RotateKeys",
        "06-BakePlan",
        "07-Canonicalize",
        "08-FuseNorms",
        "09-FuseRope",
        "10-FuseLinears",
        "11-OutlineLayers",
    ]


def test_a_dump_shows_what_its_pass_did(dumped: Path) -> None:
    text = {path.stem.split("-")[1]: path.read_text() for path in dumped.iterdir()}
    assert "# site:" not in text["capture"]
    assert text["LocateAttention"].count("# site: layer ") == 3
    assert "are multiplied by scales from 2 to 2" in text["FoldKeyScales"]
    assert "self_attn.v_proj.weight: 2 heads of 16 rows from 0 on" in text["FoldValueTransform"]
    assert "pmkvq.attention" in text["FoldValueTransform"]
    assert "pmkvq.attention" not in text["RewriteAttention"]
    assert "# plan: none yet" in text["RotateKeys"]
    assert "# plan: none yet" not in text["BakePlan"]
    assert "rms_norm" not in text["Canonicalize"]
    assert "rms_norm" in text["FuseNorms"]
    assert "fused_rope" in text["FuseRope"]
    assert "fused_gated_linear" in text["FuseLinears"]
    assert text["OutlineLayers"].count("def forward") > text["FuseNorms"].count("def forward")


def test_every_dump_is_python(dumped: Path) -> None:
    for path in dumped.iterdir():
        compile(path.read_text(), path.name, "exec")


def test_a_pass_that_fails_says_which_ran_before_it() -> None:
    class Failing(Pass):
        """1. Divide by zero."""

        takes = leaves = Stage.CAPTURED

        def run(self, program: Program) -> bool:
            return bool(1 // 0)

    with pytest.raises(PassError, match="before it ran: no pass"):
        run_passes(captured("llama"), [Failing()])
    with pytest.raises(PassError, match="before it ran: LocateAttention, LocateAttention"):
        run_passes(captured("llama"), [LocateAttention(), LocateAttention(), Failing()])


def test_a_pass_says_whether_it_changed_anything() -> None:
    program = captured("llama")
    assert run_passes(program, [LocateAttention()])["LocateAttention"].modified
    assert not run_passes(program, [LocateAttention()])["LocateAttention"].modified
