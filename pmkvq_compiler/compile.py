"""The road of a model, from a source to an artifact."""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pmkvq_compiler.artifact import check_target, staged, write_manifest
from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.calibrate import Calibration
from pmkvq_compiler.calibration_file import load_or_calibrate
from pmkvq_compiler.capture import capture
from pmkvq_compiler.check import check_artifact
from pmkvq_compiler.emit import emit_package, write_weights
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.planner import PlanRow, cache_bytes_at_16_bits, plan_table, solve
from pmkvq_compiler.report import bytes_over_tokens, reproduction_command, write_report
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.source import Source, open_source

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what there is to do."""

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class CompileResult:
    """What a compile decided and where it wrote it; `path` is None after a dry run."""

    path: Path | None
    plan: CachePlan
    rows: list[PlanRow]
    report: dict[str, Any]


def compile_model(options: CompileOptions, progress: Progress) -> CompileResult:
    """Compile `options.model` into an artifact at `options.output`.

    Raises `UsageError` for a request that makes no sense and `CompileError` for one that cannot be met; `options.output`
    is then absent or as it was.
    """
    seconds = _Stopwatch(progress)
    if not options.dry_run:
        check_target(options.output, options.force)
    with seconds("source"):
        source = open_source(options.model, options.dtype)
        max_len = _max_len(source, options)
    with seconds("capture"):
        program = capture(source.config)
        run_passes(program, [LocateAttention()])
    with seconds("calibrate"):
        calibration = load_or_calibrate(source, program.sites, options, max_len, progress)
    with seconds("plan"):
        plan = _plan(source, program, calibration, options, max_len)
        rows = plan_table(plan, program.sites, calibration)
    report = _report(source, program, options, plan, rows)
    if options.dry_run:
        return CompileResult(None, plan, rows, report)
    with seconds("passes"):
        scales = calibration.scales if options.recipe in SCALED_RECIPES else {}
        run_passes(program, pipeline(scales, plan))
    with staged(options.output) as folder:
        package = _package_name(source.name)
        with seconds("emit"):
            emit_package(program, source, folder, package)
            write_weights(program, source.read, folder, source.dtype, MAX_SHARD_BYTES, progress)
            source.config.save_pretrained(folder)
            source.generation_config.save_pretrained(folder)
            source.save_tokenizer(folder)
        with seconds("check"):
            write_manifest(folder, _manifest(source, package, options, plan, calibration))
            report["check"] = check_artifact(folder, plan.dtype, calibration.check_ids, calibration.check_logits)
        report["seconds"] = seconds.taken
        write_report(report, folder)
        write_manifest(folder, _manifest(source, package, options, plan, calibration))
    return CompileResult(options.output, plan, rows, report)
