"""The steps of a compile, from the source model to the artifact."""

from __future__ import annotations

import gc
import importlib
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.opened import rooms_of
from pmkvq_compiler.calibrate.storage import calibration_path, load_or_calibrate
from pmkvq_compiler.emit.artifact import remove_unlisted, write_manifest
from pmkvq_compiler.emit.check import check_artifact
from pmkvq_compiler.emit.cubins import check_plan, check_targets, write_cubins
from pmkvq_compiler.emit.model_source import vocab_size
from pmkvq_compiler.emit.names import package_name
from pmkvq_compiler.emit.package import emit_package, write_for_transformers, write_project
from pmkvq_compiler.emit.place import Place, claimed
from pmkvq_compiler.emit.rehearsal import locate
from pmkvq_compiler.emit.weights import weight_bytes, write_weights
from pmkvq_compiler.emit.whole import check_whole, other_bytes, rename, write_others
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.interrupts import Signals, watched
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.base import Pass, run_passes
from pmkvq_compiler.passes.dump import write_dump
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rotate_keys import rotated_layers
from pmkvq_compiler.plan.feasible import check_feasible
from pmkvq_compiler.plan.rerank import best_plans
from pmkvq_compiler.plan.solution import Folds, Solution
from pmkvq_compiler.problem import Problem, resolve, unserved_feature
from pmkvq_compiler.progress import Progress, Steps
from pmkvq_compiler.report.contents import Report, report_contents
from pmkvq_compiler.report.page import write_report
from pmkvq_compiler.runtime.plan import CachePlan
from pmkvq_compiler.runtime.weights import tensor_table
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.checkpoint import INDEX_FILE
from pmkvq_compiler.source.multimodal import Whole
from pmkvq_compiler.source.rope import fixed_frequencies
from pmkvq_compiler.source.source import Source, open_source

MAX_SHARD_BYTES = 2 * 10**9
"""A file of weights is mapped into memory while it is loaded."""
DEFAULT_MAX_LEN = 4096
"""Tokens of the longest sequence, for models whose configuration sets no limit."""

BESIDE_WEIGHTS = 16 * 2**20
"""Roughly the bytes of everything in an artifact besides its weights: tokenizer, code and report."""


@dataclass(frozen=True)
class CompileResult:
    """What a compile decided and where it wrote it; `path` is None after a dry run."""

    path: Path | None
    plan: CachePlan
    report: Report


def compile_model(options: CompileOptions, progress: Progress) -> CompileResult:
    """Compile `options.model` into an artifact at `options.output`.

    Raises `UsageError` for a request that makes no sense and `CompileError` for one that cannot be met. In both cases
    `options.output` stays as it was.
    """
    onnx_export = _onnx_export() if options.onnx else None
    check_targets(options.aot)
    with watched() as signals:
        steps = Steps(signals.checking(progress))
        place = nullcontext() if options.dry_run else claimed(options.output, options.force, _inputs(options), signals)
        with place as claim:
            return _compile(options, onnx_export, steps, claim, signals)


def _inputs(options: CompileOptions) -> dict[str, Path]:
    """The files and folders that the compile reads, each with a description. The artifact must not replace them."""
    model, calib = Path(options.model).expanduser(), Path(options.calib)
    inputs = {"the model": model} if model.exists() else {}
    return inputs if options.calib == "builtin" else {**inputs, "the calibration text": calib}


def _compile(
    options: CompileOptions, onnx_export: ModuleType | None, steps: Steps, place: Place | None, signals: Signals
) -> CompileResult:
    source, program, max_len = captured(options, steps)
    problem = resolve(options, program.sites, max_len, source.dtype, program.states)
    whole = source.whole if options.whole else None
    if onnx_export is not None:
        onnx_export.check_expressible(program)
    if place is not None:
        needed = weight_bytes(program, source.dtype) + (0 if whole is None else other_bytes(whole))
        place.check_room(needed + BESIDE_WEIGHTS)
    with steps("calibrate"):
        check_feasible(problem)
        calibration = load_or_calibrate(source, problem, options.output, steps.progress, options.dry_run)
    kept = calibration_path(options.output, source.name, calibration.fingerprint)
    if place is not None and kept.exists() and kept.stat().st_mtime >= steps.began:
        signals.state = f"nothing was changed, and the calibration is kept in {kept}"
    with steps("plan"):
        (tried,) = best_plans(source, [problem], calibration, steps.progress)
        gc.collect()  # the model, which is no longer needed and refers to itself
        plan = tried.solution.plan
        if options.aot:
            check_plan(plan)
    report = report_contents(source, problem, calibration, options, tried)
    if place is None:
        return CompileResult(None, plan, report)
    with steps("passes"):
        run_passes(program, _pipeline(tried.solution, calibration), options.dump_passes)
    report = _write_artifact(source, program, problem, calibration, options, onnx_export, report, steps, place, whole)
    with signals.deferred():
        place.take(options.force)
        signals.state = f"{options.output} is the new artifact, whole"
    signals.check()
    return CompileResult(options.output, plan, report)


