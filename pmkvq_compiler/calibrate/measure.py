"""Measures on a few texts what the plan and the folds need to know about the real model.

The model runs over the same samples several times, and each time only a few numbers a layer are kept. The first runs
find the maxima and the scales of K, at positions that are spread over the effective length. Then come the moments that
transforms are matched to, and last the cost of each format; these need a backward pass, too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.calibrate.caches import Caches
from pmkvq_compiler.calibrate.calibration import (
    CHECK_LOGITS,
    CHECK_TOKENS,
    Calibration,
    calibration_fingerprint,
    effective_length,
)
from pmkvq_compiler.calibrate.gradient_product import GradientProduct
from pmkvq_compiler.calibrate.key_scales import ScaleSearch
from pmkvq_compiler.calibrate.matrices import key_matrices_of, key_powers, normalized, value_matrices_of, value_powers
from pmkvq_compiler.calibrate.opened import opened
from pmkvq_compiler.calibrate.output_loss import OutputLoss
from pmkvq_compiler.calibrate.ranges import Ranges
from pmkvq_compiler.calibrate.streamed_model import StreamedModel, module_of
from pmkvq_compiler.calibrate.streamed_walk import walk_model
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.calibrate.transforms import Moments
from pmkvq_compiler.calibrate.walk import reference_logits, sampled_loss, text_loss
from pmkvq_compiler.calibrate.watch_layers import layer_outputs
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.formats import Losses, key_formats, value_formats
from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.source import Source


def calibrate(source: Source, problem: Problem, progress: Progress, notes: Path | None = None) -> Calibration:
    """Run the source model on the calibration texts.

    If the recipe quantizes nothing, only the reference outputs for the check are computed. A model that is read layer
    by layer leaves notes of what is done in the folder `notes`, or in a temporary one.

    Raises `CompileError` if the texts are too short or the model's numbers are not finite.
    """
    samples = read_samples(source, problem)
    stretch = Fraction(effective_length(source, problem), problem.calib_len)
    model = opened(source, problem)
    body = module_of(model)
    check_ids = samples[0][None, : min(CHECK_TOKENS, problem.max_len)]
    calibration = Calibration(
        fingerprint=calibration_fingerprint(source, problem),
        key_maxima={},
        alphas={},
        scales={},
        key_matrices={},
        value_matrices={},
        key_loss={},
        value_loss={},
        key_gradient={},
        value_gradient={},
        check_ids=check_ids,
        check_logits=reference_logits(body, check_ids, CHECK_LOGITS),
        check_layers=layer_outputs(body, (*problem.sites, *problem.readers), check_ids),
    )
    if not problem.recipe.quantizes:
        return calibration
    if isinstance(model, StreamedModel) and problem.recipe.measure == "gradient":
        raise CompileError(
            f"{source.name} is too large for the memory that is free, and recipe {problem.recipe_name!r} compares "
            f"layers that are far apart, so it needs the whole model; choose another recipe or more memory"
        )
    with tempfile.TemporaryDirectory() as place:
        seen = Caches.of(body, problem).seen
        walk = partial(walk_model, model, Path(place) if notes is None else notes, seen=seen)
        if "scale" in problem.recipe.key_transforms:
            calibration = _with_scales(calibration, problem, partial(walk, samples, progress), stretch)
        walk_one = partial(walk, samples[:1], progress)
        calibration = _with_matrices(calibration, source, problem, partial(walk, samples, progress), walk_one)
        return _with_losses(calibration, problem, partial(walk, samples, progress), stretch, len(samples))


def _with_scales(
    calibration: Calibration, problem: Problem, walk: Callable[..., None], stretch: Fraction
) -> Calibration:
    """Add the maxima of K at stretched positions, and the scales that are found from them."""
    recipe, maxima = problem.recipe, dict[int, Tensor]()
    walk("Measuring keys", partial(_record_maxima, maxima), stretch)
    foldable = {
        site.layer: _of_all_heads(maxima[site.layer]) if site.heads_share_scales else maxima[site.layer]
        for site in problem.sites
        if site.reason is None
    }
    search = ScaleSearch(foldable, min(problem.bits), recipe.sink, recipe.block)
    walk("Searching scales", search, stretch)
    alphas, scales = search.best()
    return replace(calibration, key_maxima=maxima, alphas=alphas, scales=scales)


def _with_matrices(
    calibration: Calibration,
    source: Source,
    problem: Problem,
    walk: Callable[..., None],
    walk_one: Callable[..., None],
) -> Calibration:
    """Add the matrices that K and V may be multiplied by; `walk_one` runs over the first text alone."""
    recipe, sites, moments, ranges = problem.recipe, problem.sites, Moments(), Ranges()
    if "match" in (*recipe.key_transforms, *recipe.value_transforms):
        walk("Measuring moments", moments, objective=sampled_loss)
    walk_one("Measuring ranges", ranges)
    keys = key_matrices_of(sites, recipe, calibration.scales, moments)
    values = value_matrices_of(sites, recipe, moments)
    return replace(
        calibration,
        key_matrices=normalized(keys, key_powers(source, sites, ranges)),
        value_matrices=normalized(values, value_powers(source, sites, ranges)),
    )


def _with_losses(
    calibration: Calibration, problem: Problem, walk: Callable[..., None], stretch: Fraction, texts: int
) -> Calibration:
    """Add the cost of each format, in the measure that the report shows and in the one that the recipe plans by."""
    recipe, bits = problem.recipe, problem.bits
    keys = {site.layer: key_formats(recipe, bits, can_scale=site.reason is None) for site in problem.sites}
    values = {site.layer: value_formats(recipe, bits, can_transform=can_transform(site)) for site in problem.sites}
    losses = OutputLoss(keys, values, calibration.key_matrices, calibration.value_matrices, recipe.sink, recipe.block)
    walk("Measuring losses", losses, objective=sampled_loss)
    calibration = replace(
        calibration,
        key_loss=_averaged("keys", losses.key, texts),
        value_loss=_averaged("values", losses.value, texts),
    )
    if recipe.measure != "gradient":
        return calibration
    product = GradientProduct(keys, values)
    walk("Measuring gradients", product, stretch, text_loss)
    return replace(
        calibration,
        key_gradient=_averaged("keys", product.key, texts),
        value_gradient=_averaged("values", product.value, texts),
    )


def _of_all_heads(maxima: Tensor) -> Tensor:
    """Maxima [Hkv, d] that are the same for all heads."""
    return maxima.amax(dim=0, keepdim=True).expand_as(maxima)


def _record_maxima(maxima: dict[int, Tensor], call: AttentionCall) -> None:
    largest = call.key.abs().amax(dim=(0, 2)).float().cpu()
    maxima[call.layer] = torch.maximum(maxima.get(call.layer, largest), largest)


def _averaged(what: str, totals: Losses, samples: int) -> Losses:
    """The means over the samples. Raises `CompileError` if one is not finite."""
    for layer in sorted(totals):
        for kept, value in totals[layer].items():
            if not math.isfinite(value):
                raise CompileError(
                    f"the loss of layer {layer} with {what} at {kept.bits} bits cannot be measured, because it is "
                    f"{value}; try --dtype float32, or other calibration texts with --calib"
                )
    return {layer: {key: value / samples for key, value in totals[layer].items()} for layer in sorted(totals)}
