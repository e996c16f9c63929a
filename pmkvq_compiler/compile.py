"""The road of a model, from a source to an artifact."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pmkvq_compiler.aot import check_plan, check_targets, write_cubins
from pmkvq_compiler.artifact import remove_unlisted, write_manifest
from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.calibrate import Calibration
from pmkvq_compiler.calibration_file import calibration_path, load_or_calibrate
from pmkvq_compiler.capture import capture
from pmkvq_compiler.check import check_artifact
from pmkvq_compiler.checkpoint import INDEX_FILE
from pmkvq_compiler.emit import emit_package, weight_bytes, write_for_transformers, write_project, write_weights
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.formats import Transform
from pmkvq_compiler.interrupts import Signals, watched
from pmkvq_compiler.model_source import vocab_size
from pmkvq_compiler.names import package_name
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import Pass, run_passes
from pmkvq_compiler.passes.dump import write_dump
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import AttentionSite, Program
from pmkvq_compiler.passes.rotate_keys import rotated_layers
from pmkvq_compiler.place import Place, claimed
from pmkvq_compiler.planner import Folds, Solution, cache_bytes_at_16_bits, check_feasible, plan_table
from pmkvq_compiler.rehearsal import locate
from pmkvq_compiler.report import bytes_over_tokens, reproduction_command, write_report
from pmkvq_compiler.runtime.load import tensor_table
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.source import Source, open_source
from pmkvq_compiler.trial import Tried, best_plans

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done of it and what there is to do."""

MAX_SHARD_BYTES = 5 * 10**9
DEFAULT_MAX_LEN = 4096
"""Tokens a sequence, for models whose configuration sets no limit."""
BESIDE_WEIGHTS = 16 * 2**20
"""Bytes of an artifact that are no weights, roughly: a tokenizer, code, a report."""


@dataclass(frozen=True)
class CompileResult:
    """What a compile decided and where it wrote it; `path` is None after a dry run."""

    path: Path | None
    plan: CachePlan
    rows: list[dict[str, Any]]
    report: dict[str, Any]


def compile_model(options: CompileOptions, progress: Progress) -> CompileResult:
    """Compile `options.model` into an artifact at `options.output`.

    Raises `UsageError` for a request that makes no sense and `CompileError` for one that cannot be met;
    `options.output` is then absent or as it was.
    """
    onnx_export = _onnx_export() if options.onnx else None
    check_targets(options.aot)
    with watched() as signals:
        stages = Stages(signals.checking(progress))
        place = nullcontext() if options.dry_run else claimed(options.output, options.force, _inputs(options), signals)
        with place as claim:
            return _compile(options, onnx_export, stages, claim, signals)


def _inputs(options: CompileOptions) -> dict[str, Path]:
    """What is read from files, which an artifact must not replace: their paths by what they are."""
    model, calib = Path(options.model).expanduser(), Path(options.calib)
    inputs = {"the model": model} if model.exists() else {}
    return inputs if options.calib == "builtin" else {**inputs, "the calibration text": calib}


def _compile(
    options: CompileOptions, onnx_export: ModuleType | None, stages: Stages, place: Place | None, signals: Signals
) -> CompileResult:
    source, program, max_len = captured(options, stages)
    if onnx_export is not None:
        onnx_export.check_expressible(program)
    if place is not None:
        place.check_room(weight_bytes(program, source.dtype) + BESIDE_WEIGHTS)
    with stages("calibrate"):
        budget = _budget(program, options, max_len)
        check_feasible(program.sites, options, budget, max_len, source.dtype)
        calibration = load_or_calibrate(source, program.sites, options, max_len, stages.progress)
    kept = calibration_path(options.output, source.name, calibration.fingerprint)
    if place is not None and kept.exists() and kept.stat().st_mtime >= stages.began:
        signals.state = f"nothing was changed, and the calibration is kept in {kept}"
    with stages("plan"):
        (tried,) = best_plans(source, program.sites, calibration, options, [budget], max_len, stages.progress)
        plan = tried.solution.plan
        if options.aot:
            check_plan(plan)
    report = _report(source, program, calibration, options, tried)
    if place is None:
        return CompileResult(None, plan, report["rows"], report)
    with stages("passes"):
        run_passes(program, _pipeline(tried.solution, calibration), options.dump_passes)
    _write_artifact(source, program, calibration, options, onnx_export, report, stages, place)
    with signals.deferred():
        place.take(options.force)
        signals.state = f"{options.output} is the new artifact, whole"
    signals.check()
    return CompileResult(options.output, plan, report["rows"], report)


