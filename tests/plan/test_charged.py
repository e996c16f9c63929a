"""Plans for a server, from the command line on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions
from tests.conftest import silent, token_lines
from tests.emit.test_emit import LATENT_ATTENTION
from tests.hybrids import HYBRIDS
from tests.models import tiny_folder


def test_a_report_says_what_the_planned_sequences_take_in_vllm(tmp_path: Path) -> None:
    source, calib = tiny_folder(tmp_path / "source", "llama"), token_lines(tmp_path / "tokens.jsonl")
    options = CompileOptions(
        str(source), tmp_path / "out", budget="65%", max_len=500, batch_size=4, serve=True, calib=str(calib),
        calib_samples=2, calib_len=128, dry_run=True,
    )  # fmt: skip
    report = compile_model(options, silent).report
    assert report.serving is not None
    assert report.arena_bytes < report.serving.cache_bytes <= report.budget
    assert "--serve" in report.command
    assert json.loads(json.dumps(report.to_json()))["serving"]["cache_bytes"] == report.serving.cache_bytes


@pytest.mark.parametrize(
    ("model_type", "overrides", "named"),
    [("deepseek_v3", LATENT_ATTENTION, "latent attention"), ("lfm2", HYBRIDS["lfm2"], "recurrent state")],
)
def test_what_vllm_does_not_serve_in_pages_is_not_planned(
    tmp_path: Path, model_type: str, overrides: dict[str, Any], named: str
) -> None:
    source = tiny_folder(tmp_path / "source", model_type, **overrides)
    options = CompileOptions(str(source), tmp_path / "out", budget="60%", max_len=100, serve=True, dry_run=True)
    with pytest.raises(UsageError, match=named):
        compile_model(options, silent)
