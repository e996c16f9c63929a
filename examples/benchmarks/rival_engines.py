"""The engines that `rivals.py` compares. It runs this file in a process of its own for each, with a Python that has it.

All caches of an engine read the same text at the same time, piece by piece, beside a cache of the same engine in full
precision. So the logits of one piece are all that is ever held, and steps of different caches are timed in turns.

Every engine computes in float32, whatever its cache holds. In 16 bits, a model's own rounding changes whenever anything
does, and would hide what the better caches lose.
"""

from __future__ import annotations

import ctypes
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, QuantizedCache

from pmkvq_compiler.divergence import divergences
from pmkvq_compiler.runtime.cache import Cache
from pmkvq_compiler.runtime.load import load
from pmkvq_compiler.source.source import DTYPES, open_source

LLAMA_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
"""Names of llama.cpp's types of numbers, and what its library calls them."""


@dataclass(frozen=True)
class Row:
    """What one cache made of the first `tokens` of the text. `rival` names a line of the plot, and `cache` a point of
    it. `true_bits` are bits a cached number, perplexity and speed also those of the engine's own full precision.
    `late_divergence` is that of the second half of the tokens. What was not measured is nan."""

    rival: str
    cache: str
    tokens: int
    true_bits: float
    perplexity: float
    full_perplexity: float
    divergence: float
    agreement: float
    late_divergence: float = math.nan
    tokens_per_second: float = math.nan
    full_tokens_per_second: float = math.nan


@dataclass(frozen=True)
class Text:
    """The `tokens` to read, one more than the longest of `lengths`, at which scores are taken. They are read in pieces
    of `chunk` tokens, and the last `decoded` before each length one by one, as if they were generated."""

    tokens: list[int]
    lengths: list[int]
    chunk: int
    decoded: int

    def pieces(self) -> Iterator[slice]:
        start = 0
        for length in sorted(self.lengths):
            while start < length:
                stop = min(start + self.chunk, length - self.decoded) if start < length - self.decoded else start + 1
                yield slice(start, stop)
                start = stop


class Engine(Protocol):
    """A model with a cache."""

    def feed(self, ids: list[int]) -> Tensor:
        """Add tokens to the cache; returns their logits (float32 [tokens, vocab_size])."""

    def cache_bytes(self) -> int:
        """Bytes of the memory that the cache has for the numbers of the tokens so far."""


# ---- the comparison ----


@dataclass
class Scores:
    """Sums over the tokens so far, the divergence of each, and the seconds of the steps since the last length."""

    tokens: int = 0
    nll: float = 0.0
    agreed: int = 0
    divergences: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    def add(self, logits: Tensor, expected: Tensor, labels: Tensor) -> None:
        self.tokens += len(labels)
        self.nll += F.cross_entropy(logits, labels, reduction="sum").item()
        if logits is not expected:
            self.divergences += divergences(logits, expected, torch.float32).tolist()
        self.agreed += int((logits.argmax(-1) == expected.argmax(-1)).sum())

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll / self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return 1 / statistics.median(self.steps) if self.steps else math.nan


def compare(full: Engine, caches: Mapping[tuple[str, str], Engine], text: Text, numbers: int) -> list[Row]:
    """The rows of `caches`, whose keys are rival and cache, compared with the same engine in full precision. A token
    has `numbers` numbers in the cache."""
    engines: dict[Any, Engine] = {None: full, **caches}
    scores = {name: Scores() for name in engines}
    rows: list[Row] = []
    for piece in text.pieces():
        ids = text.tokens[piece]
        labels = torch.tensor(text.tokens[piece.start + 1 : piece.stop + 1])
        expected: Tensor | None = None
        for name, engine in engines.items():
            start = time.perf_counter()
            logits = engine.feed(ids)
            seconds = time.perf_counter() - start
            if len(ids) == 1:
                scores[name].steps.append(seconds)
            expected = logits if expected is None else expected
            scores[name].add(logits, expected, labels)
        if piece.stop in text.lengths:
            rows += [
                _row(name, engine, scores, piece.stop, numbers) for name, engine in engines.items() if name is not None
            ]
            for each in scores.values():
                each.steps.clear()
    return rows


