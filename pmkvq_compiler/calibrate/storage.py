"""Calibrations are stored beside the artifact, so that planning for another budget does not run the model again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from pmkvq_compiler.calibrate.calibration import Calibration, Matrices, calibration_fingerprint
from pmkvq_compiler.calibrate.layer_outputs import layer_tensors, layers_of
from pmkvq_compiler.calibrate.measure import calibrate
from pmkvq_compiler.formats import Format, Losses, Transform
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.source import Source

logger = logging.getLogger(__name__)

METADATA_KEY = "pmkvq_calibration"
DIGEST_KEY = "sha256"
DIGEST_MARK = f'"{DIGEST_KEY}":"'.encode()
"""The bytes before the digest in the file's header. They occur once: quotes in the other metadata are escaped."""
NO_DIGEST = "0" * 64
"""Takes the place of the digest while the digest is computed."""
MATRICES = ("key_matrices", "value_matrices")
LOSSES = ("key_loss", "value_loss", "key_gradient", "value_gradient")


def load_or_calibrate(
    source: Source, problem: Problem, output: Path, progress: Progress, dry_run: bool = False
) -> Calibration:
    """The calibration for the problem. It is read from the file beside an artifact at `output` if that file matches.
    Otherwise it is measured and, unless this is a dry run, written there. A damaged file is replaced with a warning.
    What an interrupted calibration of a model that is read layer by layer has noted beside that file is not done again.
    """
    fingerprint = calibration_fingerprint(source, problem)
    path = calibration_path(output, source.name, fingerprint)
    if path.is_file():
        try:
            calibration = load_calibration(path)
            if calibration.fingerprint == fingerprint:
                return calibration
            logger.warning("%s belongs to another calibration; calibrating again", path)
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s); calibrating again", path, error)
    if dry_run:
        return calibrate(source, problem, progress)
    notes = path.with_name(f".{path.stem}.notes")
    calibration = calibrate(source, problem, progress, notes)
    save_calibration(calibration, path)
    shutil.rmtree(notes, ignore_errors=True)
    return calibration


def calibration_path(output: Path, name: str, fingerprint: str) -> Path:
    """The path of the calibration of the model called `name`, for an artifact at `output`."""
    short = name.encode()[:180].decode(errors="ignore")  # a file's name has 255 bytes at most
    return output.parent / f"{short}-{fingerprint[:12]}.calibration.safetensors"


def save_calibration(calibration: Calibration, path: Path) -> None:
    """Write one safetensors file, with numbers as JSON in its metadata. The file appears as a whole or not at all.

    The metadata also holds the sha256 of all bytes of the file, so that damage is found before anything else is read.
    """
    tensors = {"check_ids": calibration.check_ids, "check_logits": calibration.check_logits}
    tensors |= layer_tensors(calibration.check_layers)
    tensors |= {f"key_maxima.{layer}": value for layer, value in calibration.key_maxima.items()}
    tensors |= {f"scales.{layer}": value for layer, value in calibration.scales.items()}
    for kind in MATRICES:
        for layer, matrices in getattr(calibration, kind).items():
            tensors |= {f"{kind}.{layer}.{transform}": value for transform, value in matrices.items()}
    facts = {
        "fingerprint": calibration.fingerprint,
        "alphas": sorted(calibration.alphas.items()),
        **{name: _listed(getattr(calibration, name)) for name in LOSSES},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        data = save(contiguous, metadata={METADATA_KEY: json.dumps(facts), DIGEST_KEY: NO_DIGEST})
        head, mark, rest = data.partition(DIGEST_MARK)
        digest = hashlib.sha256(data).hexdigest().encode()
        unfinished.write_bytes(head + mark + digest + rest[len(digest) :])
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_calibration(path: Path) -> Calibration:
    """The inverse of `save_calibration`.

    Raises `ValueError` if the file's bytes are not those that were written, and `OSError` if it cannot be read.
    """
    _check_digest(path.read_bytes())
    with safe_open(path, framework="pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a mapping)
        facts = json.loads((handle.metadata() or {})[METADATA_KEY])
    return Calibration(
        fingerprint=facts["fingerprint"],
        key_maxima=_by_layer(tensors, "key_maxima"),
        alphas=dict(facts["alphas"]),
        scales=_by_layer(tensors, "scales"),
        key_matrices=_matrices(tensors, "key_matrices"),
        value_matrices=_matrices(tensors, "value_matrices"),
        **{name: _losses(facts[name]) for name in LOSSES},
        check_ids=tensors["check_ids"],
        check_logits=tensors["check_logits"],
        check_layers=layers_of(tensors),
    )


def _check_digest(data: bytes) -> None:
    """Raises `ValueError` if the sha256 of a calibration file's bytes is not the one in its header."""
    head, mark, rest = data.partition(DIGEST_MARK)
    digest, rest = rest[: len(NO_DIGEST)], rest[len(NO_DIGEST) :]
    if hashlib.sha256(head + mark + NO_DIGEST.encode() + rest).hexdigest().encode() != digest:
        raise ValueError("its sha256 is not the one in its header")


def _listed(losses: Losses) -> list[Any]:
    return [(layer, *astuple(kept), value) for layer, values in losses.items() for kept, value in values.items()]


def _losses(listed: list[Any]) -> Losses:
    losses: Losses = {}
    for layer, *kept, value in listed:
        losses.setdefault(layer, {})[Format(*kept)] = value
    return losses


def _matrices(tensors: dict[str, Tensor], kind: str) -> Matrices:
    matrices: Matrices = {}
    for name, value in tensors.items():
        if name.startswith(f"{kind}."):
            _, layer, transform = name.split(".")
            matrices.setdefault(int(layer), {})[cast(Transform, transform)] = value
    return matrices


def _by_layer(tensors: dict[str, Tensor], kind: str) -> dict[int, Tensor]:
    layers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith(f"{kind}."))
    return {layer: tensors[f"{kind}.{layer}"] for layer in layers}
