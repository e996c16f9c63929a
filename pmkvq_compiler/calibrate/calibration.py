"""What a calibration holds, and what it depends on."""

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
"""By layer and transform, what each head is multiplied by."""

MEASURES = 6
"""To be raised where what is measured changes, so that no older calibration is taken for a new one."""

CHECK_TOKENS, CHECK_LOGITS = 512, 16


@dataclass(frozen=True)
class Calibration:
    """What was measured, by layer index.

    `key_maxima` float32 [Hkv, dk]: largest |K| of each channel, after RoPE. `alphas`, `scales` float64 [Hkv, dk]: the
    reparameterization of the layers whose site can be folded, if the recipe asks for any. `key_matrices` and
    `value_matrices` float64 [Hkv, d, d]: what each of the recipe's transforms multiplies K or V by, powers of two
    included that bring them to where codes are good (`ranges`); "none" is among them in the layers that need it.

    `key_loss` and `value_loss`: predicted loss of the output, in nats a token, when that tensor alone is kept in a
    format; they may be added up. `key_gradient` and `value_gradient`: the same in the paper's measure, where the recipe
    plans by it. `check_ids` int64 [1, N], `check_logits` float32 [M, V]: a text and the source model's logits of its
    last M tokens; `check_layers`: what its layers make of the text's beginning. `fingerprint` says what all this was
    measured with.
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
    """sha256 (hex) of everything that a calibration depends on; not the budget or the batch size."""
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
    """Length that the texts' positions are stretched to. Raises `UsageError` where it cannot hold them."""
    length = problem.effective_len or max(problem.max_len, problem.calib_len)
    limit = source.max_position_embeddings
    if length < problem.calib_len:
        raise UsageError(
            f"effective length {length:,} is shorter than the {problem.calib_len:,} tokens of a calibration text; "
            f"lower --calib-len or raise --effective-len"
        )
    if limit is not None and length > limit:
        raise UsageError(
            f"calibration texts would reach position {length:,} of {source.name}, which has {limit:,}; "
            f"lower --calib-len or --effective-len"
        )
    return length
