"""Calibration: what the plan and the folds need to know of the real model, from a few texts.

Walks over the same samples, nothing kept between them but a few numbers a layer: the maxima of K and the scales of K
at positions that are stretched to the effective length; then, backwards too, the moments that transforms are matched
to, and last what each format costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch
from torch import Tensor

from pmkvq_compiler.calibrate.attention_hook import ATTENTION, AttentionCall
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
from pmkvq_compiler.calibrate.output_loss import OutputLoss
from pmkvq_compiler.calibrate.ranges import Ranges
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.calibrate.transforms import Moments
from pmkvq_compiler.calibrate.walk import pick_device, reference_logits, sampled_loss, text_loss, walk_texts
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.formats import Losses
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.recipes import key_formats, resolved, value_formats
from pmkvq_compiler.source.source import Source


def calibrate(
    source: Source, sites: Sequence[AttentionSite], options: CompileOptions, max_len: int, progress: Progress
) -> Calibration:
    """Run the source model on the calibration texts.

    With `--recipe none` nothing is quantized and only the check logits are made. Raises `CompileError` where the texts
    are too short or the model's loss is not finite.
    """
    samples, recipe = read_samples(source, options), resolved(options)
    stretch = Fraction(effective_length(source, options, max_len), options.calib_len)
    model = source.load_model(ATTENTION, pick_device(options.device)).requires_grad_(False)
    check_ids = samples[0][None, : min(CHECK_TOKENS, max_len)]
    calibration = Calibration(
        fingerprint=calibration_fingerprint(source, sites, options, max_len),
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
        check_logits=reference_logits(model, check_ids)[-CHECK_LOGITS:],
    )
    if options.recipe == "none":
        return calibration

    walk = partial(walk_texts, model, samples, progress)
    if "scale" in recipe.key_transforms:
        maxima: dict[int, Tensor] = {}
        walk("Measuring keys", partial(_record_maxima, maxima), stretch)
        search = ScaleSearch(
            {site.layer: maxima[site.layer] for site in sites if site.reason is None},
            min(options.bits),
            recipe.sink,
            recipe.block,
        )
        walk("Searching scales", search, stretch)
        alphas, scales = search.best()
        key_maxima = {layer: value.cpu() for layer, value in maxima.items()}
        calibration = replace(calibration, key_maxima=key_maxima, alphas=alphas, scales=scales)
    moments = Moments()
    if "match" in (*recipe.key_transforms, *recipe.value_transforms):
        walk("Measuring moments", moments, objective=sampled_loss)
    ranges = Ranges()
    walk_texts(model, samples[:1], progress, "Measuring ranges", ranges)
    calibration = replace(
        calibration,
        key_matrices=normalized(
            key_matrices_of(sites, recipe, calibration.scales, moments), key_powers(source, sites, ranges)
        ),
        value_matrices=normalized(value_matrices_of(sites, recipe, moments), value_powers(source, sites, ranges)),
    )

    formats = (
        {site.layer: key_formats(recipe, options.bits, can_scale=site.reason is None) for site in sites},
        {site.layer: value_formats(recipe, options.bits, can_transform=can_transform(site)) for site in sites},
        calibration.key_matrices,
        calibration.value_matrices,
    )
    measured = OutputLoss(*formats, recipe.sink, recipe.block)
    walk("Measuring losses", measured, objective=sampled_loss)
    calibration = replace(
        calibration,
        key_loss=_averaged("keys", measured.key, len(samples)),
        value_loss=_averaged("values", measured.value, len(samples)),
    )
    if recipe.measure == "gradient":
        product = GradientProduct(*formats[:2])
        walk("Measuring gradients", product, stretch, text_loss)
        calibration = replace(
            calibration,
            key_gradient=_averaged("keys", product.key, len(samples)),
            value_gradient=_averaged("values", product.value, len(samples)),
        )
    return calibration


def _record_maxima(maxima: dict[int, Tensor], call: AttentionCall) -> None:
    largest = call.key.abs().amax(dim=(0, 2)).float()
    maxima[call.layer] = torch.maximum(maxima.get(call.layer, largest), largest)


def _averaged(what: str, totals: Losses, samples: int) -> Losses:
    """Means over the samples. Raises `CompileError` for a layer in which one is not finite."""
    for layer in sorted(totals):
        for kept, value in totals[layer].items():
            if not math.isfinite(value):
                raise CompileError(
                    f"what layer {layer} would lose with {what} at {kept.bits} bits cannot be measured: it is {value}; "
                    f"try --dtype float32, or other calibration texts with --calib"
                )
    return {layer: {key: value / samples for key, value in totals[layer].items()} for layer in sorted(totals)}
