"""Calibration: what the plan and the folds need to know of the real model, from a few stretched texts.

Three walks over the same samples, nothing kept between them but a few numbers a layer: the maxima of K, the scales of
K, and last, backwards too, the sensitivities.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime.plan import KeyAxis

from .errors import CompileError, UsageError
from .options import CompileOptions
from .planner import sink_and_window
from .recording import ATTENTION, AttentionCall, as_cached, observed, run
from .scales import ScaleSearch
from .source import Source, check_finite

Progress = Callable[[str, int, int], None]
"""Called with a stage's text, the steps done and the steps in all."""

KEY_AXES: tuple[KeyAxis, ...] = ("token", "channel")
CHECK_TOKENS, CHECK_LOGITS = 512, 16
BUILTIN_TEXT = files("pmkvq_compiler") / "data" / "calibration.txt"


@dataclass(frozen=True)
class Calibration:
    """What was measured, by layer index.

    `key_maxima` float32 [Hkv, dk]: largest |K| of each channel, after RoPE. `alphas`, `scales` float64 [Hkv, dk]: the
    reparameterization of the layers whose site can be folded. `key_sensitivity[layer][bits, axis]` and
    `value_sensitivity[layer][bits]`: first-order change of the loss in nats, at most, when that tensor alone is
    quantized; they may be added up. `check_ids` int64 [1, N], `check_logits` float32 [M, V]: a text and the source
    model's logits of its last M tokens. `fingerprint` says what all this was measured with.
    """

    fingerprint: str
    key_maxima: dict[int, Tensor]
    alphas: dict[int, float]
    scales: dict[int, Tensor]
    key_sensitivity: dict[int, dict[tuple[int, KeyAxis], float]]
    value_sensitivity: dict[int, dict[int, float]]
    check_ids: Tensor
    check_logits: Tensor


def calibrate(
    source: Source, sites: Sequence[AttentionSite], options: CompileOptions, max_len: int, progress: Progress
) -> Calibration:
    """Run the source model on the calibration texts, their positions stretched to the effective length.

    With `--recipe none` nothing is quantized and only the check logits are made. Raises `CompileError` where the texts
    are too short or the model's loss is not finite.
    """
    samples = read_samples(source, options)
    positions = stretched_positions(options.calib_len, effective_length(source, options, max_len))
    model = source.load_model(ATTENTION, pick_device(options.device)).requires_grad_(False)
    check_ids = samples[:1, :CHECK_TOKENS]
    calibration = Calibration(
        fingerprint=calibration_fingerprint(source, sites, options, max_len),
        key_maxima={},
        alphas={},
        scales={},
        key_sensitivity={},
        value_sensitivity={},
        check_ids=check_ids,
        check_logits=reference_logits(model, check_ids)[-CHECK_LOGITS:],
    )
    if options.recipe == "none":
        return calibration

    sink, _ = sink_and_window(options)
    walk = partial(_walk, model, samples.to(model.device), positions.to(model.device), progress)
    maxima: dict[int, Tensor] = {}
    walk("Measuring keys", partial(_record_maxima, maxima))
    foldable = {site.layer: maxima[site.layer] for site in sites if site.reason is None}
    search = ScaleSearch(foldable, min(options.bits), sink, options.block)
    walk("Searching scales", search)
    alphas, scales = search.best()
    sensitivity = Sensitivity(scales, options.bits, sink, options.block)
    walk("Measuring sensitivities", sensitivity, backward=True)
    return replace(
        calibration,
        key_maxima={layer: value.cpu() for layer, value in maxima.items()},
        alphas=alphas,
        scales=scales,
        key_sensitivity=_averaged(sensitivity.key, len(samples)),
        value_sensitivity=_averaged(sensitivity.value, len(samples)),
    )


