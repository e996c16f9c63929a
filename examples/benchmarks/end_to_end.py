"""A whole model decoding from a long context: compiled, with a packed cache, against transformers with a bf16 cache.

    python examples/benchmarks/end_to_end.py                         # everything, on a CUDA device
    python examples/benchmarks/end_to_end.py --only packed,eager
    python examples/benchmarks/end_to_end.py --shape tiny --device cpu --memory 2MiB     # a trial of the script

The model has the shape of Qwen2.5-7B and random weights, the same for all; caches are filled with random keys and
values directly. `packed`: K and V at 2 bits, K by channel, 2.13 bits a number without the window. `bf16`: the same
runtime with nothing quantized. `eager`: transformers with its default cache; `static`: with a static cache, compiled by
torch.compile and replayed as a CUDA graph. `compiled`: the generated model with PyTorch's attention over a static bf16
cache, compiled and replayed in the same way. `vllm-bf16` and `vllm-fp8`: vLLM with such caches, if it is installed.
Each is timed at `--batches`, by default at batch 1 and at the largest that fits the device, and `packed` then also at
the largest of the others that ran before it; `lowering` is a packed cache whose layers are all lowered in one step.

Before anything is timed, the logits of our models are compared with those that the reference path computes in float32
from the same cache; a model whose logits are wrong gets no row, and the exit code is 1.

A step takes the time from tokens to the next tokens, waiting for them included. Times are medians. Every part runs in
its own process. Writes DIR/end_to_end.csv, end_to_end.md and end_to_end.svg.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gate
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PretrainedConfig, StaticCache

from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.emit.kernel_source import kernel_files
from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.runtime import Cache, CachePlan, CompiledModel, LayerPlan, choose_backend
from pmkvq_compiler.runtime.fused import PLAIN
from pmkvq_compiler.runtime.generate import decoder
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.load import import_generated
from pmkvq_compiler.runtime.plan import original_bytes, sequence_bytes
from pmkvq_compiler.runtime.reference import REFERENCE
from pmkvq_compiler.runtime.weights import side_by_side
from pmkvq_compiler.source.capture import capture

sys.path.append(str(Path(__file__).parent.parent / "serve"))
import decode_speed

Bits = tuple[int, int]

SHAPES = {
    "qwen2.5-7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
    },
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
    },
}
DTYPE = torch.bfloat16
SINK, WINDOW = 4, 128
FINAL: Bits = (2, 2)
BEFORE: Bits = (4, 2)
WARM_UP, STEPS = 4, 16
PROBES = (2, 4)
"""Batches whose memory is measured, to predict that of a larger one."""
FILL_CHUNK = 4096
LOGITS_TOLERANCE = 0.05
"""Relative norm of the error of logits: layers in bf16 enlarge the differences of the layers before them."""
ROOM = WARM_UP + STEPS
"""Tokens that are decoded after a context; `--context` includes them."""
SHORTEST = 1024
LARGEST = "largest"
VLLM_LARGEST = 512
"""Sequences at once at most in vLLM, where the largest batch is looked for."""


@dataclass(frozen=True)
class Setting:
    """The settings of the benchmark, the same for every part."""

    shape: str
    device: str
    context: int
    memory: int | None
    """Bytes that the cache may take, where the device's free memory is not known."""
    batches: tuple[int, ...]
    largest: bool
    """Whether the largest batch that fits is measured as well."""

    @property
    def config(self) -> PretrainedConfig:
        rope = {"rope_type": "default", "rope_theta": 1e6}
        return AutoConfig.for_model("qwen2", rope_parameters=rope, tie_word_embeddings=False, **SHAPES[self.shape])


@dataclass(frozen=True)
class Row:
    """A measurement: the median of a step's milliseconds, and memory in GiB; `true_bits` counts windows as well."""

    part: str
    what: str
    batch: int
    milliseconds: float
    tokens_a_second: float
    true_bits: float
    cache: float
    peak: float


# ---- models ----


