"""Decoding by a captured CUDA graph: the model's whole step for one token of every sequence, replayed.

The device counts tokens by itself, in `Cache.state`, and the kernels decide from it which blocks leave the window. The
host needs to know only when a layer must be lowered next; until then it neither counts tokens nor reads the device's
counts. The bits of codes are constants of the kernels, so a lowered layer needs a new graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from threading import Lock
from weakref import WeakSet

import torch
from torch import Tensor

from .backend import lower_until_fit
from .cache import Cache
from .forward import Forward, current
from .manifest import brief
from .records import state_row

_CAPTURING = Lock()
"""Threads capture one after another, as torch demands it of a process."""
_ABANDONED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture could not be ended. Torch keeps pointers to them."""
_WITHOUT_GRAPH: WeakSet[Forward] = WeakSet()
"""Models whose step was found to be one that no graph can hold."""

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""From a step to a function that repeats it on the device and returns the same tensor each time."""


class NotCapturable(Exception):
    """A CUDA graph cannot hold a step; the message says why. The step itself works."""


def capture_cuda_graph(step: Step) -> Step:
    """Run `step` once, which compiles its kernels, then capture it. It works on the current device.

    Raises `NotCapturable` where that is impossible, for example because the host reads numbers of the device. Stream,
    memory and random numbers are as before then.
    """
    step()
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    failed: list[BaseException] = []
    with _CAPTURING:
        try:
            side = _side_stream(torch.cuda.current_device())
            with torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                try:
                    result = step()
                except BaseException as error:
                    failed.append(error)  # the end of such a capture may be an error of its own
                    raise
        except BaseException as error:
            torch.cuda.set_stream(stream)  # if a capture cannot be ended, torch leaves the stream that it used
            _abandon(graph, pool)
            first = failed.pop() if failed else error
            if isinstance(first, torch.OutOfMemoryError) or not isinstance(first, Exception):
                raise first from None
            raise NotCapturable(brief((str(first).strip() or type(first).__name__).splitlines()[0])) from None

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@lru_cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream on which a device's work is captured. By default torch has a single one, of the device that this
    process captured on first."""
    return torch.cuda.Stream(device)


def _abandon(graph: torch.cuda.CUDAGraph, pool: tuple[int, int]) -> None:
    """Undo what is left of a capture that failed. The captured work has not run.

    Torch cannot end a capture that the device has called invalid. The allocator then waits for its end, without which
    it frees nothing, and so does the default generator of random numbers, until another capture ends.
    """
    device = torch.cuda.current_device()
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # the capture did end
    torch._C._cuda_releasePool(device, pool)
    _ABANDONED.append(graph)
    number = torch.zeros(1, device=device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_side_stream(device), capture_error_mode="thread_local"):
        number.zero_()


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
    hidden = model.hidden_states(tokens.unsqueeze(-1), length.long().unsqueeze(-1), cache, model.ops.for_graphs())
    logits = model.logits(hidden[:, -1])
    if not captured:
        cache.end_change()
    return logits


def _go_without(model: Forward, reason: str) -> None:
    """Capture no more steps of this model, and warn that none is."""
    if model in _WITHOUT_GRAPH:
        return
    _WITHOUT_GRAPH.add(model)
    warnings.warn(
        f"no CUDA graph can hold this model's decode step ({reason}), so the host launches every operation of every "
        f"token, which can make decoding several times slower; the tokens are the same",
        RuntimeWarning,
        stacklevel=2,
    )


def call(model: Forward, cache: Cache, tokens: Tensor, running: Tensor) -> Tensor:
    """A decode step without a graph: logits [B, vocab_size] after `tokens` [B] of the sequences that are `running`."""
    return model(tokens.unsqueeze(-1), cache, attention_mask=running.unsqueeze(-1))[:, -1]


class GraphDecoder:
    """Feeds a model one token of every sequence at a time, by a graph that is captured again when a layer is lowered.

    Where no graph can hold the model's step, it calls the model for every token. A warning says so once.
    """

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
        if self.model not in _WITHOUT_GRAPH and (cache.change is not None or not cache.ahead or not self.steps):
            with current(self.model.device):
                self._prepare(running.int().tolist())
        graph = cache.graph
        if self.model in _WITHOUT_GRAPH or not isinstance(graph, DecodeGraph):
            return call(self.model, cache, tokens, running)
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
            try:
                cache.graph = DecodeGraph(self.model, cache, self.capture)
            except NotCapturable as reason:
                _go_without(self.model, str(reason))
        cache.end()
        self.steps = cache.steps_until_lowering(counts)
