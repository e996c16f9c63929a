"""Calibration: what the plan and the folds need to know of the real model, from a few texts.

Walks over the same samples, nothing kept between them but a few numbers a layer: the maxima of K and the scales of K
at positions that are stretched to the effective length; then, backwards too, the moments that transforms are matched
to, and last what each format costs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pmkvq_compiler.passes.fold_value_transform import can_transform
from pmkvq_compiler.passes.program import AttentionSite, Projection
from pmkvq_compiler.runtime.rotation import hadamard

from .errors import CompileError, UsageError
from .formats import Transform
from .matching import Moments
from .options import CompileOptions
from .ranges import USUAL, Ranges, exponents, unusual
from .recipes import Recipe, key_formats, resolved, value_formats
from .recording import ATTENTION, AttentionCall, observed, run
from .scales import ScaleSearch
from .sensitivity import GradientProduct, Losses, OutputLoss
from .source import Source, check_finite

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
"""Called with a stage's text, the steps done and the steps in all."""

Matrices = dict[int, dict[Transform, Tensor]]
"""By layer and transform, what each head is multiplied by."""

MEASURES = 5
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
    `value_matrices` float64 [Hkv, d, d]: what each of the recipe's transforms multiplies K or V by, powers of two
    included that bring them to where codes are good (`ranges`); "none" is among them in the layers that need it.

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
    ranges = Ranges()
    _walk(model, samples[:1], progress, "Measuring ranges", ranges)
    calibration = replace(
        calibration,
        key_matrices=_normalized(
            _key_matrices(sites, recipe, calibration.scales, moments), _key_powers(source, sites, ranges)
        ),
        value_matrices=_normalized(_value_matrices(sites, recipe, moments), _value_powers(source, sites, ranges)),
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
        key_loss=_averaged("keys", measured.key, len(samples)),
        value_loss=_averaged("values", measured.value, len(samples)),
    )
    if recipe.measure == "gradient":
        product = GradientProduct(*formats[:2])
        walk("Measuring gradients", product, stretch, _text_loss)
        calibration = replace(
            calibration,
            key_gradient=_averaged("keys", product.key, len(samples)),
            value_gradient=_averaged("values", product.value, len(samples)),
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


def _key_powers(source: Source, sites: Sequence[AttentionSite], ranges: Ranges) -> dict[int, Tensor]:
    """By layer, what each head of K is multiplied by [Hkv, dk] and its queries are divided by, where that is needed."""
    powers = {}
    for site in sites:
        if not bool(unusual(ranges.key[site.layer]).any()):
            continue
        if site.reason is not None or site.key is None or site.query is None:
            _tell_unusual("K", site.layer, ranges.key[site.layer], site.reason)
            continue
        weights = (_rows(source, site.key), _rows(source, site.query))
        chosen = 2 ** exponents(ranges.key[site.layer], *weights, source.dtype)
        powers[site.layer] = chosen.unsqueeze(1).expand(-1, site.key_head_dim)
    return powers


def _value_powers(source: Source, sites: Sequence[AttentionSite], ranges: Ranges) -> dict[int, Tensor]:
    """By layer, what each head of V is multiplied by [Hkv, dv] and its outputs are divided by, where that is needed."""
    powers = {}
    for site in sites:
        if not bool(unusual(ranges.value[site.layer]).any()):
            continue
        if site.value is None or site.output is None:
            reason = "v_proj or the output projection was not found in the graph"
            _tell_unusual("V", site.layer, ranges.value[site.layer], reason)
            continue
        weights = (_rows(source, site.value), source.read(site.output))
        chosen = 2 ** exponents(ranges.value[site.layer], *weights, source.dtype)
        powers[site.layer] = chosen.unsqueeze(1).expand(-1, site.value_head_dim)
    return powers


def _rows(source: Source, projection: Projection) -> Tensor:
    return source.read(projection.weight)[projection.start : projection.start + projection.rows]


def _tell_unusual(tensor: str, layer: int, ranges: Tensor, reason: str | None) -> None:
    logger.warning(
        "%s of layer %d spans %.0e in a typical token, which codes express coarsely below %.0e and above %.0e, and it "
        "cannot be scaled in the weights (%s): expect a loss there, or scale the model's weights",
        tensor, layer, float(ranges[unusual(ranges)][0]), *USUAL, reason,
    )  # fmt: skip


def _normalized(matrices: Matrices, powers: dict[int, Tensor]) -> Matrices:
    """Matrices whose rows are multiplied by powers of two, where there are any; "none" among them, then."""
    normalized = dict(matrices)
    for layer, power in powers.items():
        plain: dict[Transform, Tensor] = {
            "none": torch.eye(power.shape[1], dtype=torch.float64).repeat(len(power), 1, 1)
        }
        normalized[layer] = {
            transform: power.unsqueeze(2) * matrix for transform, matrix in {**matrices.get(layer, {}), **plain}.items()
        }
    return normalized


def calibration_fingerprint(
    source: Source, sites: Sequence[AttentionSite], options: CompileOptions, max_len: int
) -> str:
    """sha256 (hex) of everything that a calibration depends on; not the budget or the batch size."""
    facts: dict[str, Any] = {
        "measures": MEASURES,
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "source": source.fingerprint,
        "runs_in": str(source.running_dtype(pick_device(options.device))),
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
    with torch.no_grad(), observed(partial(_check_operands, model)):
        logits = run(model, input_ids, positions)[0].float()
    _check_numbers(model, "the logits", logits)
    return logits.cpu()


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
        usable = torch.device(name).type in ("cpu", "cuda")
        torch.empty(0, device=name if usable else "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here; choose auto, cpu or cuda") from error
    if not usable:
        raise UsageError(f"device {name!r} cannot run a calibration; choose auto, cpu or cuda")
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
    largest, limit = max(map(max, filter(None, [prefix, *documents])), default=0), _vocabulary(source)
    if largest >= limit:
        raise CompileError(
            f"the tokenizer of {source.name} makes token {largest:,} of the calibration text and the model has "
            f"{limit:,} tokens; fetch the tokenizer that belongs to this model"
        )
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
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise CompileError(f"calibration text {calib!r} cannot be read: {reason}; name a text file") from error


def _read_tokens(source: Source, calib: str) -> tuple[list[int], list[list[int]]]:
    """Tokens that begin every sample (a model's `<bos>`), and the tokens of each document."""
    try:
        text = _calibration_bytes(calib).decode("utf-8-sig")  # editors of some systems begin a file with a mark
    except UnicodeDecodeError as error:
        raise CompileError(f"calibration text {calib!r} is not UTF-8; convert it") from error
    if calib == "builtin" or Path(calib).suffix not in (".jsonl", ".ndjson", ".json"):
        tokenizer = _needed_tokenizer(source, calib)
        return _prefix(tokenizer), [tokenizer.encode(text, add_special_tokens=False)]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split at U+2028 inside of a string
        if line.strip():
            documents.append(_read_record(source, calib, number, line))
    return (_prefix(source.tokenizer) if source.tokenizer else []), documents


def _read_record(source: Source, calib: str, number: int, line: str) -> list[int]:
    """Tokens of one JSON line: `{"text": ...}`, `{"messages": [...]}` (chat template) or `{"input_ids": [...]}`."""
    where = f"calibration text {calib!r}, line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CompileError(f"{where}, is not JSON; write one object a line, or name the file .txt") from error
    match record:
        case {"input_ids": [*ids]}:
            limit = _vocabulary(source)
            if not all(type(token) is int and 0 <= token < limit for token in ids):
                raise CompileError(f"{where}, has input_ids that are not whole numbers below {limit:,}")
            return ids
        case {"text": str(text)}:
            return _encode(_needed_tokenizer(source, calib), text, where)
        case {"messages": [*messages]}:
            tokenizer = _needed_tokenizer(source, calib)
            try:
                text = str(tokenizer.apply_chat_template(messages, tokenize=False))
            except Exception as error:  # templates raise errors of their own
                raise CompileError(f"{where}, does not fit the model's chat template: {error}") from error
            return _encode(tokenizer, text, where)
    raise CompileError(f'{where}, has no "text", "messages" or "input_ids"')


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, where: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name halves of a surrogate pair, which no tokenizer takes
        raise CompileError(f"{where}, has text that is not Unicode ({error.reason}); remove it") from error
    return tokenizer.encode(text, add_special_tokens=False)


def _vocabulary(source: Source) -> int:
    """Tokens that the model has embeddings for."""
    return int(source.config.get_text_config().vocab_size)


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

    def checked(call: AttentionCall) -> Tensor | None:
        _check_operands(model, call)
        return observe(call)

    inputs = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(objective is not None)
    )
    try:
        with observed(checked), torch.set_grad_enabled(objective is not None):
            for index, sample in enumerate(samples):
                progress(stage, index, len(samples))
                positions = stretched_positions(len(sample), int(len(sample) * stretch))
                input_ids = sample.unsqueeze(0).to(model.device)
                logits = run(model, input_ids, positions.to(model.device))[0].float()
                _check_numbers(model, "the logits", logits)
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


def _check_operands(model: PreTrainedModel, call: AttentionCall) -> None:
    """Raises `CompileError` for the first layer whose attention gets numbers that are not finite."""
    for name, operand in (("queries", call.query), ("keys", call.key), ("values", call.value)):
        _check_numbers(model, f"the {name} of layer {call.layer}", operand)


def _check_numbers(model: PreTrainedModel, what: str, numbers: Tensor) -> None:
    """Raises `CompileError` where a number is not finite; a weight that is not is named as the cause."""
    if bool(torch.isfinite(numbers).all()):
        return
    for name, value in model.state_dict().items():
        check_finite(name, value)
    dtype = str(model.dtype).removeprefix("torch.")
    raise CompileError(
        f"on the calibration text {what} are not finite in {dtype}, though all weights are: numbers overflow inside "
        f"the model; try --dtype float32, or fetch the checkpoint again"
    )


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