def random_weights(
    shapes: dict[str, torch.Size], device: str, joined: Sequence[Sequence[str]] = ()
) -> dict[str, Tensor]:
    """Weights by name, drawn in the order of their names; those of norms are 1. Those `joined` lie side by side."""
    generator = torch.Generator(device).manual_seed(0)
    empty = {name: torch.empty(shape, dtype=DTYPE, device="meta") for name, shape in shapes.items()}
    places = side_by_side(empty, joined, torch.device(device))

    def draw(name: str) -> Tensor:
        weight = places[name] if name in places else torch.empty(shapes[name], dtype=DTYPE, device=device)
        return weight.fill_(1) if "norm" in name else weight.normal_(std=0.02, generator=generator)

    return {name: draw(name) for name in sorted(shapes)}


def random_heads(heads: int, tokens: int, head_dim: int, batch: int, device: str) -> Tensor:
    """Keys or values [batch, heads, tokens, head_dim]: the same numbers for every sequence."""
    return torch.randn(1, heads, tokens, head_dim, dtype=DTYPE, device=device).expand(batch, -1, -1, -1)


class Contender(ABC):
    """A model on the device that decodes from caches filled with random numbers."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.device = setting.device
        self.config = setting.config
        self.heads = self.config.num_key_value_heads
        self.head_dim = self.config.hidden_size // self.config.num_attention_heads
        self.filled = setting.context - ROOM
        self.cache: Any = None

    @abstractmethod
    def start(self, batch: int) -> None:
        """Make caches for `batch` sequences and fill them with the context."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """The tokens [B] that follow `tokens` [B]."""

    def stop(self) -> None:
        """Free the caches' memory."""
        self.cache = None

    @abstractmethod
    def cache_bytes(self) -> int:
        """Bytes of the caches."""

    @property
    def bits(self) -> float:
        """True bits of a number in the cache."""
        return 16.0


