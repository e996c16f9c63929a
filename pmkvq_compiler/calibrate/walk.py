"""Run the source model on the calibration texts, observe its attention and check its numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, Seen, observed, run
from pmkvq_compiler.calibrate.logits import Logits, logits_of
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.finite import check_finite

DOUBT = 0.1
"""The share of drawn labels that are not the likeliest token, at least. See `sampled_loss`."""


Objective = Callable[[Logits, Tensor], Iterator[Tensor]]
"""Yields the parts of a text's loss, from its logits and its tokens [S]. Each part depends on a few positions."""


def reference_logits(model: PreTrainedModel, input_ids: Tensor, last: int = 0) -> Tensor:
    """Logits (float32, CPU) of a text `input_ids` [1, N] at positions 0 to N - 1: [N, V], or only the `last` rows."""
    input_ids = input_ids.to(model.device)
    positions = torch.arange(input_ids.shape[1], device=model.device).unsqueeze(0)
    with torch.no_grad(), observed(partial(check_operands, model)):
        logits = run(model, input_ids, positions, last)[0].float()
    _check_numbers(model, "the logits", logits)
    return logits.cpu()


def stretched_positions(length: int, effective_len: int) -> Tensor:
    """`length` positions (int64 [1, length]) spread evenly over `effective_len`: PM-KVQ's positional interpolation.

    They are whole numbers, so that learned position embeddings can be stretched, too.
    """
    return (torch.arange(length) * effective_len // length).unsqueeze(0)


def walk_texts(
    model: PreTrainedModel,
    samples: Sequence[Tensor],
    progress: Progress,
    step: str,
    observe: Callable[[AttentionCall], Tensor | None],
    stretch: Fraction = Fraction(1),
    objective: Objective | None = None,
    seen: Callable[[AttentionCall], Seen] | None = None,
) -> None:
    """Run the model on each sample and call `observe` with each attention. Positions are `stretch` times as far apart.

    If there is an `objective`, its gradients are computed as well. `seen` is that of `observed`.
    """

    def checked(call: AttentionCall) -> Tensor | None:
        check_operands(model, call)
        return observe(call)

    inputs = model.get_input_embeddings().register_forward_hook(
        lambda module, arguments, output: output.requires_grad_(objective is not None)
    )
    try:
        with observed(checked, seen), torch.set_grad_enabled(objective is not None):
            for index, sample in enumerate(samples):
                progress(step, index, len(samples))
                positions = stretched_positions(len(sample), int(len(sample) * stretch))
                input_ids = sample.unsqueeze(0).to(model.device)
                logits = logits_of(model, input_ids, positions.to(model.device))
                _check_numbers(model, "the last hidden states", logits.hidden)
                if objective is not None:
                    logits.hidden.backward(gradient_of(objective, logits, input_ids[0]))
        progress(step, len(samples), len(samples))
    finally:
        inputs.remove()


def gradient_of(objective: Objective, logits: Logits, tokens: Tensor) -> Tensor:
    """The gradient of an objective with respect to the last hidden states of a text, one part after the other.

    Raises `CompileError` if a logit is not finite.
    """
    hidden = logits.hidden.detach().requires_grad_()
    for loss in objective(replace(logits, hidden=hidden), tokens):
        loss.backward()
    return gradient_at(hidden)


def gradient_at(leaf: Tensor) -> Tensor:
    """The gradient that a backward pass has left at a leaf."""
    assert leaf.grad is not None
    return leaf.grad


def text_loss(logits: Logits, tokens: Tensor) -> Iterator[Tensor]:
    """The mean loss of the text itself, in nats a token."""
    for part in logits.parts():
        following = tokens[part.start + 1 : part.stop + 1]
        rows = _checked(logits, part)[: len(following)]
        yield F.cross_entropy(rows, following, reduction="sum") / (len(tokens) - 1)


def sampled_loss(logits: Logits, tokens: Tensor) -> Iterator[Tensor]:
    """The summed loss of labels drawn from the model's own distribution: its gradients are those of the Fisher
    information.

    A confident model gives gradients near zero, although real noise in its logits may well change its tokens. So we
    raise the temperature until, over the text's second half, the likeliest token has a probability of 90% at most.
    """
    temperature = 1.0
    while _confidence(logits.last(len(tokens) - len(tokens) // 2), temperature) > 1 - DOUBT:
        temperature *= 2
    generator = torch.Generator(tokens.device).manual_seed(len(tokens))
    random = torch.rand(len(tokens), 1, generator=generator, device=tokens.device)
    for part in logits.parts():
        tempered = _checked(logits, part) / temperature
        labels = _drawn(tempered.detach().softmax(-1), random[part])
        yield F.cross_entropy(tempered, labels, reduction="sum")


@torch.no_grad()
def _confidence(logits: Logits, temperature: float) -> float:
    """The mean probability of the likeliest token."""
    sums = [(_checked(logits, part) / temperature).softmax(-1).amax(-1).sum() for part in logits.parts()]
    return float(torch.stack(sums).sum()) / len(logits)


def _checked(logits: Logits, part: slice) -> Tensor:
    """The logits of some positions. Raises `CompileError` if one is not finite."""
    found = logits[part]
    _check_numbers(logits.model, "the logits", found)
    return found


def _drawn(probabilities: Tensor, random: Tensor) -> Tensor:
    """Draw a label for each row of `probabilities` [S, V], by inverting the cumulative distribution at `random` numbers
    [S, 1]. `torch.multinomial` would take V random numbers a row."""
    cumulative = probabilities.cumsum(-1)
    return torch.searchsorted(cumulative, random * cumulative[:, -1:])[:, 0]


def check_operands(model: PreTrainedModel, call: AttentionCall) -> None:
    """Raises `CompileError` if the operands of an attention are not finite."""
    for name, operand in (("queries", call.query), ("keys", call.key), ("values", call.value)):
        _check_numbers(model, f"the {name} of layer {call.layer}", operand)


def _check_numbers(model: PreTrainedModel, what: str, numbers: Tensor) -> None:
    """Raises `CompileError` if a number is not finite. If a weight is the cause, the message names it."""
    if bool(torch.isfinite(numbers).all()):
        return
    for name, value in model.state_dict().items():
        if not value.is_meta:  # a layer that is read when it is needed, and checked then
            check_finite(name, value)
    dtype = str(model.dtype).removeprefix("torch.")
    raise CompileError(
        f"on the calibration text {what} are not finite in {dtype}, though all weights are, so numbers overflow inside "
        f"the model; try --dtype float32, or fetch the checkpoint again"
    )
