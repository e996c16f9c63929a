"""The contents of a calibration, and everything that they depend on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from torch import Tensor

from pmkvq_compiler.calibrate.layer_outputs import LayerOutputs
from pmkvq_compiler.calibrate.texts import calibration_bytes
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.formats import Losses, Transform
from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.source.source import Source

Matrices = dict[int, dict[Transform, Tensor]]
"""For each layer and transform, the matrices that its heads are multiplied by."""

MEASURES = 7
"""Raise this number whenever the measurements change, so that no calibration of an older version is used."""

CHECK_TOKENS, CHECK_LOGITS = 512, 16


@dataclass(frozen=True)
class Calibration:
    """The measurements, by layer index.

    `key_maxima` (float32 [Hkv, dk]) are the largest |K| of each channel, after RoPE. `alphas` (exponents) and `scales`
    (float64 [Hkv, dk]) are PM-KVQ's reparameterization of the layers that can be folded, if the recipe uses it.
    `key_matrices` and `value_matrices` (float64 [Hkv, d, d]) are the matrices by which each of the recipe's transforms
    multiplies K or V. They include powers of two that bring K and V to a magnitude that codes express well (`ranges`).
    The transform "none" has a matrix in the layers that need such powers.

    `key_loss` and `value_loss` are the predicted losses of the model's output, in nats a token, when only that tensor
    is stored in a format; they may be added up. `key_gradient` and `value_gradient` are the same in PM-KVQ's measure,
    if the recipe plans by it. `check_ids` (int64 [1, N]) is a text, `check_logits` (float32 [M, V]) are the source
    model's logits of its last M tokens, and `check_layers` are the outputs of its layers for the text's beginning.
    `fingerprint` identifies everything that the measurements depend on.
    """

    fingerprint: str
    key_maxima: dict[int, Tensor]
    alphas: dict[int, float]
    scales: dict[int, Tensor]
    key_matrices: Matrices
    value_matrices: Matrices
    key_loss: Losses
    value_loss: Losses
    key_gradient: Losses
    value_gradient: Losses
    check_ids: Tensor
    check_logits: Tensor
    check_layers: LayerOutputs


def calibration_fingerprint(source: Source, problem: Problem) -> str:
    """sha256 (hex) of everything that a calibration depends on. It does not depend on the budget or the batch size."""
    facts: dict[str, Any] = {
        "measures": MEASURES,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "source": source.fingerprint,
        "runs_in": str(source.running_dtype(problem.device)),
        "text": hashlib.sha256(calibration_bytes(problem.calib)).hexdigest(),
        "samples": problem.calib_samples,
        "length": problem.calib_len,
        "effective_length": effective_length(source, problem),
        "check": min(CHECK_TOKENS, problem.max_len),
        "foldable": [(site.layer, site.reason is None, can_transform(site)) for site in problem.sites],
        "recipe": repr(problem.recipe) if problem.recipe.quantizes else "none",
        "bits": sorted(problem.bits),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def effective_length(source: Source, problem: Problem) -> int:
    """Number of positions that a text is spread over. Raises `UsageError` if it is smaller than the number of tokens in
    a text, or larger than the number of positions of the model."""
    length = problem.effective_len or max(problem.max_len, problem.calib_len)
    limit = source.max_position_embeddings
    if length < problem.calib_len:
        raise UsageError(
            f"effective length {length:,} is less than the {problem.calib_len:,} tokens of a calibration text; "
            f"lower --calib-len or raise --effective-len"
        )
    if limit is not None and length > limit:
        raise UsageError(
            f"calibration texts would reach position {length:,} of {source.name}, which has {limit:,} positions; "
            f"lower --calib-len or --effective-len"
        )
    return length
