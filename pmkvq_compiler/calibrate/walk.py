"""Run the source model on the calibration texts, observe its attention and check its numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, Seen, observed, run
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.source.source import check_finite

DOUBT = 0.1
"""The share of drawn labels that are not the likeliest token, at least. See `sampled_loss`."""


def reference_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits (float32 [N, V], CPU) of a text `input_ids` [1, N] at positions 0 to N - 1."""
    input_ids = input_ids.to(model.device)
    positions = torch.arange(input_ids.shape[1], device=model.device).unsqueeze(0)
    with torch.no_grad(), observed(partial(_check_operands, model)):
        logits = run(model, input_ids, positions)[0].float()
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
    objective: Callable[[Tensor, Tensor], Tensor] | None = None,
    seen: Callable[[AttentionCall], Seen] | None = None,
) -> None:
    """Run the model on each sample and call `observe` with each attention. Positions are `stretch` times as far apart.

    If there is an `objective`, a function of logits [S, V] and tokens [S], its gradients are computed as well.
    `seen` is that of `observed`.
    """

    def checked(call: AttentionCall) -> Tensor | None:
        _check_operands(model, call)
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
                logits = run(model, input_ids, positions.to(model.device))[0].float()
                _check_numbers(model, "the logits", logits)
                if objective is not None:
                    objective(logits, input_ids[0]).backward()
        progress(step, len(samples), len(samples))
    finally:
        inputs.remove()


def text_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The mean loss of the text itself, in nats a token."""
    return F.cross_entropy(logits[:-1], tokens[1:])


def sampled_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The summed loss of labels drawn from the model's own distribution: its gradients are those of the Fisher
    information.

    A confident model gives gradients near zero, although real noise in its logits may well change its tokens. So we
    raise the temperature until, over the text's second half, the likeliest token has a probability of 90% at most.
    """
    temperature = 1.0
    while (logits.detach()[len(tokens) // 2 :] / temperature).softmax(-1).amax(-1).mean() > 1 - DOUBT:
        temperature *= 2
    tempered = logits / temperature
    generator = torch.Generator(logits.device).manual_seed(len(tokens))
    labels = _drawn(tempered.detach().softmax(-1), generator)
    return F.cross_entropy(tempered, labels, reduction="sum")


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a label for each row of `probabilities` [S, V], by inverting the cumulative distribution. This takes one
    random number a row, where `torch.multinomial` takes V."""
    cumulative = probabilities.cumsum(-1)
    chosen = torch.rand(len(probabilities), 1, generator=generator, device=probabilities.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, chosen)[:, 0]


def _check_operands(model: PreTrainedModel, call: AttentionCall) -> None:
    """Raises `CompileError` if the operands of an attention are not finite."""
    for name, operand in (("queries", call.query), ("keys", call.key), ("values", call.value)):
        _check_numbers(model, f"the {name} of layer {call.layer}", operand)


def _check_numbers(model: PreTrainedModel, what: str, numbers: Tensor) -> None:
    """Raises `CompileError` if a number is not finite. If a weight is the cause, the message names it."""
    if bool(torch.isfinite(numbers).all()):
        return
    for name, value in model.state_dict().items():
        check_finite(name, value)
    dtype = str(model.dtype).removeprefix("torch.")
    raise CompileError(
        f"on the calibration text {what} are not finite in {dtype}, though all weights are, so numbers overflow inside "
        f"the model; try --dtype float32, or fetch the checkpoint again"
    )