class Artifact(Contender):
    """The project's runtime, with the code that it generates for a plan: `stages` of widths, none for a bf16 cache.

    Layers have room for `context` tokens of a sequence at the last stage, or as many as `held` at the first.
    """

    def __init__(self, setting: Setting, stages: tuple[Bits, ...], held: int | None = None) -> None:
        super().__init__(setting)
        self.max_len = setting.context if held is None else setting.context + setting.context // 8
        program = capture(self.config)
        run_passes(program, [LocateAttention()])
        # a batch of any size: every sequence gets the bytes that it would get in the plan of its batch
        self.plan = self._plan(stages, 1 << 12, held)
        sites = program.sites
        run_passes(program, pipeline({}, {}, {}, self.plan))
        self.folder = tempfile.TemporaryDirectory()
        folder = Path(self.folder.name)
        (folder / "kernels").mkdir()
        (folder / "model.py").write_text(model_source(program), encoding="utf-8")
        for name, text in kernel_files(sites, self.plan.layers).items():
            (folder / "kernels" / name).write_text(text, encoding="utf-8")
        nodes = program.graph.find_nodes(op="placeholder")
        shapes = {program.weights[node.name]: node.meta["val"].shape for node in nodes if node.name in program.weights}
        device, code = torch.device(self.device), import_generated(folder / "model.py")
        self.code = code
        weights = random_weights(shapes, self.device, code.JOINED)
        weights |= {constant.name: constant.value.to(self.device) for constant in program.constants.values()}
        hidden_states, logits = code.bind(weights)
        attention, ops = choose_backend(folder, self.plan, device)
        size, no_ends = self.config.vocab_size, frozenset[int]()
        self.model = CompiledModel(
            self.plan, weights, hidden_states, logits, size, no_ends, None, DTYPE, device, attention, ops
        )  # fmt: skip

    def _plan(self, stages: tuple[Bits, ...], batch_size: int, held: int | None) -> CachePlan:
        layer = LayerPlan(
            num_key_value_heads=self.heads,
            key_head_dim=self.head_dim,
            value_head_dim=self.head_dim,
            key_bits=stages[-1][0] if stages else 16,
            value_bits=stages[-1][1] if stages else 16,
            key_axis="channel",
            sink=SINK if stages else 0,
            window=WINDOW if stages else self.max_len,
            block=WINDOW,
            sliding_window=None,
            stages=stages,
            arena_bytes=0,
        )
        taken = sequence_bytes(layer, self.max_len, DTYPE.itemsize)
        if held is not None:
            taken = sequence_bytes(layer, held, DTYPE.itemsize, stage=0)
        layers = (dataclasses.replace(layer, arena_bytes=batch_size * taken),) * self.config.num_hidden_layers
        total = sum(layer.arena_bytes for layer in layers)
        return CachePlan("best", total, self.max_len, batch_size, "bfloat16", layers)

    @property
    def bits(self) -> float:
        layer = self.plan.layers[0]
        return 16 * layer.arena_bytes / self.plan.batch_size / original_bytes(layer, self.setting.context)

    def start(self, batch: int) -> None:
        layers = [
            dataclasses.replace(layer, arena_bytes=layer.arena_bytes // self.plan.batch_size * batch)
            for layer in self.plan.layers
        ]
        plan = dataclasses.replace(self.plan, batch_size=batch, layers=tuple(layers))
        self.cache = Cache(plan, batch, self.max_len, DTYPE, self.model.device, self.model.attention)
        self.fill(self.filled)
        self.running = torch.ones(batch, dtype=torch.bool, device=self.device)
        self.decode = decoder(self.model, self.cache)

    @torch.inference_mode()
    def fill(self, tokens: int) -> None:
        """Append random tokens until every sequence has `tokens`."""
        cache = self.cache
        for start in range(cache.length[0], tokens, FILL_CHUNK):
            count = min(FILL_CHUNK, tokens - start)
            cache.begin([slice(0, count)] * cache.batch_size)
            for index, store in enumerate(cache.layers):
                k, v = (random_heads(self.heads, count, self.head_dim, cache.batch_size, self.device) for _ in range(2))
                attention = cache.attention[index]
                if isinstance(attention, LayerKernels):
                    attention.append(k, v, store, cache.new_tokens)
                else:
                    for sequence in range(cache.batch_size):
                        store.append(sequence, k[sequence], v[sequence])
            cache.end()

    @torch.inference_mode()
    def compare(self) -> None:
        """Raises `gate.WrongKernelError` where the logits of a step are not those of the reference path in float32."""
        self.start(1)
        twin = copy.copy(self.cache)
        twin.attend_by([REFERENCE] * len(twin.layers))
        tokens = torch.zeros(1, dtype=torch.int64, device=self.device)
        found, expected = self.decode(tokens, self.running), self.exact()(tokens.unsqueeze(-1), twin)[:, -1]
        self.stop()
        gate.check("decode", found, expected, LOGITS_TOLERANCE)

    def exact(self) -> CompiledModel:
        """The model in float32, by plain PyTorch. In bf16, two ways to compute the same would differ by the sum of both
        their errors."""
        weights = {name: weight.float() for name, weight in self.model.weights.items()}
        hidden_states, logits = self.code.bind(weights)
        return dataclasses.replace(
            self.model, weights=weights, hidden_states=hidden_states, logits=logits, dtype=torch.float32, ops=PLAIN
        )

    def step(self, tokens: Tensor) -> Tensor:
        return self.decode(tokens, self.running).argmax(-1)

    def stop(self) -> None:
        self.cache = self.decode = None

    def cache_bytes(self) -> int:
        return self.cache.bytes_reserved


class Called(Artifact):
    """The same model and caches, but every step is a call of the model, without a graph."""

    def __init__(self, artifact: Artifact) -> None:
        vars(self).update(vars(artifact))

    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.unsqueeze(-1), self.cache)[:, -1].argmax(-1)