def _row(name: tuple[str, str], engine: Engine, scores: Mapping[Any, Scores], tokens: int, numbers: int) -> Row:
    full, own = scores[None], scores[name]
    return Row(
        rival=name[0],
        cache=name[1],
        tokens=tokens,
        true_bits=8 * engine.cache_bytes() / (tokens * numbers),
        perplexity=own.perplexity,
        full_perplexity=full.perplexity,
        divergence=statistics.fmean(own.divergences),
        agreement=own.agreed / own.tokens,
        late_divergence=statistics.fmean(own.divergences[tokens // 2 :]),
        tokens_per_second=own.tokens_per_second,
        full_tokens_per_second=full.tokens_per_second,
    )


# ---- this project ----


class Artifact:
    """An artifact that pmkvq-compile wrote. Its cache has the dtype that it was compiled for, or that of the
    computation if it is to be `exact`: then one that does not quantize gets as many bytes as that takes."""

    def __init__(self, folder: Path, max_len: int, exact: bool = False) -> None:
        self.model = load(folder, dtype=torch.float32, verify="manifest")
        plan, dtype = self.model.plan, torch.float32 if exact else DTYPES[self.model.plan.dtype]
        more = torch.float32.itemsize // DTYPES[plan.dtype].itemsize if exact else 1
        layers = tuple(replace(layer, arena_bytes=more * layer.arena_bytes) for layer in plan.layers)
        self.cache = Cache(replace(plan, layers=layers), 1, max_len, dtype, self.model.device, self.model.attention)

    def feed(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), self.cache)[0]

    def cache_bytes(self) -> int:
        return self.cache.bytes_reserved


def artifacts(full: str, caches: Mapping[str, str], text: Text, numbers: int) -> list[Row]:
    """`full` is the folder of an artifact that does not quantize; `caches` are folders by their budgets."""
    length = max(text.lengths)
    compared = {("pmkvq-compile", name): Artifact(Path(folder), length) for name, folder in caches.items()}
    return compare(Artifact(Path(full), length, exact=True), compared, text, numbers)


# ---- transformers ----


class Transformers:
    """A model of transformers with one of its caches."""

    def __init__(self, model: PreTrainedModel, cache: DynamicCache | QuantizedCache) -> None:
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True).logits[0]

    def cache_bytes(self) -> int:
        return sum(tensor_bytes(vars(layer)) for layer in self.cache.layers)


class Rounded(QuantizedCache):
    """A quantized cache that gets K and V in `dtype`, as from a model that computes in it: scales, and tokens that stay
    exact, take no more bytes than there."""

    def __init__(self, dtype: torch.dtype, **options: Any) -> None:
        super().__init__(**options)
        self.dtype = dtype

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        key, value = super().update(key_states.to(self.dtype), value_states.to(self.dtype), *arguments, **named)
        return key.to(key_states.dtype), value.to(value_states.dtype)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in containers, and of those inside tensors that wrap others, as packed ones do."""
    if isinstance(value, Tensor):
        names = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else ()
        return tensor_bytes([getattr(value, name) for name in names]) if names else value.nbytes
    if isinstance(value, Mapping):
        return tensor_bytes(list(value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def transformers_caches(
    model: str, dtype: str, caches: Sequence[tuple[str, str, Mapping[str, Any]]], text: Text, numbers: int
) -> list[Row]:
    """`caches` are rivals, names of their caches, and the arguments of `QuantizedCache` for them; these get K and V in
    `dtype`."""
    loaded = open_source(model, "float32").load_model("sdpa")
    compared = {
        (rival, name): Transformers(loaded, Rounded(DTYPES[dtype], config=loaded.config, **options))
        for rival, name, options in caches
    }
    return compare(Transformers(loaded, DynamicCache(config=loaded.config)), compared, text, numbers)


# ---- llama.cpp ----


class LlamaCpp:
    """A model of llama.cpp and a context whose K and V have one of `LLAMA_TYPES`.

    `full` is a context in full precision that has read the same tokens: what its state has beside K and V, such as
    positions, this one's has too, and it does not count. Without `full` this is such a context. It has no flash
    attention, which rounds to f16.
    """

    def __init__(self, model: Any, kind: str, text: Text, numbers: int, full: LlamaCpp | None = None) -> None:
        import llama_cpp

        self.api, self.full, self.numbers, self.length = llama_cpp, full, numbers, 0
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = -(-max(text.lengths) // 256) * 256
        options.n_batch = options.n_ubatch = text.chunk
        options.type_k = options.type_v = LLAMA_TYPES[kind]
        options.flash_attn_type = int(full is not None)
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise SystemExit(f"llama.cpp cannot make a cache of type {kind} for this model; leave it out")

    def feed(self, ids: list[int]) -> Tensor:
        api, batch = self.api, self.api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, self.length + place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        failed = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise SystemExit(f"llama.cpp could not read {len(ids)} tokens after {self.length} (code {failed})")
        self.length += len(ids)
        found = ctypes.cast(api.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float * self.vocab_size))
        return torch.stack([torch.frombuffer(found[place], dtype=torch.float32) for place in range(len(ids))])

    def state_bytes(self) -> int:
        return self.api.llama_state_seq_get_size(self.context, 0)

    def cache_bytes(self) -> int:
        full = self if self.full is None else self.full
        return self.state_bytes() - (full.state_bytes() - 4 * self.numbers * self.length)


def llama_caches(rival: str, model: str, caches: Sequence[str], text: Text, numbers: int) -> list[Row]:
    """`caches` are names of `LLAMA_TYPES`."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, message, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    if not loaded:
        raise SystemExit(f"llama.cpp cannot read {model}; it needs a .gguf file of an architecture that it knows")
    full = LlamaCpp(loaded, "f32", text, numbers)
    compared = {(rival, kind): LlamaCpp(loaded, kind, text, numbers, full) for kind in caches}
    return compare(full, compared, text, numbers)


ENGINES = {"pmkvq-compile": artifacts, "transformers": transformers_caches, "llama.cpp": llama_caches}


def main(task: Path) -> None:
    """Do the task that `rivals.py` wrote, and write its rows beside it."""
    asked = json.loads(task.read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    rows = ENGINES[asked["engine"]](**asked["options"], text=Text(**asked["text"]), numbers=asked["numbers"])
    task.with_suffix(".rows.json").write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
