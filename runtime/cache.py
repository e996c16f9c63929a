"""The cache of a model: a `LayerCache` for each layer, and what concerns all of them: lengths, claims and changes.

One thread at a time uses a cache. A change that breaks off is undone; where that is impossible, the cache says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .backend import Attention, NewTokens
from .claims import Claims, Use, claims
from .errors import CacheFull, InputError
from .inputs import whole_number, whole_numbers
from .layer_cache import Counts, LayerCache
from .plan import CachePlan, longest
from .records import STATE, state_row, state_rows
from .reference import REFERENCE
from .states import StateStore


@dataclass(frozen=True)
class Change:
    """The counts of a cache when a change began, such as a call or a reorder, which has not ended yet.

    The change has broken off if its `use` is over. If it has overwritten nothing, the cache returns to these counts.
    """

    use: Use | None
    length: list[int]
    ahead: bool
    layers: list[Counts]

    @property
    def goes_on(self) -> bool:
        return self.use is not None and self.use.goes_on


class Cache:
    """The cache of a model: a `LayerCache` for each layer with attention, the recurrent states beside them, and the
    length of every sequence.

    One thread uses it at a time; a second one gets an `InputError` instead of waiting. A call that breaks off leaves
    the cache as it was. If the call had already overwritten something, the cache refuses everything but `reset`.
    Copies made by `copy`, `deepcopy` and `pickle` have their own memory.

    Raises `InputError` where `batch_size` sequences of `max_len` tokens do not fit the plan's bytes.
    """

    def __init__(
        self,
        plan: CachePlan,
        batch_size: int,
        max_len: int | None,
        dtype: torch.dtype,
        device: torch.device,
        attention: Sequence[Attention] | None = None,
    ) -> None:
        batch_size = whole_number("batch_size", batch_size)
        max_len = None if max_len is None else whole_number("max_len", max_len)
        largest = longest(plan, batch_size, dtype.itemsize)
        if batch_size < 1 or largest < 1:
            raise InputError(
                f"batch_size {batch_size} does not fit: the plan's {plan.arena_bytes:,} bytes are for "
                f"{plan.batch_size} sequence(s) of {plan.max_len:,} tokens; "
                f"compile with a larger --budget or --batch-size"
            )
        tokens = largest if max_len is None else max_len
        if not 1 <= tokens <= largest:
            raise InputError(
                f"max_len {max_len} is not between 1 and {largest:,}, the tokens that {batch_size} sequence(s) may "
                f"have within this artifact's budget; compile with a larger --max-len or --budget"
            )
        layers = [LayerCache(layer, batch_size, tokens, dtype, device) for layer in plan.layers]
        states = StateStore(plan.states, batch_size, dtype, device)
        self._hold(plan, tokens, layers, states, [0] * batch_size, attention)

    def _hold(
        self,
        plan: CachePlan,
        max_len: int,
        layers: list[LayerCache],
        states: StateStore,
        length: list[int],
        attention: Sequence[Attention] | None = None,
    ) -> None:
        """Set every attribute, for layers that may hold tokens already."""
        self.plan, self.places = plan, plan.places
        self.max_len, self.batch_size = max_len, len(length)
        self.layers = layers
        self.states = states
        self._length = length
        self.new_tokens = NewTokens([], None)
        """The tokens of the current call."""
        self.waiting: dict[int, tuple[Tensor, Tensor]] = {}
        """K and V of this call's tokens where layers share a cache: added at its end, so that all see the same."""
        self.ahead = False
        """Whether steps ran whose tokens are counted in `state` alone; `settle` counts them here, too."""
        self.graph: object = None
        """The decode step that a model captured last for this cache; `attend_by` drops it."""
        self.change: Change | None = None
        """The change that is under way, or broke off."""
        self.claims = Claims()
        """Who uses the cache."""
        self.attention: Sequence[Attention] = []
        """The backend of each layer."""
        self.state: Tensor | None = None
        """Counts of every sequence [len(STATE), B] (int32) for `replayable` attention; `records.STATE` names the rows.
        None where no layer's attention reads it."""
        self.attend_by([REFERENCE] * len(layers) if attention is None else attention)

    @claims()
    def attend_by(self, attention: Sequence[Attention]) -> None:
        """Set the backends, one for each layer. Raises `InputError` in the middle of a call."""
        self._ready()
        state = None
        if any(one.replayable for one in attention):
            state = torch.zeros(len(STATE), self.batch_size, dtype=torch.int32, device=self.device)
        self.attention, self.state, self.graph = attention, state, None  # one line, so that no interrupt divides it

    @property
    def replayable(self) -> bool:
        """Whether the attention of all layers reads its counts on the device, so that a graph can be replayed."""
        return all(one.replayable for one in self.attention)

    @property
    def device(self) -> torch.device:
        return self.layers[0].arena.device

    @property
    def parts(self) -> list[LayerCache | StateStore]:
        """What owns memory: the layers, and the states beside them."""
        return [*self.layers, self.states]

    @property
    def length(self) -> list[int]:
        """How many tokens each sequence has had."""
        self.settle()
        return self._length

    @length.setter
    def length(self, tokens: list[int]) -> None:
        self._length = tokens

    # ---- changes, and what becomes of those that break off ----

    def begin_change(self) -> None:
        """Note the counts to return to. Raises `InputError` if an earlier change broke off and cannot be undone."""
        self._ready()
        self.note_change()

    def note_change(self) -> None:
        """`begin_change` where no change broke off. It does not settle what only the device has counted."""
        self.waiting = {}
        for part in self.parts:
            part.overwritten = False
        counts = [layer.counts for layer in self.layers]
        self.change = Change(self.claims.current(), self._length, self.ahead, counts)

    def end_change(self) -> None:
        """Complete the change: from here on nothing undoes it."""
        self.change, self.waiting = None, {}

    def _ready(self) -> None:
        """Undo a change that broke off. Raises `InputError` where it cannot be undone, or is still under way."""
        change = self.change
        if change is None:
            self.settle()
            return
        if change.goes_on:
            raise InputError("this cache is in the middle of a call; use it again when that has ended")
        change = self.change = replace(change, use=None)  # its frame would keep the call's tensors alive
        if change.ahead or any(part.overwritten for part in self.parts):
            raise InputError(
                "this cache was interrupted in the middle of a call and holds half of it; reset() it or make a new one"
            )
        for layer, counts in zip(self.layers, change.layers, strict=True):
            layer.go_back(counts)
        self._length = change.length
        self.ahead = False
        self.change = None

    @claims(to_read=True)
    def settle(self) -> None:
        """Count the tokens of steps that ran on the device alone, as if each had been a call.

        The cache does this by itself wherever it matters. Read `rows` and `flushed` of its layers only after it.
        """
        if not self.ahead or self.change is not None:
            return
        assert self.state is not None
        lengths = (self.state[state_row("length")] + self.state[state_row("count")]).tolist()
        for layer in self.layers:
            layer.grow_to(lengths)
        self._length = lengths
        self.ahead = False

    @property
    def bits(self) -> list[tuple[int, int]]:
        """The present bits of K and V in every layer."""
        return [layer.bits for layer in self.layers]

    @property
    def bytes_reserved(self) -> int:
        """Bytes of the tensors for keys and values: constant from the cache's first token to its last."""
        return sum(layer.arena.nbytes for layer in self.layers)

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states, which are fixed in size and not part of the budget."""
        return self.states.nbytes

    @property
    def bytes_used(self) -> int:
        """Bytes of `bytes_reserved` that hold tokens now."""
        self.settle()
        return sum(layer.bytes_used for layer in self.layers)

    def check_room(self, counts: Sequence[int]) -> None:
        """Raises `CacheFull` where so many more tokens of each sequence do not fit."""
        for sequence, (length, new) in enumerate(zip(self.length, counts, strict=True)):
            if length + new > self.max_len:
                raise CacheFull(
                    f"sequence {sequence} has {length:,} of {self.max_len:,} tokens and {new:,} more do not fit; "
                    f"make a cache with a larger max_len or compile with a larger --max-len"
                )

    def begin(self, columns: list[slice]) -> None:
        """Announce a call's tokens. Raises `CacheFull` where they do not fit, before anything is changed."""
        self._ready()
        new = NewTokens(columns, self.state)
        self.check_room(new.counts)
        self.begin_change()
        self.new_tokens = new
        if self.state is not None:
            starts, counts = [own.start for own in columns], new.counts
            reached = [max(length, *(one.reached(b) for one in self.layers)) for b, length in enumerate(self._length)]
            rows = state_rows({"length": self._length, "start": starts, "count": counts, "reached": reached})
            # from pinned memory, so that the host need not wait until the device has done all before it
            told = torch.tensor(rows, dtype=torch.int32, pin_memory=self.state.is_cuda)
            self.state.copy_(told, non_blocking=True)

    def steps_until_lowering(self, counts: Sequence[int]) -> int:
        """How many steps of `counts` tokens (0 or 1 for each sequence) fit before a layer must be lowered or the cache
        is full."""
        limits = [limit for layer in self.layers if (limit := layer.longest_at_stage) is not None]
        longest = max((length for length, count in zip(self.length, counts, strict=True) if count), default=0)
        return min([self.max_len, *limits]) - longest

    def end(self) -> None:
        """Count the tokens of the call that `begin` announced."""
        if self.change is None:
            raise InputError("this cache was changed in the middle of a call, whose tokens are lost; reset() it")
        for place, (keys, values) in self.waiting.items():
            self.attention[place].append(keys, values, self.layers[place], self.new_tokens)
        self._length = [length + count for length, count in zip(self._length, self.new_tokens.counts, strict=True)]
        self.end_change()

    @claims()
    def reset(self) -> None:
        """Forget all tokens and start again at the widest codes, in the same memory."""
        if self.change is None:
            self.note_change()
        elif self.change.goes_on:
            self._ready()  # raises
        for part in self.parts:
            part.reset()
        self._length = [0] * self.batch_size
        self.ahead = False
        self.end_change()

    @claims()
    @torch.inference_mode()
    def reorder(self, sequences: Sequence[int]) -> None:
        """Let every sequence i hold what sequence `sequences[i]` held, as beam search needs.

        Packed codes are copied as they are, one layer at a time. Raises `InputError`, and changes nothing, where
        `sequences` does not name one of the cache's sequences for each of them.
        """
        order = self._checked(sequences)
        if len(order) != self.batch_size:
            raise InputError(
                f"{len(order)} sequences cannot take the places of {self.batch_size}; "
                f"for another number of them make a new cache with select"
            )
        self.begin_change()
        for part in self.parts:
            part.reorder(order)
        self._length = [self._length[sequence] for sequence in order]
        self.end_change()

    @claims(to_read=True)
    def select(self, sequences: Sequence[int]) -> Cache:
        """A new cache of these sequences, in any number and order, within the same budget.

        More sequences have less room each, so that layers may be lowered; this cache stays as it is. Raises
        `InputError` where so many sequences of `max_len` tokens do not fit the budget.
        """
        order = self._checked(sequences)
        self._ready()
        chosen = Cache(self.plan, len(order), self.max_len, self.layers[0].keys.dtype, self.device, self.attention)
        for layer, source in zip(chosen.layers, self.layers, strict=True):
            layer.take(source, order)
        chosen.states.take(self.states, order)
        chosen.length = [self._length[sequence] for sequence in order]
        return chosen

    @claims()
    def crop(self, count: int) -> None:
        """Take back the last `count` tokens of every sequence.

        Only tokens that are not quantized yet can be taken back; earlier ones that they pushed out of the window stay
        quantized. Raises `InputError` for a larger `count`; nothing is changed then.
        """
        count = whole_number("count", count)
        self._ready()
        if count and self.plan.states:
            raise InputError(
                f"{count:,} tokens cannot be taken back from this cache: its model has layers with a recurrent state, "
                f"which is of all tokens at once; feed the tokens that you keep to a new cache"
            )
        limit = min(layer.croppable(sequence) for layer in self.layers for sequence in range(self.batch_size))
        if not 0 <= count <= limit:
            raise InputError(
                f"{count:,} tokens cannot be taken back from this cache: its last {limit:,} are not quantized yet; "
                f"feed the tokens that you keep to a new cache"
            )
        self.begin_change()
        for layer in self.layers:
            layer.crop(count)
        self._length = [length - count for length in self._length]
        self.end_change()

    # ---- copies: the plan, the arenas' bytes and the counts, in memory of their own ----

    @claims(to_read=True)
    def to(self, device: str | torch.device) -> Cache:
        """A copy on another device, for a model there; this cache itself if it is on that device already.

        Raises `InputError` where `device` is not a device. A dtype is refused as well, because a cache keeps its own.
        """
        try:
            place = torch.empty(0, device=device).device
        except (AssertionError, RuntimeError, TypeError) as error:
            raise InputError(
                f"a cache cannot be moved to {device!r} ({str(error).splitlines()[0]}); name a device that PyTorch has"
            ) from error
        return self if place == self.device else self._copy_on(place)

    def cpu(self) -> Cache:
        """`to("cpu")`."""
        return self.to("cpu")

    def cuda(self) -> Cache:
        """`to("cuda")`."""
        return self.to("cuda")

    def share_memory_(self) -> None:
        """Raises `InputError`: processes could share a cache's memory, but not what it counts."""
        raise InputError(
            "a cache cannot be shared between processes; send it to one process, which pickles it, and go on there"
        )

    @claims(to_read=True)
    def __copy__(self) -> Cache:
        return self._copy_on(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return self.__copy__()

    def _copy_on(self, device: torch.device) -> Cache:
        self._ready()
        twin = Cache.__new__(Cache)
        layers = [layer.copy_on(device) for layer in self.layers]
        attention = self.attention if device == self.device else None
        twin._hold(self.plan, self.max_len, layers, self.states.copy_on(device), list(self._length), attention)
        return twin

    @claims(to_read=True)
    def __getstate__(self) -> dict[str, Any]:
        """Without the backends: the model that uses the copy sets its own."""
        self._ready()
        names = ("plan", "max_len", "layers", "states")
        return {**{name: getattr(self, name) for name in names}, "length": self._length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        states = state["states"].copy_on(state["layers"][0].arena.device)
        self._hold(**{**state, "states": states})

    def _checked(self, sequences: Sequence[int]) -> list[int]:
        """`sequences` as a list of ints that are all among the cache's."""
        listed = whole_numbers("sequences", sequences)
        if not listed or not all(0 <= sequence < self.batch_size for sequence in listed):
            raise InputError(f"sequences {listed} are not all among the cache's 0 to {self.batch_size - 1}")
        return listed