class StaticCompiled(Artifact):
    """The generated model with PyTorch's own attention over a static bf16 cache, compiled by torch.compile, and on a
    CUDA device replayed as one CUDA graph."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, ())
        vars(self.code)["cached_attention"] = attend_static
        self.compiled = torch.compile(self.one_token, fullgraph=True, dynamic=False)

    def one_token(self, tokens: Tensor, cache: StaticLayers) -> Tensor:
        hidden = self.model.hidden_states(tokens, cache.position.expand_as(tokens), cache)
        return self.model.logits(hidden[:, -1])

    @torch.no_grad()
    def compare(self) -> None:
        """Raises `gate.WrongKernelError` where the logits of a step are not those of the step as it is written."""
        self.start(1)
        found, expected = self.replay().clone(), self.one_token(self.tokens, self.cache)
        self.stop()
        gate.check("decode", found, expected, LOGITS_TOLERANCE)

    @torch.no_grad()
    def start(self, batch: int) -> None:
        shape = (batch, self.heads, self.setting.context, self.head_dim)
        layers = [(self._filled(shape), self._filled(shape)) for _ in self.plan.layers]
        self.cache = StaticLayers(layers, torch.tensor([self.filled], device=self.device))
        tokens = self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)

        def run() -> Tensor:
            with fastest_attention(self.device):
                return self.compiled(tokens, self.cache)

        self.replay = run if self.device == "cpu" else captured(run)

    def _filled(self, shape: tuple[int, ...]) -> Tensor:
        batch, heads, tokens, channels = shape
        return random_heads(heads, tokens, channels, batch, self.device).contiguous()

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens.unsqueeze(-1))
        logits = self.replay()
        self.cache.position.add_(1)
        return logits.argmax(-1)

    def stop(self) -> None:
        self.cache = self.replay = None

    def cache_bytes(self) -> int:
        return sum(one.nbytes for layer in self.cache.layers for one in layer)


@dataclass(frozen=True)
class StaticLayers:
    """Keys and values [B, H, context, d] of each layer, and the position [1] of the token that comes next."""

    layers: list[tuple[Tensor, Tensor]]
    position: Tensor


def attend_static(
    q: Tensor, k: Tensor, v: Tensor, cache: StaticLayers, layer: int, scale: float, **others: Any
) -> Tensor:
    """`cached_attention` of one new token over a static cache."""
    keys, values = cache.layers[layer]
    keys.index_copy_(2, cache.position, k)
    values.index_copy_(2, cache.position, v)
    seen = (torch.arange(keys.shape[2], device=q.device) <= cache.position)[None, None, None]
    return F.scaled_dot_product_attention(q, keys, values, seen, scale=scale, enable_gqa=True)


def fastest_attention(device: str) -> AbstractContextManager[None]:
    """Within, PyTorch attends with its fastest kernel for grouped queries and a mask."""
    return nullcontext() if device == "cpu" else sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


class Transformers(Contender):
    """transformers with its default cache."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=DTYPE, attn_implementation="sdpa").eval()
        shapes = {name: weight.shape for name, weight in self.model.named_parameters()}
        self.model.load_state_dict(random_weights(shapes, self.device), assign=True)
        self.model.requires_grad_(False).to(self.device)

    def start(self, batch: int) -> None:
        self.cache = DynamicCache()
        for layer in range(self.config.num_hidden_layers):
            k, v = (random_heads(self.heads, self.filled, self.head_dim, batch, self.device) for _ in range(2))
            self.cache.update(k, v, layer)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        return self.model(tokens.unsqueeze(-1), past_key_values=self.cache, logits_to_keep=1).logits[:, -1].argmax(-1)

    def cache_bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class StaticTransformers(Transformers):
    """transformers with a static cache, compiled, and on a CUDA device replayed as one CUDA graph."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.compiled = torch.compile(self.model)

    @torch.no_grad()
    def start(self, batch: int) -> None:
        self.cache = StaticCache(config=self.config, max_cache_len=self.setting.context)
        self.cache.early_initialization(batch, self.heads, self.head_dim, DTYPE, torch.device(self.device))
        for layer in self.cache.layers:
            # new tensors lack the mark by which torch would compile anew for every cache; the graph is captured below
            layer.keys, layer.values = torch.empty_like(layer.keys), torch.empty_like(layer.values)
            layer.cumulative_length = torch.full_like(layer.cumulative_length, self.filled)
            for stored in (layer.keys, layer.values):
                stored[:, :, : self.filled] = random_heads(self.heads, self.filled, self.head_dim, batch, self.device)
                stored[:, :, self.filled :] = 0
        tokens = self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)

        def run() -> Tensor:
            return self.compiled(tokens, past_key_values=self.cache, logits_to_keep=1).logits[:, -1].argmax(-1)

        self.replay = run if self.device == "cpu" else captured(run)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.filled)  # the runs above have counted a token

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens.unsqueeze(-1))
        return self.replay()

    def stop(self) -> None:
        self.cache = self.replay = None


def captured(work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`work` as a CUDA graph, after a run that compiles it."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


# ---- measuring ----


@dataclass(frozen=True)
class Decoded:
    """The seconds and bytes that a run of steps took."""

    seconds: list[float]
    cache_bytes: int
    peak: int
    """The most bytes of all tensors at a time on a CUDA device; the caches' bytes elsewhere."""


