"""Tries whole plans on the calibration texts and takes the best one.

The integer program adds up what the formats of each layer cost alone. This sum ignores how the noise of one layer
affects the next, and it misses mistakes that are too rare to show up in one layer. K grouped by token suffers most from
both. So `propose` makes several plans for a budget. Here they run with all layers quantized at once, and we take the
plan that changes the fewest tokens.

By Pinsker's inequality, the root of half the divergence bounds the probability that a token is drawn differently, so
plans are compared by the mean of that root. The mean of the divergence itself would depend on a handful of tokens, and
on whether a text happens to have them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmkvq_compiler.calibrate.attention_hook import AttentionCall, Seen
from pmkvq_compiler.calibrate.caches import Caches
from pmkvq_compiler.calibrate.calibration import Calibration
from pmkvq_compiler.calibrate.logits import Logits
from pmkvq_compiler.calibrate.opened import opened
from pmkvq_compiler.calibrate.output_loss import MAGNIFIED, text_window
from pmkvq_compiler.calibrate.streamed_model import StreamedModel, module_of
from pmkvq_compiler.calibrate.streamed_walk import observed_together
from pmkvq_compiler.calibrate.texts import read_samples
from pmkvq_compiler.divergence import divergences
from pmkvq_compiler.plan.propose import propose
from pmkvq_compiler.plan.solution import Folds, Solution
from pmkvq_compiler.plan.teacher_forcing import progressive
from pmkvq_compiler.problem import Problem
from pmkvq_compiler.progress import Progress
from pmkvq_compiler.runtime.plan import CachePlan, blocks_needed, fitted, sequence_bytes
from pmkvq_compiler.source.source import Source


@dataclass(frozen=True)
class Tried:
    """A plan and its predicted loss in nats a token.

    The loss is the divergence of the next token's distribution when every error is `MAGNIFIED` times as large, divided
    by the square of that factor.
    """

    solution: Solution
    loss: float


def best_plans(
    source: Source, problems: Sequence[Problem], calibration: Calibration, progress: Progress
) -> list[Tried]:
    """For each of `problems`, which differ only in the budget, the proposal that does best on the calibration texts.

    Raises the same errors as `solve`. If nothing is quantized, the model does not run.
    """
    proposals = [propose(problem, calibration) for problem in problems]
    if not any(_quantizes(solution.plan) for solution in itertools.chain(*proposals)):
        return [Tried(proposed[0], 0.0) for proposed in proposals]
    model = opened(source, problems[0])
    seen = Caches.of(module_of(model), problems[0]).seen
    return try_plans(model, read_samples(source, problems[0]), proposals, calibration, progress, seen)


def _quantizes(plan: CachePlan) -> bool:
    """Whether sequences of the plan can get long enough for a block to be quantized."""
    return any(blocks_needed(layer, plan.max_len) for layer in plan.layers)


@torch.no_grad()
def try_plans(
    model: PreTrainedModel | StreamedModel,
    samples: Sequence[Tensor],
    proposals: Sequence[Sequence[Solution]],
    calibration: Calibration,
    progress: Progress,
    seen: Callable[[AttentionCall], Seen] | None = None,
) -> list[Tried]:
    """The best of each list of proposals over `samples`, int64 [S] each; `model` must be loaded with `ATTENTION`.
    `seen` is that of `observed`.

    After each text only the better half of a list goes on to the next one: a single text tells most plans apart. When
    each list has one plan left, it runs on all remaining texts together.
    """
    racing = [list(proposed) for proposed in proposals]
    losses = dict.fromkeys(itertools.chain(*racing), 0.0)
    changes, done = losses.copy(), 0
    progress("Trying plans", done, len(samples))
    while done < len(samples):
        decided = all(len(field) == 1 for field in racing)
        some = samples[done:] if decided else samples[done : done + 1]
        solutions = list(dict.fromkeys(itertools.chain(*racing)))
        folds = [Folds.of(solution, calibration) for solution in solutions]
        for expected, *found in _second_halves(model, some, solutions, folds, seen):
            for solution, logits in zip(solutions, found, strict=True):
                moved = torch.cat(
                    [divergences(logits[part], expected[part], torch.float32) for part in expected.parts()]
                )
                losses[solution] += moved.mean().item() / MAGNIFIED**2 / len(samples)
                changes[solution] += moved.sqrt().mean().item()
            done += 1
            progress("Trying plans", done, len(samples))
        racing = [sorted(field, key=changes.__getitem__)[: (len(field) + 1) // 2] for field in racing]
    return [Tried(field[0], losses[field[0]]) for field in racing]


def _second_halves(
    model: PreTrainedModel | StreamedModel,
    samples: Sequence[Tensor],
    solutions: Sequence[Solution],
    folds: Sequence[Folds],
    seen: Callable[[AttentionCall], Seen] | None,
) -> Iterator[list[Logits]]:
    """Logits of each text's second half, whose tokens have old tokens to attend to: exact ones, and for each plan.

    Attention is computed in float32.
    """
    texts = []
    for sample in samples:
        plans = [_at_final_widths(solution.plan, len(sample)) for solution in solutions]
        attends = [progressive(plan, fold, [1], MAGNIFIED) for plan, fold in zip(plans, folds, strict=True)]
        observers = [partial(_attend_in_float32, attend) for attend in (AttentionCall.output, *attends)]
        texts.append((sample.unsqueeze(0), observers))
    for (ids, _), found in zip(texts, observed_together(model, texts, seen), strict=True):
        second = ids.shape[1] - ids.shape[1] // 2
        yield [logits.last(second) for logits in found]


def _attend_in_float32(attend: Callable[[AttentionCall], Tensor], call: AttentionCall) -> Tensor:
    return attend(call.detached()).to(call.query.dtype)


def _at_final_widths(plan: CachePlan, length: int) -> CachePlan:
    """The plan for a text of `length` tokens, with all blocks at their final widths from the start."""
    layers = []
    for layer in plan.layers:
        if not blocks_needed(layer, plan.max_len):
            layers.append(replace(layer, stages=()))
            continue
        window = max(layer.block, text_window(layer.window, length))
        short = fitted(replace(layer, stages=layer.stages[-1:], window=window), length)
        layers.append(replace(short, arena_bytes=sequence_bytes(short, length, torch.float32.itemsize)))
    return replace(plan, layers=tuple(layers), max_len=length, batch_size=1, dtype="float32")