def _write_artifact(
    source: Source,
    program: Program,
    calibration: Calibration,
    options: CompileOptions,
    onnx_export: ModuleType | None,
    report: dict[str, Any],
    stages: Stages,
    place: Place,
) -> None:
    """Write and check the artifact in the folder of `place`. The manifest, which loading needs, is written before the
    check and again when all is there."""
    folder = place.folder
    with stages("emit"):
        manifest, written = _write_model(source, program, calibration, options, place, stages.progress)
        write_manifest(folder, manifest, written)
    if options.aot:
        with stages("aot"):
            checkpoint = [folder / name for name in manifest["weights"]]
            written += write_cubins(folder / manifest["package"], checkpoint, options.aot, stages.progress)
            write_manifest(folder, manifest, written)
    if onnx_export is not None:
        with stages("onnx"):
            written += onnx_export.write_onnx(program, folder, manifest["weights"])
    with stages("check"):
        check_ids, check_logits = calibration.check_ids, calibration.check_logits
        report["check"] = check_artifact(folder, place.scratch, report["dtype"], check_ids, check_logits)
    report["seconds"] = stages.seconds
    written += write_report(report, folder)
    remove_unlisted(folder, written)
    written += write_project(folder, manifest["package"], source.name)
    write_manifest(folder, manifest, written)


def captured(options: CompileOptions, stages: Stages) -> tuple[Source, Program, int]:
    """The source model, its graph with the attention located, and the tokens that a sequence may have."""
    with stages("source"):
        source = open_source(options.model, options.dtype)
        max_len = _max_len(source, options)
    with stages("capture"):
        program = capture(source.config)
        if options.dump_passes is not None:
            write_dump(program, options.dump_passes)
        locate(program, source.config.model_type, options.dump_passes)
    return source, program, max_len


class Stages:
    """Tells when a stage begins and ends, and keeps how long it took."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self.began = time.time()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self.progress(stage, 0, 1)
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 2)
        self.progress(stage, 1, 1)


def _max_len(source: Source, options: CompileOptions) -> int:
    """Tokens a sequence: the user's, or the model's own limit. Raises `UsageError` beyond the model's positions."""
    limit = source.max_position_embeddings
    if options.max_len is not None and limit is not None and options.max_len > limit:
        raise UsageError(
            f"max_len {options.max_len:,} is beyond the {limit:,} positions of {source.name}; "
            f"choose --max-len {limit} or less"
        )
    return options.max_len or limit or DEFAULT_MAX_LEN


def _onnx_export() -> ModuleType:
    """The module that writes ONNX, which needs packages of an extra. Raises `UsageError` where one is missing."""
    try:
        return importlib.import_module("pmkvq_compiler.onnx_export")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--onnx needs the package {error.name}, which is not installed; "
            f"run `pip install 'pmkvq-compiler[onnx]'` or leave --onnx out"
        ) from error


def _budget(program: Program, options: CompileOptions, max_len: int) -> int | None:
    """Bytes for the cache; None where the recipe takes what it takes."""
    if options.budget is None:
        return None
    return parse_budget(options.budget, cache_bytes_at_16_bits(program.sites, max_len, options.batch_size))