def decoded(contender: Contender, batch: int, steps: int = WARM_UP + STEPS) -> Decoded:
    """Fill caches and time every one of so many steps. Raises `torch.OutOfMemoryError` where they do not fit."""
    on_cuda = contender.device == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        contender.start(batch)
        tokens, seconds = torch.randint(contender.config.vocab_size, (batch,), device=contender.device), []
        for _ in range(steps):
            begin = time.perf_counter()
            tokens = contender.step(tokens)
            if on_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        held = contender.cache_bytes()
        return Decoded(seconds, held, torch.cuda.max_memory_allocated() if on_cuda else held)
    finally:
        contender.stop()
        if on_cuda:
            torch.cuda.empty_cache()


def measured(contender: Contender, part: str, batch: int, what: str = "decode") -> Row:
    run = decoded(contender, batch)
    return row_of(contender, part, what, batch, statistics.median(run.seconds[WARM_UP:]), run)


def row_of(contender: Contender, part: str, what: str, batch: int, seconds: float, run: Decoded) -> Row:
    return Row(
        part, what, batch, 1e3 * seconds, batch / seconds, contender.bits, run.cache_bytes / 2**30, run.peak / 2**30
    )  # fmt: skip


def largest(contender: Contender, part: str) -> Row:
    """The measurement at the largest batch that fits, which is predicted from two small ones and reduced until it
    fits."""
    peaks = [decoded(contender, batch, steps=WARM_UP).peak for batch in PROBES]
    slope = (peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0])
    batch = int((memory(contender) - (peaks[0] - slope * PROBES[0])) / slope)
    while True:
        try:
            return measured(contender, part, batch, "decode, largest batch")
        except torch.OutOfMemoryError:
            print(f"{part}: a batch of {batch} does not fit", flush=True)
            batch -= max(1, batch // 50)


def memory(contender: Contender) -> int:
    """Bytes that tensors may take: what is free or belongs to PyTorch already, less 1 GiB for fragmentation."""
    if contender.setting.memory is not None:
        return contender.setting.memory
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - 2**30


# ---- parts ----


def decoding(contender: Contender, part: str, others: int | None = None) -> Iterator[Row]:
    """The rows of a contender: at the batches that were asked for, at the largest of `others`, and at its own."""
    setting = contender.setting
    for batch in setting.batches:
        yield measured(contender, part, batch)
    if setting.largest:
        if others is not None:
            yield measured(contender, part, others)
        yield largest(contender, part)


def packed_part(setting: Setting, others: int | None) -> Iterator[Row]:
    contender = Artifact(setting, (FINAL,))
    contender.compare()
    yield from decoding(contender, "packed", others)


def bf16_part(setting: Setting, others: int | None) -> Iterator[Row]:
    contender = Artifact(setting, ())
    contender.compare()
    yield from decoding(contender, "bf16")


def eager_part(setting: Setting, others: int | None) -> Iterator[Row]:
    yield from decoding(Transformers(setting), "eager")


def static_part(setting: Setting, others: int | None) -> Iterator[Row]:
    yield from decoding(StaticTransformers(setting), "static")


def compiled_part(setting: Setting, others: int | None) -> Iterator[Row]:
    contender = StaticCompiled(setting)
    contender.compare()
    yield from decoding(contender, "compiled")


def vllm_part(kind: str, setting: Setting, others: int | None) -> Iterator[Row]:
    """vLLM with a cache of a kind, bf16 or fp8, where it is installed. It does not say what its steps' memory is."""
    if importlib.util.find_spec("vllm") is None:
        print(f"vllm-{kind}: vLLM is not installed here, so it has no rows", flush=True)
        return
    wanted = ",".join(map(str, setting.batches))
    shapes = {"qwen2.5-7b": "7b"}.get(setting.shape, setting.shape)
    layers = str(setting.config.num_hidden_layers)
    largest = VLLM_LARGEST if setting.largest else max(setting.batches)
    options = ["--kinds", kind, "--batches", wanted, "--shapes", shapes, "--layers", layers]
    options += ["--tokens", str(setting.context - ROOM), "--new", str(ROOM), "--largest", str(largest)]
    for _, found in decode_speed.timed(options):
        counts = {int(batch): step for batch, step in found["rows"].items()}
        for batch in counts if setting.largest else setting.batches:
            if batch in counts:
                yield Row(
                    f"vllm {kind}", "decode", batch, counts[batch], 1e3 * batch / counts[batch],
                    8.0 if kind == "fp8" else 16.0, float("nan"), float("nan"),
                )  # fmt: skip


def lowering_part(setting: Setting, others: int | None) -> Iterator[Row]:
    """Every layer is lowered in the middle of the steps, at a batch of 1 and of 16."""
    blocks = (setting.context - ROOM - SINK - WINDOW) // WINDOW
    held = SINK + WINDOW + blocks * WINDOW
    contender = Artifact(setting, (BEFORE, FINAL), held)
    contender.compare()
    contender.filled = held - ROOM // 2
    what = f"step that lowers {contender.config.num_hidden_layers} layers from {BEFORE} to {FINAL} and captures"
    for batch in (1, 16):
        decoded(contender, batch)  # compiles the kernels of both widths
        run = decoded(contender, batch)
        others = [taken for index, taken in enumerate(run.seconds) if index >= WARM_UP and index != ROOM // 2]
        yield row_of(contender, "lowering", "first step, captures", batch, run.seconds[0], run)
        yield row_of(contender, "lowering", what, batch, run.seconds[ROOM // 2], run)
        yield row_of(contender, "lowering", "other steps", batch, statistics.median(others), run)
        called = Called(contender)
        yield measured(called, "lowering", batch, "steps by calls of the model, without a graph")


PARTS: dict[str, Callable[[Setting, int | None], Iterator[Row]]] = {
    "eager": eager_part,
    "bf16": bf16_part,
    "packed": packed_part,
    "lowering": lowering_part,
    "static": static_part,
    "compiled": compiled_part,
    "vllm-bf16": partial(vllm_part, "bf16"),
    "vllm-fp8": partial(vllm_part, "fp8"),
}
TRANSFORMERS = ("eager", "static")
FULL_PRECISION = (*TRANSFORMERS, "bf16", "compiled", "vllm bf16")


def run_part(name: str, setting: Setting, others: int | None) -> list[Row]:
    """Run a part; `main` calls this in a new process."""
    torch.manual_seed(0)
    if setting.device == "cpu":
        torch.set_num_threads(1)
    began, rows = time.perf_counter(), []
    for row in PARTS[name](setting, others):
        print(
            f"{time.perf_counter() - began:4.0f} s  {row.part:8} {row.what:24} batch {row.batch:4}: "
            f"{row.milliseconds:8.2f} ms, {row.tokens_a_second:8.1f} tokens/s, cache {row.cache:.2f} GiB of "
            f"{row.true_bits:.2f} bits, peak {row.peak:.2f} GiB",
            flush=True,
        )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, in this order (%(default)s)")
    parser.add_argument("--shape", default="qwen2.5-7b", choices=SHAPES, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=32768, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(%(default)s)")
    parser.add_argument(
        "--batches", default=f"1,{LARGEST}", help=f"sequences at once, and {LARGEST} for all that fit (%(default)s)"
    )
    parser.add_argument("--memory", help="bytes for the cache, such as 64MiB; needed on the CPU")
    parser.add_argument("--output", type=Path, default=Path("out/end_to_end"))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if wrong := {one for one in arguments.batches.split(",") if one != LARGEST and not one.isdecimal()}:
        parser.error(f"--batches {min(wrong)} is no number of sequences; give numbers, or {LARGEST}")
    if unknown := set(names) - set(PARTS):
        parser.error(f"--only {min(unknown)} is not a part; choose from {', '.join(PARTS)}")
    if arguments.context < SHORTEST:
        parser.error(f"--context {arguments.context} leaves no token to quantize; give {SHORTEST} or more")
    if arguments.device == "cpu" and arguments.memory is None:
        parser.error("--device cpu needs --memory, because a CPU does not say how much fits; give bytes, such as 8MiB")
    given = None if arguments.memory is None else parse_budget(arguments.memory, 0)
    batches = arguments.batches.split(",")
    counts = tuple(int(batch) for batch in batches if batch != LARGEST)
    setting = Setting(arguments.shape, arguments.device, arguments.context, given, counts, LARGEST in batches)
    rows: list[Row] = []
    failed = []
    for name in names:
        # transformers' default cache grows by copying, and fixed segments fragment too much for that
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"expandable_segments:{name in TRANSFORMERS}"
        others = max((row.batch for row in rows if row.part in FULL_PRECISION), default=None)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            try:
                rows += pool.submit(run_part, name, setting, others).result()
            except Exception:
                traceback.print_exc()
                failed.append(name)
        write(rows, arguments.output, setting)
    print((arguments.output / "end_to_end.md").read_text(encoding="utf-8"))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


# ---- results ----


def write(rows: Sequence[Row], folder: Path, setting: Setting) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "end_to_end.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in rows)
    (folder / "end_to_end.md").write_text(table(rows, setting), encoding="utf-8")
    plot(rows, folder / "end_to_end.svg")


def table(rows: Sequence[Row], setting: Setting) -> str:
    where = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    lines = [
        f"| {setting.shape}, {setting.context:,} tokens, {where} | batch | ms a step | tokens/s | bits | cache, GiB | "
        f"peak, GiB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row.part}: {row.what} | {row.batch} | {row.milliseconds:.2f} | {row.tokens_a_second:.1f} | "
        f"{row.true_bits:.2f} | {row.cache:.2f} | {row.peak:.2f} |"
        for row in rows
    ]
    return "\n".join([*lines, "", *comparisons(rows), ""])


def comparisons(rows: Sequence[Row]) -> Iterator[str]:
    """The packed cache against the best of the others, and of transformers alone."""
    packed = [row for row in rows if row.part == "packed"]
    for whose, parts in (("transformers", TRANSFORMERS), ("any bf16 cache", FULL_PRECISION)):
        others = [row for row in rows if row.part in parts]
        if not packed or not others:
            continue
        widest, most = (max(group, key=lambda row: row.batch) for group in (packed, others))
        fastest = max(others, key=lambda row: row.tokens_a_second)
        alone = [min(row.milliseconds for row in group if row.batch == 1) for group in (packed, others)]
        yield (
            f"- against {whose}: batch {widest.batch} where {most.batch} ({most.part}) fit, "
            f"{widest.batch / most.batch:.2f} times; {widest.tokens_a_second:.0f} tokens/s where "
            f"{fastest.tokens_a_second:.0f} ({fastest.part}, batch {fastest.batch}), "
            f"{widest.tokens_a_second / fastest.tokens_a_second:.2f} times; alone {alone[0]:.2f} ms a token where "
            f"{alone[1]:.2f}, {alone[1] / alone[0]:.2f} times"
        )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens a second over the batch, with a line for each cache."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    decodes = [row for row in rows if row.what.startswith("decode")]
    for part in dict.fromkeys(row.part for row in decodes):
        points = sorted((row.batch, row.tokens_a_second) for row in decodes if row.part == part)
        axes.plot(*zip(*points, strict=True), marker="o", label=part)
    axes.set(xlabel="sequences decoded at once, up to the most that fit", ylabel="tokens a second")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if decodes:
        axes.legend()
    figure.savefig(path)
    plt.close(figure)


if __name__ == "__main__":
    main()
