"""Decoding by a captured CUDA graph: the model's whole step for one token of every sequence, replayed.

The device counts tokens by itself, in `Cache.state`, and the kernels decide from it which blocks leave the window. The
host needs to know only when a layer must be lowered next; until then it neither counts tokens nor reads the device's
counts. The bits of codes are constants of the kernels, so a lowered layer needs a new graph.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch
from torch import Tensor

from .backend import lower_until_fit
from .cache import Cache
from .errors import InputError
from .forward import Forward
from .records import state_row

_CAPTURING = Lock()
"""Threads capture one after another: torch has one stream for it."""

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""From a step to a function that repeats it on the device and returns the same tensor each time."""


def capture_cuda_graph(step: Step) -> Step:
    """Run `step` once, which compiles its kernels, then capture it. Raises `InputError` where it cannot be captured."""
    step()
    graph = torch.cuda.CUDAGraph()
    try:
        with _CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise InputError(
            f"this model's decode step cannot be captured in a CUDA graph ({str(error).splitlines()[0]}); load it with "
            f'backend="reference", which needs no graph'
        ) from error

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class DecodeGraph:
    """A decode step of a model on a cache, captured for the bits that the cache has. It keeps no reference to the
    cache.

    `replay` reads the buffers `tokens` [B] (int64) and `counts` [B] (int32; 0 for a sequence that has ended) and
    returns logits [B, vocab_size], which the next replay overwrites.
    """

    def __init__(self, model: Forward, cache: Cache, capture: Capture) -> None:
        self.model = model
        self.bits = cache.bits
        self.tokens = torch.zeros(cache.batch_size, dtype=torch.int64, device=model.device)
        self.counts = torch.zeros(cache.batch_size, dtype=torch.int32, device=model.device)
        tokens, counts = self.tokens, self.counts
        self.replay = capture(lambda: _step(model, cache, tokens, counts))

    def serves(self, model: Forward, cache: Cache) -> bool:
        return self.model is model and self.bits == cache.bits


def _step(model: Forward, cache: Cache, tokens: Tensor, counts: Tensor) -> Tensor:
    """Count the tokens of the last step, announce those of this one, and run the model: all of it on the device.

    A replay is a single launch, which happens as a whole or not at all. Where Python executes the step instead, it is a
    change of the cache like any call.
    """
    assert cache.state is not None
    captured = cache.change is not None
    if not captured:
        cache.note_change()
    length, new, reached = (cache.state[state_row(name)] for name in ("length", "count", "reached"))
    length += new
    torch.maximum(reached, length, out=reached)
    new.copy_(counts)
    hidden = model.hidden_states(tokens.unsqueeze(-1), length.long().unsqueeze(-1), cache, model.ops)
    logits = model.logits(hidden[:, -1])
    if not captured:
        cache.end_change()
    return logits


class GraphDecoder:
    """Feeds a model one token of every sequence at a time, by a graph that is captured again when a layer is
    lowered."""

    def __init__(self, model: Forward, cache: Cache, capture: Capture = capture_cuda_graph) -> None:
        self.model = model
        self.cache = cache
        self.capture = capture
        self.steps = 0
        """Steps until a layer must be lowered."""

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, running: Tensor) -> Tensor:
        """Logits [B, vocab_size] after `tokens` [B], which are added to the sequences that are `running` [B] (bool).

        The next call overwrites the logits. A sequence that has stopped must not run again. Raises `CacheFull` where
        the tokens do not fit, before anything is changed.
        """
        cache = self.cache
        if cache.change is not None or not cache.ahead or not self.steps:
            self._prepare(running.int().tolist())
        graph = cache.graph
        assert isinstance(graph, DecodeGraph)
        graph.tokens.copy_(tokens)
        graph.counts.copy_(running)
        cache.ahead = True
        self.steps -= 1
        return graph.replay()

    def _prepare(self, counts: list[int]) -> None:
        """Copy the cache's counts to the device, lower the layers in which the next tokens do not fit, and capture a
        graph unless the last one still serves."""
        cache = self.cache
        cache.check_room(counts)
        cache.begin([slice(0, 0)] * cache.batch_size)  # no tokens: the device counts them
        for attention, store in zip(cache.attention, cache.layers, strict=True):
            lower_until_fit(attention, store, cache.state, counts)
        if not isinstance(cache.graph, DecodeGraph) or not cache.graph.serves(self.model, cache):
            cache.graph = None  # frees its memory for the next one
            cache.graph = DecodeGraph(self.model, cache, self.capture)
        cache.end()
        self.steps = cache.steps_until_lowering(counts)