def calibration_fingerprint(
    source: Source, sites: Sequence[AttentionSite], options: CompileOptions, max_len: int
) -> str:
    """sha256 (hex) of everything that a calibration depends on; not the budget, the batch size or the window."""
    sink, _ = sink_and_window(options)
    facts: dict[str, Any] = {
        "source": source.fingerprint,
        "text": hashlib.sha256(_calibration_bytes(options.calib)).hexdigest(),
        "samples": options.calib_samples,
        "length": options.calib_len,
        "effective_length": effective_length(source, options, max_len),
        "foldable": [site.layer for site in sites if site.reason is None],
        "quantized": options.recipe != "none",
        "bits": sorted(options.bits),
        "sink": sink,
        "block": options.block,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


class Sensitivity:
    """Observes attention calls and, while gradients come back, adds up sum |delta x| * |dLoss / dx| over K and over V.

    That is PM-KVQ's measure with the sum in place of the mean, so that layers of different shapes can be
    compared. `delta x` is the error of the quantizer and the block layout that the cache itself uses; K is divided by
    its scale for the quantizer.
    """

    def __init__(self, scales: dict[int, Tensor], bits: Iterable[int], sink: int, block: int) -> None:
        self.scales = scales
        self.bits = tuple(bits)
        self.cached = partial(as_cached, sink=sink, block=block)
        self.key: dict[int, dict[tuple[int, KeyAxis], float]] = {}
        self.value: dict[int, dict[int, float]] = {}

    def __call__(self, call: AttentionCall) -> None:
        call.key.register_hook(partial(self._add_key, call.layer, call.key.detach()))
        call.value.register_hook(partial(self._add_value, call.layer, call.value.detach()))

    def _add_key(self, layer: int, key: Tensor, gradient: Tensor) -> None:
        total = self.key.setdefault(
            layer, dict.fromkeys(((bits, axis) for bits in self.bits for axis in KEY_AXES), 0.0)
        )
        scale = self.scales.get(layer, torch.ones(1, 1)).to(key).unsqueeze(-2)
        for bits, axis in total:
            error = self.cached(key / scale, bits, axis) * scale - key
            total[bits, axis] += (error * gradient).abs().sum(dtype=torch.float64).item()

    def _add_value(self, layer: int, value: Tensor, gradient: Tensor) -> None:
        total = self.value.setdefault(layer, dict.fromkeys(self.bits, 0.0))
        for bits in total:
            error = self.cached(value, bits, "token") - value
            total[bits] += (error * gradient).abs().sum(dtype=torch.float64).item()


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


def read_samples(source: Source, options: CompileOptions) -> Tensor:
    """Calibration samples, int64 [calib_samples, calib_len], spread evenly over the text.

    Raises `CompileError` where there are too few tokens, or text but no tokenizer.
    """
    length, wanted = options.calib_len, options.calib_samples
    if length < sink_and_window(options)[0] + options.block:
        raise UsageError(
            f"calibration texts of {length} tokens hold no block of {options.block} to quantize; raise --calib-len"
        )
    prefix, documents = _read_tokens(source, options.calib)
    body = length - len(prefix)
    chunks, rest = [], []
    for document in documents:
        whole = len(document) // body * body
        chunks += [document[start : start + body] for start in range(0, whole, body)]
        rest += document[whole:]
    chunks += [rest[start : start + body] for start in range(0, len(rest) - body + 1, body)]
    if len(chunks) < wanted:
        raise CompileError(
            f"calibration text {options.calib!r} has {sum(map(len, documents)):,} tokens, and {wanted} samples of "
            f"{length} need {wanted * body:,}; give more text or lower --calib-samples or --calib-len"
        )
    return torch.tensor([prefix + chunks[index * len(chunks) // wanted] for index in range(wanted)])


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
    samples: Tensor,
    positions: Tensor,
    progress: Progress,
    stage: str,
    observe: Callable[[AttentionCall], None],
    backward: bool = False,
) -> None:
    """Run the model on each sample under `observe`, and its loss backwards if told."""
    inputs = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(backward)
    )
    try:
        with observed(observe), torch.set_grad_enabled(backward):
            for index, sample in enumerate(samples):
                progress(stage, index, len(samples))
                logits = run(model, sample.unsqueeze(0), positions)
                loss = F.cross_entropy(logits[0, :-1].float(), sample[1:])
                _check_loss(model, loss)
                if backward:
                    loss.backward()
        progress(stage, len(samples), len(samples))
    finally:
        inputs.remove()


def _check_loss(model: PreTrainedModel, loss: Tensor) -> None:
    if not torch.isfinite(loss):
        for name, value in model.state_dict().items():
            check_finite(name, value)
        raise CompileError(f"the model's loss on the calibration text is {loss.item()}; try --dtype float32")


def _averaged(totals: dict[int, dict[Any, float]], samples: int) -> dict[int, dict[Any, float]]:
    return {layer: {key: value / samples for key, value in totals[layer].items()} for layer in sorted(totals)}
