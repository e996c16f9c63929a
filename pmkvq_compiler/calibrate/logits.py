"""Logits of a text in slices of its positions.

Vocabularies are large: all logits of a text of 4,096 tokens take 4 GiB if there are 262,144 of them, and as much again
for every step of a softmax and its gradient. So only the last hidden states of a text are kept, and the logits of a few
positions at a time are computed from them, by the model's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import run

LOGITS_AT_ONCE = 1 << 24
"""How many logits are computed at a time, unless those of a single position are more: 64 MiB in float32."""


@dataclass(frozen=True)
class Logits:
    """The logits of a text, computed when they are asked for.

    `output` is what the body of the model returned for `input_ids` [1, S] at `position_ids` [1, S], and `hidden`
    [1, S, hidden_size] are the last hidden states in it, or other tensors with the same numbers.
    """

    model: PreTrainedModel
    output: Any
    hidden: Tensor
    input_ids: Tensor
    position_ids: Tensor

    def __len__(self) -> int:
        return self.hidden.shape[1]

    def __getitem__(self, part: slice) -> Tensor:
        """The logits (float32 [positions, V]) of some positions."""
        output = copy.copy(self.output)
        output["last_hidden_state"] = self.hidden[:, part]
        with _returning(_body(self.model), output):
            return run(self.model, self.input_ids[:, part], self.position_ids[:, part])[0].float()

    def last(self, count: int) -> Logits:
        """The logits of the last `count` positions."""
        first = len(self) - count
        hidden, input_ids, position_ids = (
            tensor[:, first:] for tensor in (self.hidden, self.input_ids, self.position_ids)
        )
        return replace(self, hidden=hidden, input_ids=input_ids, position_ids=position_ids)

    def of_text(self, index: int) -> Logits:
        """The logits of one text of a batch."""
        hidden, input_ids = self.hidden[index : index + 1], self.input_ids[index : index + 1]
        return replace(self, hidden=hidden, input_ids=input_ids)

    def parts(self) -> Iterator[slice]:
        """All positions, a few at a time."""
        step = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        for start in range(0, len(self), step):
            yield slice(start, min(start + step, len(self)))


def logits_of(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Logits:
    """Run the body of a model on texts (int64 [B, S]) at the given positions (int64 [1, S])."""
    outputs: list[Any] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        outputs.append(output)

    hook = _body(model).register_forward_hook(keep)
    try:
        run(model, input_ids, position_ids, last=1)
    finally:
        hook.remove()
    (output,) = outputs
    return Logits(model, output, output.last_hidden_state, input_ids, position_ids)


def _body(model: PreTrainedModel) -> nn.Module:
    """The part of a model that makes hidden states: the one that embeds tokens, where the model's class names none."""
    if model.base_model is not model:
        return model.base_model
    embedding = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embedding for module in part.modules()))


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Within, a call of `module` computes nothing and returns `output`."""
    before = vars(module).get("forward")
    module.forward = lambda *arguments, **named: output  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
