"""Runs a streamed model on all texts, layer by layer, and measures as `walk` does.

A pass reads every layer once, for all texts. The hidden states between the layers are kept in a folder, because the
backward pass computes each layer again from them: gradients go from the last layer to the first, and autograd only ever
sees one layer. Every layer that is done leaves a file, so an interrupted calibration goes on where it was.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, Seen, observed
from pmkvq_compiler.calibrate.logits import Logits, logits_of
from pmkvq_compiler.calibrate.streamed_model import StreamedModel, Text, module_of
from pmkvq_compiler.calibrate.walk import Objective, check_operands, gradient_at, gradient_of, walk_texts
from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.progress import Progress


@runtime_checkable
class Observer(Protocol):
    """An observer whose measurements of a layer are complete when all texts have passed this layer."""

    def __call__(self, call: AttentionCall) -> Tensor | None: ...

    def measured(self, layer: int) -> dict[str, Tensor]:
        """The measurements of a layer."""

    def restore(self, layer: int, tensors: dict[str, Tensor]) -> None:
        """The inverse of `measured`."""


@dataclass(frozen=True)
class Notes:
    """A folder of files that say what is already done. A file appears as a whole or not at all."""

    folder: Path

    def __contains__(self, name: str) -> bool:
        return self._path(name).is_file()

    def read(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self._path(name))
        except (OSError, SafetensorError) as error:
            raise CompileError(
                f"{self._path(name)} is damaged ({first_line(error)}); remove its folder to calibrate anew"
            ) from error

    def write(self, name: str, tensors: dict[str, Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        unfinished = self._path(f"{name}.{os.getpid()}")
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, unfinished)
        os.replace(unfinished, self._path(name))

    def remove(self, name: str) -> None:
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def walk_model(
    model: PreTrainedModel | StreamedModel,
    notes: Path,
    samples: Sequence[Tensor],
    progress: Progress,
    step: str,
    observe: Callable[[AttentionCall], Tensor | None] | Observer,
    stretch: Fraction = Fraction(1),
    objective: Objective | None = None,
    seen: Callable[[AttentionCall], Seen] | None = None,
) -> None:
    """`walk_texts`, with a backward pass layer by layer if the model's layers are read when they are needed."""
    if isinstance(model, StreamedModel) and objective is not None:
        assert stretch == 1
        assert isinstance(observe, Observer)
        walk_streamed(model, Notes(notes), samples, progress, step, observe, objective)
    else:
        walk_texts(module_of(model), samples, progress, step, observe, stretch, objective, seen)


def walk_streamed(
    streamed: StreamedModel,
    notes: Notes,
    samples: Sequence[Tensor],
    progress: Progress,
    step: str,
    observe: Observer,
    objective: Objective,
) -> None:
    """The same as `walk_texts` with an objective, layer by layer. What is already noted is not done again."""
    positions = [torch.arange(len(sample)).unsqueeze(0) for sample in samples]
    texts = [streamed.begin(sample.unsqueeze(0), each) for sample, each in zip(samples, positions, strict=True)]
    _note_hidden_states(streamed, notes, texts, partial(progress, step))
    count, name, head = len(streamed.layers), step.lower().replace(" ", "-"), objective.__name__
    number = count
    while number > 0 and f"{name}-{number - 1}" in notes:
        number -= 1
        observe.restore(number, notes.read(f"{name}-{number}"))
    if number == count and head not in notes:  # every measure begins with the same gradients
        notes.write(head, _numbered(_head_gradients(streamed, notes, texts, objective)))
    gradients = _tensors(streamed, notes, head if number == count else f"{name}-{number}-gradients") if number else []

    def checked(call: AttentionCall) -> Tensor | None:
        check_operands(streamed.model, call)
        return observe(call)

    while number > 0:
        number -= 1
        progress(step, 2 * count - number - 1, 2 * count)
        hidden = _tensors(streamed, notes, f"hidden-{number}")
        with streamed.reading(number), observed(checked):
            gradients = [_through(streamed, number, *each) for each in zip(texts, hidden, gradients, strict=True)]
        if number > 0:
            notes.write(f"{name}-{number}-gradients", _numbered(gradients))
        notes.write(f"{name}-{number}", observe.measured(number))
        notes.remove(f"{name}-{number + 1}-gradients")
    progress(step, 2 * count, 2 * count)