def _write_artifact(
    source: Source,
    program: Program,
    problem: Problem,
    calibration: Calibration,
    options: CompileOptions,
    onnx_export: ModuleType | None,
    report: Report,
    steps: Steps,
    place: Place,
    whole: Whole | None,
) -> Report:
    """Write and check the artifact in the folder of `place`; returns the complete report.

    The manifest is written before the check, because the check loads the artifact, and again when all files are there.
    """
    folder = place.folder
    with steps("emit"):
        manifest, written = _write_model(source, program, calibration, options, place, steps.progress, whole)
        write_manifest(folder, manifest, written)
    if options.aot:
        with steps("aot"):
            checkpoint = [folder / name for name in manifest["weights"]]
            written += write_cubins(folder / manifest["package"], checkpoint, options.aot, steps.progress)
            write_manifest(folder, manifest, written)
    if onnx_export is not None:
        with steps("onnx"):
            written += onnx_export.write_onnx(program, folder, manifest["weights"])
    with steps("check"):
        reference = calibration.check_ids, calibration.check_logits, calibration.check_layers
        check = check_artifact(folder, place.scratch, report.dtype, rooms_of(problem.device), *reference)
    report = replace(report, check=check, seconds=steps.seconds)
    written += write_report(report, folder)
    remove_unlisted(folder, written)
    written += write_project(folder, manifest["package"], source.name)
    write_manifest(folder, manifest, written)
    return report


def captured(options: CompileOptions, steps: Steps) -> tuple[Source, Program, int]:
    """The source model, its graph with every attention located, and the length in tokens that a sequence may have."""
    with steps("source"):
        source = open_source(options.model, options.dtype)
        max_len = _max_len(source, options)
        if options.whole:
            check_whole(source)
    with steps("capture"):
        program = capture(source.config)
        if options.dump_passes is not None:
            write_dump(program, options.dump_passes)
        locate(program, source.config.model_type, options.dump_passes)
    unserved = unserved_feature(source.config, program.sites, program.states)
    if options.serve and unserved is not None:
        raise UsageError(f"{source.name} has {unserved}, which the plugin for vLLM cannot serve; leave --serve out")
    return source, program, max_len


def _max_len(source: Source, options: CompileOptions) -> int:
    """Tokens of the longest sequence: as the user asks, or the model's own limit. Raises `UsageError` if the user asks
    for more positions than the model has."""
    limit = source.max_position_embeddings
    if options.max_len is not None and limit is not None and options.max_len > limit:
        fixed = fixed_frequencies(source.config)
        if fixed is not None and options.max_len > fixed.tokens:
            raise UsageError(
                f"max_len {options.max_len:,} is beyond the {limit:,} tokens up to which the RoPE of {source.name} "
                f"({fixed.rope_type}) keeps its frequencies; a longer text would change them, which makes cached keys "
                f"wrong; choose --max-len {limit} or less"
            )
        raise UsageError(
            f"max_len {options.max_len:,} is beyond the {limit:,} positions of {source.name}; "
            f"choose --max-len {limit} or less"
        )
    return options.max_len or limit or DEFAULT_MAX_LEN


def _onnx_export() -> ModuleType:
    """The module that writes ONNX models. Raises `UsageError` if a package of the extra `onnx` is missing."""
    try:
        return importlib.import_module("pmkvq_compiler.emit.onnx_export")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--onnx needs the package {error.name}, which is not installed; "
            f"run `pip install 'pmkvq-compiler[onnx]'`, or leave --onnx out"
        ) from error


def _pipeline(solution: Solution, calibration: Calibration) -> list[Pass]:
    """The passes, set up with the plan and with the scales and matrices that it multiplies K and V by."""
    folds = Folds.of(solution, calibration)
    scales: dict[int, Tensor] = {}
    rotations: dict[int, Tensor] = {}
    for layer, matrices in folds.keys.items():
        transform, powers = solution.key_transforms.get(layer, "none"), calibration.key_matrices[layer].get("none")
        if transform == "scale":
            scales[layer] = calibration.scales[layer]
        elif transform != "none":
            rotations[layer] = matrices
        if powers is not None:  # powers of two are folded into the weights; what remains must be a pure rotation
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
    whole: Whole | None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write everything but the report and the manifest. Returns the manifest's content without the digests, and the
    files that were written."""
    assert program.plan is not None
    package, folder = package_name(source.name), place.folder
    read = source.read if whole is None else rename(program, whole, source.read)
    written = emit_package(program, source, folder, package, whole)
    sizes = write_weights(program, read, folder, source.dtype, MAX_SHARD_BYTES, progress)
    weights, beside = list(sizes), [folder / INDEX_FILE] if len(sizes) > 1 else []
    if whole is not None:
        weights, beside = write_others(whole, folder, sizes)
    written += [*(folder / name for name in weights), *beside]
    written += write_for_transformers(source, program.plan.max_len, folder, place.scratch, whole)
    manifest = {
        "package": package,
        "weights": weights,
        "vocab_size": vocab_size(program),
        "plan": program.plan.to_json(),
        "key_rotations": rotated_layers(program),
        "tensors": {name: tensor_table(folder / name) for name in (*weights, f"{package}/constants.safetensors")},
        "options": {**asdict(options), "output": None, "dump_passes": None},
        "fingerprints": {"source": source.fingerprint, "calibration": calibration.fingerprint},
    }
    return manifest, written