def _pipeline(solution: Solution, calibration: Calibration) -> list[Pass]:
    """The passes that make a program of the plan and what it multiplies K and V by."""
    folds = Folds.of(solution, calibration)
    scales: dict[int, Tensor] = {}
    rotations: dict[int, Tensor] = {}
    for layer, matrices in folds.keys.items():
        transform, powers = solution.key_transforms.get(layer, "none"), calibration.key_matrices[layer].get("none")
        if transform == "scale":
            scales[layer] = calibration.scales[layer]
        elif transform != "none":
            rotations[layer] = matrices
        if powers is not None:  # of two: a fold of its own, in front of a rotation
            power = powers.diagonal(dim1=1, dim2=2)
            scales[layer] = scales.get(layer, torch.ones_like(power)) / power
            if layer in rotations:
                rotations[layer] = matrices / power.unsqueeze(2)
    return pipeline(scales, rotations, folds.values, solution.plan)


def _write_model(
    source: Source,
    program: Program,
    calibration: Calibration,
    options: CompileOptions,
    place: Place,
    progress: Progress,
) -> tuple[dict[str, Any], list[Path]]:
    """Write everything but report and manifest; what the manifest says beside the digests, and the files."""
    assert program.plan is not None
    package, folder = package_name(source.name), place.folder
    written = emit_package(program, source, folder, package)
    sizes = write_weights(program, source.read, folder, source.dtype, MAX_SHARD_BYTES, progress)
    written += [folder / name for name in [*sizes, *([INDEX_FILE] if len(sizes) > 1 else [])]]
    written += write_for_transformers(source, program.plan.max_len, folder, place.scratch)
    manifest = {
        "package": package,
        "weights": list(sizes),
        "vocab_size": vocab_size(program),
        "plan": program.plan.to_json(),
        "key_rotations": rotated_layers(program),
        "tensors": {name: tensor_table(folder / name) for name in (*sizes, f"{package}/constants.safetensors")},
        "options": {**asdict(options), "output": None, "dump_passes": None},
        "fingerprints": {"source": source.fingerprint, "calibration": calibration.fingerprint},
    }
    return manifest, written


def _report(
    source: Source, program: Program, calibration: Calibration, options: CompileOptions, tried: Tried
) -> dict[str, Any]:
    """What `report.json` holds, but for check and times."""
    solution, plan = tried.solution, tried.solution.plan
    folded = Folds.of(solution, calibration).values
    rows = [
        {
            **asdict(row),
            "fold": _folded(site, row.key_transform),
            "value_fold": _value_folded(site, site.layer in folded),
        }
        for row, site in zip(plan_table(solution, program.sites, calibration), program.sites, strict=True)
    ]
    original = cache_bytes_at_16_bits(program.sites, plan.max_len, plan.batch_size)
    return {
        "model": options.model,
        "name": source.base_model or source.name,
        "recipe": plan.recipe,
        "budget": plan.budget,
        "max_len": plan.max_len,
        "batch_size": plan.batch_size,
        "dtype": plan.dtype,
        "aot": list(options.aot),
        "versions": {name: version(name) for name in ("pmkvq-compiler", "torch", "transformers")},
        "command": reproduction_command(options),
        "rows": rows,
        "arena_bytes": plan.arena_bytes,
        "original_bytes": original,
        "true_bits": 16 * plan.arena_bytes / original,
        "predicted_loss": tried.loss,
        "bytes_over_tokens": bytes_over_tokens(plan),
    }


def _folded(site: AttentionSite, transform: Transform) -> str:
    """ "folded" where the key scales are, else why they are not."""
    if transform == "scale":
        return "folded"
    if transform != "none":
        return "queries and keys are rotated behind RoPE instead, at run time"
    return site.reason or "the plan does better without: it groups K by channel, or leaves it as it is"


def _value_folded(site: AttentionSite, folded: bool) -> str:
    """ "folded" where what V is multiplied by is in the weights, else why V is as it is."""
    if folded:
        return "folded"
    if site.value is None or site.output is None:
        return "v_proj or the output projection was not found in the graph"
    return "the plan does better without"
