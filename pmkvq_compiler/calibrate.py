"""Calibration: what the plan and the folds need to know of the real model, from a few texts.

Walks over the same samples, nothing kept between them but a few numbers a layer: the maxima of K and the scales of K
at positions that are stretched to the effective length; then, backwards too, the moments that transforms are matched
to, and last what each format costs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime.rotation import hadamard

from .errors import CompileError, UsageError
from .formats import Transform
from .matching import Moments
from .options import CompileOptions
from .recipes import Recipe, key_formats, resolved, value_formats
from .recording import ATTENTION, AttentionCall, observed, run
from .scales import ScaleSearch
from .sensitivity import GradientProduct, Losses, OutputLoss
from .source import Source, check_finite

Progress = Callable[[str, int, int], None]
"""Called with a stage's text, the steps done and the steps in all."""

Matrices = dict[int, dict[Transform, Tensor]]
"""By layer and transform, what each head is multiplied by."""

MEASURES = 4
"""To be raised where what is measured changes, so that no older calibration is taken for a new one."""

CHECK_TOKENS, CHECK_LOGITS = 512, 16
DOUBT = 0.1
"""Share of labels, drawn to measure sensitivities, that are not the likeliest."""

BUILTIN_TEXT = files("pmkvq_compiler") / "data" / "calibration.txt"


@dataclass(frozen=True)
class Calibration:
    """What was measured, by layer index.

    `key_maxima` float32 [Hkv, dk]: largest |K| of each channel, after RoPE. `alphas`, `scales` float64 [Hkv, dk]: the
    reparameterization of the layers whose site can be folded, if the recipe asks for any. `key_matrices` and
    `value_matrices` float64 [Hkv, d, d]: what each of the recipe's transforms multiplies K or V by.

    `key_loss` and `value_loss`: predicted loss of the output, in nats a token, when that tensor alone is kept in a
    format; they may be added up. `key_gradient` and `value_gradient`: the same in the paper's measure, where the recipe
    plans by it. `check_ids` int64 [1, N], `check_logits` float32 [M, V]: a text and the source model's logits of its
    last M tokens. `fingerprint` says what all this was measured with.
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

    walk = partial(_walk, model, samples, progress)
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
        walk("Measuring moments", moments, objective=_sampled_loss)
    calibration = replace(
        calibration,
        key_matrices=_key_matrices(sites, recipe, calibration.scales, moments),
        value_matrices=_value_matrices(sites, recipe, moments),
    )

    formats = (
        {site.layer: key_formats(recipe, options.bits, can_scale=site.reason is None) for site in sites},
        {site.layer: value_formats(recipe, options.bits, can_transform=can_transform(site)) for site in sites},
        calibration.key_matrices,
        calibration.value_matrices,
    )
    measured = OutputLoss(*formats, recipe.sink, recipe.block)
    walk("Measuring losses", measured, objective=_sampled_loss)
    calibration = replace(
        calibration,
        key_loss=_averaged(measured.key, len(samples)),
        value_loss=_averaged(measured.value, len(samples)),
    )
    if recipe.measure == "gradient":
        product = GradientProduct(*formats[:2])
        walk("Measuring gradients", product, stretch, _text_loss)
        calibration = replace(
            calibration,
            key_gradient=_averaged(product.key, len(samples)),
            value_gradient=_averaged(product.value, len(samples)),
        )
    return calibration


def _key_matrices(
    sites: Sequence[AttentionSite], recipe: Recipe, scales: dict[int, Tensor], moments: Moments
) -> Matrices:
    matched = moments.key_rotations()
    matrices: Matrices = {layer: {"scale": torch.diag_embed(1 / scale)} for layer, scale in scales.items()}
    for site in sites:
        if "rotate" in recipe.key_transforms:
            rotation = hadamard(site.key_head_dim).repeat(site.num_key_value_heads, 1, 1)
            matrices.setdefault(site.layer, {})["rotate"] = rotation
        if "match" in recipe.key_transforms:
            matrices.setdefault(site.layer, {})["match"] = matched[site.layer]
    return matrices


def _value_matrices(sites: Sequence[AttentionSite], recipe: Recipe, moments: Moments) -> Matrices:
    matched = moments.value_matrices()
    matrices: Matrices = {}
    for site in filter(can_transform, sites):
        if "rotate" in recipe.value_transforms:
            rotation = hadamard(site.value_head_dim).repeat(site.num_key_value_heads, 1, 1)
            matrices.setdefault(site.layer, {})["rotate"] = rotation
        if "match" in recipe.value_transforms:
            matrices.setdefault(site.layer, {})["match"] = matched[site.layer]
    return matrices


def calibration_fingerprint(
    source: Source, sites: Sequence[AttentionSite], options: CompileOptions, max_len: int
) -> str:
    """sha256 (hex) of everything that a calibration depends on; not the budget or the batch size."""
    facts: dict[str, Any] = {
        "measures": MEASURES,
        "source": source.fingerprint,
        "text": hashlib.sha256(_calibration_bytes(options.calib)).hexdigest(),
        "samples": options.calib_samples,
        "length": options.calib_len,
        "effective_length": effective_length(source, options, max_len),
        "check": min(CHECK_TOKENS, max_len),
        "foldable": [(site.layer, site.reason is None, can_transform(site)) for site in sites],
        "recipe": repr(resolved(options)) if options.recipe != "none" else "none",
        "bits": sorted(options.bits),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def reference_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits (float32 [N, V], CPU) of a text `input_ids` [1, N] at its plain positions."""
    input_ids = input_ids.to(model.device)
    positions = torch.arange(input_ids.shape[1], device=model.device).unsqueeze(0)
    with torch.no_grad(), observed(lambda call: None):
        return run(model, input_ids, positions)[0].float().cpu()