@torch.no_grad()
def _note_hidden_states(
    streamed: StreamedModel, notes: Notes, texts: Sequence[Text], progress: Callable[[int, int], None]
) -> None:
    """Note the hidden states of all texts before each layer, and after the last."""
    count = len(streamed.layers)
    done = next((number for number in range(count + 1) if f"hidden-{number}" not in notes), count + 1)
    if done == 0:
        notes.write("hidden-0", _numbered([text.hidden for text in texts]))
    for number in range(max(done - 1, 0), count):
        progress(number, 2 * count)
        hidden = _tensors(streamed, notes, f"hidden-{number}")
        with streamed.reading(number), observed(partial(check_operands, streamed.model)):
            after = [streamed.run(number, text, each) for text, each in zip(texts, hidden, strict=True)]
        notes.write(f"hidden-{number + 1}", _numbered(after))


def _head_gradients(streamed: StreamedModel, notes: Notes, texts: Sequence[Text], objective: Objective) -> list[Tensor]:
    """The gradients of the objective with respect to the hidden states after the last layer."""
    found = []
    states = _tensors(streamed, notes, f"hidden-{len(streamed.layers)}")
    for text, hidden in zip(texts, states, strict=True):
        hidden.requires_grad_()
        logits = streamed.finish(text, hidden)
        logits.hidden.backward(gradient_of(objective, logits, text.input_ids[0]))
        found.append(gradient_at(hidden))
    return found


def _through(streamed: StreamedModel, number: int, text: Text, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The gradient before a layer from the one after it; the layer is computed again."""
    hidden.requires_grad_()
    streamed.run(number, text, hidden).backward(gradient)
    return gradient_at(hidden)


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """The contents of a note with one tensor for each text."""
    return {str(index): tensor for index, tensor in enumerate(tensors)}


def _tensors(streamed: StreamedModel, notes: Notes, name: str) -> list[Tensor]:
    """The tensors of such a note, on the model's device."""
    found = notes.read(name)
    return [found[str(index)].to(streamed.device) for index in range(len(found))]


Observed = tuple[Tensor, Sequence[Callable[[AttentionCall], Tensor | None]]]
"""A text [1, S], and the observers that the model runs on it with, one after the other."""


@torch.no_grad()
def observed_together(
    model: PreTrainedModel | StreamedModel,
    texts: Sequence[Observed],
    seen: Callable[[AttentionCall], Seen] | None = None,
) -> Iterator[list[Logits]]:
    """For each text, at positions 0 to S - 1, the logits with each of its observers. A layer is read once for all.

    `seen` is that of `observed`; a model that is read layer by layer needs none.
    """
    positions = [torch.arange(input_ids.shape[1]).unsqueeze(0) for input_ids, _ in texts]
    if not isinstance(model, StreamedModel):
        for (input_ids, observers), places in zip(texts, positions, strict=True):
            input_ids, places, found = input_ids.to(model.device), places.to(model.device), []
            for observe in observers:
                with observed(observe, seen):
                    found.append(logits_of(model, input_ids, places))
            yield found
        return
    begun = [model.begin(input_ids, places) for (input_ids, _), places in zip(texts, positions, strict=True)]
    hidden = [[text.hidden] * len(observers) for text, (_, observers) in zip(begun, texts, strict=True)]
    for number in range(len(model.layers)):
        with model.reading(number):
            for text, states, (_, observers) in zip(begun, hidden, texts, strict=True):
                for index, observe in enumerate(observers):
                    with observed(observe):
                        states[index] = model.run(number, text, states[index])
    for text, states in zip(begun, hidden, strict=True):
        yield [model.finish(text, each) for each in states]
