"""The ONNX function of one layer's attention against the runtime's reference path, over prefill, steps and flushes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")

from pmkvq_compiler.emit.onnx_attention import DOMAIN, OPSET, Attention, attention_function, state_tensors  # noqa: E402
from pmkvq_compiler.errors import CompileError  # noqa: E402
from pmkvq_compiler.passes.program import AttentionSite  # noqa: E402
from pmkvq_compiler.runtime.attention import cached_attention  # noqa: E402
from pmkvq_compiler.runtime.cache import Cache  # noqa: E402
from pmkvq_compiler.runtime.layer_cache import Records  # noqa: E402
from tests.programs import relative_error  # noqa: E402
from tests.runtime.plans import cache_plan, layer_plan  # noqa: E402

BATCH, MAX_LEN, SCALE = 2, 600, 0.125
CALLS = [10, *[1] * 130, 200, *[1] * 70, 3]
"""Tokens of each call: a prefill, steps until blocks leave the window, a longer piece, steps, a short piece."""

LATER = {"blocks": "present_blocks", "rows": "present_rows"}


def attention_of(
    group: int = 2,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: str = "float32",
    max_len: int = MAX_LEN,
    **plan: Any,
) -> Attention:
    layer = layer_plan(max_len=max_len, batch_size=BATCH, **plan)
    site = AttentionSite(
        layer=0,
        node="attention",
        num_attention_heads=group * layer.num_key_value_heads,
        num_key_value_heads=layer.num_key_value_heads,
        key_head_dim=layer.key_head_dim,
        value_head_dim=layer.value_head_dim,
        scale=SCALE,
        sliding_window=layer.sliding_window,
        softcap=softcap,
        has_sinks=sinks,
        query=None,
        key=None,
        value=None,
        reason=None,
    )
    return Attention.of(site, dataclasses.replace(layer, stages=layer.stages[-1:]), max_len, dtype)


class Layer:
    """The function as a model of one node, and the state between its calls."""

    def __init__(self, attention: Attention) -> None:
        function = attention_function("CachedAttention", attention)
        state = state_tensors(attention)
        inputs = [ir.Value(name=one.name, type=one.type, shape=one.shape) for one in function.inputs]
        attended = ("batch", attention.num_attention_heads, "sequence", attention.plan.value_head_dim)
        results = [(ir.DataType.FLOAT, attended), *((tensor.dtype, tensor.shape) for tensor in state)]
        outputs = [
            ir.Value(
                name=output.name, type=ir.TensorType(dtype), shape=ir.Shape(LATER.get(size, size) for size in shape)
            )
            for output, (dtype, shape) in zip(function.outputs, results, strict=True)
        ]
        node = ir.Node(DOMAIN, function.name, inputs, outputs=outputs)
        graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="layer")
        self.model = ir.to_proto(ir.Model(graph, ir_version=10, functions=[function]))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.model.SerializeToString(), options)
        self.state = {
            tensor.name: np.zeros(
                [BATCH, *(size if isinstance(size, int) else 0 for size in tensor.shape[1:])], tensor.dtype.numpy()
            )
            for tensor in state
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        given = {"query": q, "key": k, "value": v} | ({} if sinks is None else {"sinks": sinks})
        past = {f"past_{name}": value for name, value in self.state.items()}
        attended, *present = self.session.run(None, {name: one.numpy() for name, one in given.items()} | past)
        self.state = dict(zip(self.state, present, strict=True))
        return torch.from_numpy(attended)


CONFIGURATIONS: list[dict[str, Any]] = [
    {"key_axis": "token", "key_bits": 4, "value_bits": 2},
    {"key_axis": "channel", "key_bits": 2, "value_bits": 4},
    {"key_axis": "token", "key_bits": 8, "value_bits": 8, "group": 1},
    {"key_axis": "channel", "key_bits": 4, "value_bits": 4, "sink": 0, "key_head_dim": 80, "value_head_dim": 48},
    {"key_axis": "channel", "key_bits": 8, "value_bits": 4, "softcap": 20.0, "sinks": True},
    {"key_axis": "token", "key_bits": 4, "value_bits": 4, "sliding_window": 200, "sink": 0, "sinks": True},
    {"sliding_window": 100, "sink": 0, "window": 164, "stages": ()},
    {"sink": 0, "window": MAX_LEN, "stages": ()},
    {"key_axis": "channel", "key_bits": 4, "value_bits": 2, "dtype": "bfloat16"},
    {"key_axis": "token", "key_bits": 4, "value_bits": 4, "sliding_window": 200, "sink": 0, "dtype": "float16"},
    {"sink": 0, "window": MAX_LEN, "stages": (), "dtype": "bfloat16"},
]
ROWS = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}


def runtime_cache(attention: Attention) -> Cache:
    """The runtime's cache of the same layer, whose rows have the dtype of the function's."""
    plan = cache_plan(attention.plan, max_len=MAX_LEN, batch_size=BATCH)
    return Cache(plan, BATCH, MAX_LEN, ROWS[attention.row_dtype], torch.device("cpu"))


def assert_same_parameters(layer: Layer, records: Records) -> None:
    """The function keeps the two bytes of a word apart, that of the middle first."""
    for name in ("key_parameters", "value_parameters"):
        words = getattr(records, name).contiguous().view(torch.uint8).unflatten(-1, (-1, 2))
        assert np.array_equal(layer.state[name][0], words.flip(-1).transpose(-1, -2).numpy())


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda one: "-".join(map(str, one.values())))
def test_function_computes_what_the_runtime_does(configuration: dict[str, Any]) -> None:
    attention = attention_of(**configuration)
    plan, heads = attention.plan, attention.num_attention_heads
    layer, cache = Layer(attention), runtime_cache(attention)
    sinks = torch.randn(heads) if attention.has_sinks else None
    spread = torch.linspace(0.2, 3, plan.key_head_dim)
    for count in CALLS:
        q = 2 * torch.randn(BATCH, heads, count, plan.key_head_dim)
        k = 1 + spread * torch.randn(BATCH, plan.num_key_value_heads, count, plan.key_head_dim)
        v = torch.randn(BATCH, plan.num_key_value_heads, count, plan.value_head_dim)
        cache.begin([slice(0, count)] * BATCH)
        expected = cached_attention(q, k, v, cache, 0, SCALE, attention.softcap, sinks)
        cache.end()
        assert relative_error(layer(q, k, v, sinks), expected) <= 1e-5
    assert layer.state["key_rows"].shape[2] == cache.layers[0].rows[0]
    if plan.quantized and plan.sliding_window is None:
        records = cache.layers[0].records(0, 0, cache.layers[0].live_blocks(0))
        assert_same_parameters(layer, records)


@pytest.mark.parametrize("configuration", CONFIGURATIONS[:6:2], ids=lambda one: one["key_axis"])
def test_function_is_valid_and_of_standard_operators(configuration: dict[str, Any]) -> None:
    model = Layer(attention_of(**configuration)).model
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    (function,) = inferred.functions
    assert {node.domain for node in function.node} == {""}


def test_numbers_of_any_size_and_constant_groups() -> None:
    """Groups of equal numbers, of denormal ranges and of numbers beyond float16."""
    attention = attention_of(sink=0, window=64, key_axis="token", key_bits=4, value_bits=4)
    plan, layer, cache = attention.plan, Layer(attention), runtime_cache(attention)
    shape = (BATCH, plan.num_key_value_heads, 256, plan.key_head_dim)
    k = torch.randn(shape) * 10 ** torch.linspace(-9, 5, 256).unsqueeze(-1)
    k[:, :, ::16] = 0.25
    v = torch.rand(shape) * 2 ** torch.linspace(-26, -10, 256).unsqueeze(-1)
    q = torch.zeros(BATCH, attention.num_attention_heads, 256, plan.key_head_dim)
    cache.begin([slice(0, 256)] * BATCH)
    cached_attention(q, k, v, cache, 0, SCALE)
    layer(q, k, v, None)
    records = cache.layers[0].records(0, 0, cache.layers[0].live_blocks(0))
    assert_same_parameters(layer, records)


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 4_608), (128, 3_584)])
def test_inputs_at_4_bits_take_at_most_29_percent_of_bfloat16(head_dim: int, tokens: int) -> None:
    """All inputs of a bfloat16 model's layer, first and last rows included, at the length of a long chat and beyond."""
    shape = {"key_head_dim": head_dim, "value_head_dim": head_dim, "block": head_dim, "num_key_value_heads": 1}
    attention = attention_of(
        group=1, dtype="bfloat16", max_len=tokens, key_bits=4, value_bits=4, key_axis="channel", **shape
    )
    layer = Layer(attention)
    for _ in range(tokens // 512):
        q, k, v = torch.randn(3, BATCH, 1, 512, head_dim)
        layer(q, k, v, None)
    pooled = layer.state["value_codes"].shape[2] * attention.plan.block
    assert pooled + layer.state["key_rows"].shape[2] == tokens
    assert sum(value.nbytes for value in layer.state.values()) <= 0.29 * 2 * BATCH * tokens * 2 * head_dim


def test_numbers_beyond_float16_stay_finite_in_its_rows() -> None:
    layer = Layer(attention_of(dtype="bfloat16"))
    q, k, v = (torch.full((BATCH, heads, 2, 64), 1e6) for heads in (6, 3, 3))
    layer(q, k, v, None)
    assert layer.state["key_rows"].dtype == np.float16
    assert (layer.state["key_rows"] == 65_504).all()
    assert np.isfinite(layer.state["value_rows"]).all()


def test_codes_wider_than_a_byte_are_refused() -> None:
    with pytest.raises(CompileError, match=r"layer 0 ends at K 16 and V 8 bits .* choose narrower --bits"):
        attention_of(key_bits=16, value_bits=8, stages=((16, 8),))