def stretched_positions(length: int, effective_len: int) -> Tensor:
    """`length` positions (int64 [1, length]) spread evenly over `effective_len` (PM-KVQ's positional
    interpolation); whole numbers, so that learned positions can be stretched too."""
    return (torch.arange(length) * effective_len // length).unsqueeze(0)


def effective_length(source: Source, options: CompileOptions, max_len: int) -> int:
    """Length that the texts' positions are stretched to. Raises `UsageError` where it cannot hold them."""
    length = options.effective_len or max(max_len, options.calib_len)
    limit = source.max_position_embeddings
    if length < options.calib_len:
        raise UsageError(
            f"effective length {length:,} is shorter than the {options.calib_len:,} tokens of a calibration text; "
            f"lower --calib-len or raise --effective-len"
        )
    if limit is not None and length > limit:
        raise UsageError(
            f"calibration texts would reach position {length:,} of {source.name}, which has {limit:,}; "
            f"lower --calib-len or --effective-len"
        )
    return length


def pick_device(name: str) -> str:
    """The device to run the model on; `auto` is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here; choose auto, cpu or cuda") from error
    return name


def read_samples(source: Source, options: CompileOptions) -> list[Tensor]:
    """Calibration samples, int64 [at most calib_len] each, spread evenly over the text.

    A document is cut into pieces of `calib_len` tokens; of what is left, at least half as long a piece is a sample too,
    shorter ones are joined. Raises `CompileError` where there are too few tokens, or text but no tokenizer.
    """
    length, wanted, recipe = options.calib_len, options.calib_samples, resolved(options)
    if length < recipe.sink + recipe.block:
        raise UsageError(
            f"calibration texts of {length} tokens hold no block of {recipe.block} to quantize; raise --calib-len"
        )
    prefix, documents = _read_tokens(source, options.calib)
    body = length - len(prefix)
    chunks, rest = [], []
    for document in documents:
        pieces = [document[start : start + body] for start in range(0, len(document), body)]
        chunks += [piece for piece in pieces if 2 * len(piece) >= body]
        rest += [token for piece in pieces if 2 * len(piece) < body for token in piece]
    chunks += [rest[start : start + body] for start in range(0, len(rest) - body + 1, body)]
    if len(chunks) < wanted:
        raise CompileError(
            f"calibration text {options.calib!r} has {sum(map(len, documents)):,} tokens, and {wanted} samples of "
            f"{length} need {wanted * body:,}; give more text or lower --calib-samples or --calib-len"
        )
    return [torch.tensor(prefix + chunks[index * len(chunks) // wanted]) for index in range(wanted)]


def _calibration_bytes(calib: str) -> bytes:
    if calib == "builtin":
        return BUILTIN_TEXT.read_bytes()
    try:
        return Path(calib).read_bytes()
    except OSError as error:
        raise CompileError(f"calibration text {calib!r} cannot be read: {error.strerror}; name a text file") from error


def _read_tokens(source: Source, calib: str) -> tuple[list[int], list[list[int]]]:
    """Tokens that begin every sample (a model's `<bos>`), and the tokens of each document."""
    try:
        text = _calibration_bytes(calib).decode()
    except UnicodeDecodeError as error:
        raise CompileError(f"calibration text {calib!r} is not UTF-8; convert it") from error
    if calib == "builtin" or Path(calib).suffix not in (".jsonl", ".ndjson", ".json"):
        tokenizer = _needed_tokenizer(source, calib)
        return _prefix(tokenizer), [tokenizer.encode(text, add_special_tokens=False)]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            documents.append(_read_record(source, calib, number, line))
    return (_prefix(source.tokenizer) if source.tokenizer else []), documents


def _read_record(source: Source, calib: str, number: int, line: str) -> list[int]:
    """Tokens of one JSON line: `{"text": ...}`, `{"messages": [...]}` (chat template) or `{"input_ids": [...]}`."""
    where = f"calibration text {calib!r}, line {number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CompileError(f"{where}, is not JSON; write one object a line, or name the file .txt") from error
    match record:
        case {"input_ids": [*ids]}:
            limit = source.config.get_text_config().vocab_size
            if not all(isinstance(token, int) and 0 <= token < limit for token in ids):
                raise CompileError(f"{where}, has input_ids that are not whole numbers below {limit:,}")
            return ids
        case {"text": str(text)}:
            return _needed_tokenizer(source, calib).encode(text, add_special_tokens=False)
        case {"messages": [*messages]}:
            tokenizer = _needed_tokenizer(source, calib)
            try:
                text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception as error:  # templates raise errors of their own
                raise CompileError(f"{where}, does not fit the model's chat template: {error}") from error
            return tokenizer.encode(text, add_special_tokens=False)
    raise CompileError(f'{where}, has no "text", "messages" or "input_ids"')


def _needed_tokenizer(source: Source, calib: str) -> PreTrainedTokenizerBase:
    if source.tokenizer is None:
        raise CompileError(
            f"{source.name} has no tokenizer, so {calib!r} cannot be turned into tokens; "
            f'give --calib a JSON lines file with {{"input_ids": [...]}}'
        )
    return source.tokenizer


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [token for token in tokenizer.encode("") if token == tokenizer.bos_token_id][:1]


def _record_maxima(maxima: dict[int, Tensor], call: AttentionCall) -> None:
    largest = call.key.abs().amax(dim=(0, 2)).float()
    maxima[call.layer] = torch.maximum(maxima.get(call.layer, largest), largest)


def _walk(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    progress: Progress,
    stage: str,
    observe: Callable[[AttentionCall], Tensor | None],
    stretch: Fraction = Fraction(1),
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Run the model on each sample under `observe`, its positions `stretch` times as far apart, and an `objective` of
    logits [S, V] and tokens [S] backwards if given."""
    inputs = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(objective is not None)
    )
    try:
        with observed(observe), torch.set_grad_enabled(objective is not None):
            for index, sample in enumerate(samples):
                progress(stage, index, len(samples))
                positions = stretched_positions(len(sample), int(len(sample) * stretch))
                input_ids = sample.unsqueeze(0).to(model.device)
                logits = run(model, input_ids, positions.to(model.device))[0].float()
                _check_loss(model, F.cross_entropy(logits[:-1], input_ids[0, 1:]))
                if objective is not None:
                    objective(logits, input_ids[0]).backward()
        progress(stage, len(samples), len(samples))
    finally:
        inputs.remove()


def _text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss (nats) of the text itself."""
    return F.cross_entropy(logits[:-1], tokens[1:])


def _sampled_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The summed loss of labels drawn from the model's own distribution: its gradients are those of the Fisher
    information.

    A model that is sure of every token has almost none, although noise in its logits, which is not infinitesimal, may
    well change them. The distribution is therefore tempered until a label of the second half, where outputs are
    compared, is not the likeliest one at least once in ten times.
    """
    temperature = 1.0
    while (logits.detach()[len(tokens) // 2 :] / temperature).softmax(-1).amax(-1).mean() > 1 - DOUBT:
        temperature *= 2
    tempered = logits / temperature
    generator = torch.Generator(logits.device).manual_seed(len(tokens))
    labels = _drawn(tempered.detach().softmax(-1), generator)
    return F.cross_entropy(tempered, labels, reduction="sum")


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A label of each row of `probabilities` [S, V], by the inverse of its distribution function: that takes one random
    number a row, `torch.multinomial` takes V."""
    cumulative = probabilities.cumsum(-1)
    chosen = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chosen)[:, 0]


def _check_loss(model: PreTrainedModel, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        for name, value in model.state_dict().items():
            check_finite(name, value)
        raise CompileError(f"the model's loss on the calibration text is {loss.item()}; try --dtype float32")


def _averaged(totals: Losses, samples: int) -> Losses:
    return {layer: {key: value / samples for key, value in totals[layer].items()} for layer in sorted(totals)}
