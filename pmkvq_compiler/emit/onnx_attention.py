"""Attention over one layer's cache as an ONNX function of standard operators: quantize, pack, shift, unpack, attend.

The function is pure: it takes the layer's state and returns the state with the new tokens in it. The pool of quantized
blocks grows along `blocks`, the unquantized rows (`[sink | window]`) along `rows`; both may be empty. What the codes
stand for is in `onnx_numbers`.

Rows take the bytes that the plan counts: float32 for a model stored so, and float16 for one of 16 bits, bfloat16 as
well, which rounds less than bfloat16 would and is a dtype that every binding of onnxruntime has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from onnxscript import OpBuilder, build_function

from pmkvq_compiler.emit.onnx_numbers import BYTE_BITS, as_float, as_half, pack, quantize, step_and_zero, unpack
from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.runtime.plan import LayerPlan, blocks_needed, fitted
from pmkvq_compiler.runtime.records import PARAMETER_BITS

DOMAIN = "pmkvq"
OPSET = 20
END = 2**63 - 1
LARGEST_FP16 = 65504.0
MINUS_INFINITY = float("-inf")


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a layer's state; a dimension is a number, `batch`, `blocks` or `rows`."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Attention:
    """What tells one attention from another: equal ones share a function. `plan` is fitted to the cache's length."""

    plan: LayerPlan
    blocks: int
    """Quantized blocks that a sequence ever keeps; a sliding-window layer drops older ones."""
    num_attention_heads: int
    scale: float
    softcap: float | None
    has_sinks: bool
    row_dtype: ir.DataType

    @classmethod
    def of(cls, site: AttentionSite, plan: LayerPlan, max_len: int, dtype: str) -> Attention:
        """The attention of a site with a cache of `max_len` tokens, in a model that is stored in `dtype`.

        Raises `CompileError` where the function cannot keep the cache.
        """
        plan = fitted(plan, max_len)
        if plan.quantized and max(plan.key_bits, plan.value_bits) > BYTE_BITS:
            raise CompileError(
                f"layer {site.layer} ends at K {plan.key_bits} and V {plan.value_bits} bits and the ONNX cache packs "
                f"codes of up to {BYTE_BITS}; choose narrower --bits or leave --onnx out"
            )
        return cls(
            plan=plan,
            blocks=blocks_needed(plan, max_len),
            num_attention_heads=site.num_attention_heads,
            scale=site.scale,
            softcap=site.softcap,
            has_sinks=site.has_sinks,
            row_dtype=ir.DataType.FLOAT if dtype == "float32" else ir.DataType.FLOAT16,
        )


def state_tensors(attention: Attention) -> list[StateTensor]:
    """The state of one layer, in the order in which its function takes and returns it."""
    plan, batch = attention.plan, ("batch", attention.plan.num_key_value_heads)
    rows = [
        StateTensor("key_rows", attention.row_dtype, (*batch, "rows", plan.key_head_dim)),
        StateTensor("value_rows", attention.row_dtype, (*batch, "rows", plan.value_head_dim)),
    ]
    if not attention.blocks:
        return rows
    key_bytes = plan.key_head_dim * plan.key_bits // BYTE_BITS
    value_bytes = plan.value_head_dim * plan.value_bits // BYTE_BITS
    fields, parameter_bytes = plan.record.fields, PARAMETER_BITS // BYTE_BITS
    key_groups, value_groups = fields["key_parameters"].numbers, fields["value_parameters"].numbers
    return [
        StateTensor("key_codes", ir.DataType.UINT8, (*batch, "blocks", key_bytes, plan.block)),
        StateTensor("key_parameters", ir.DataType.UINT8, (*batch, "blocks", parameter_bytes, key_groups)),
        StateTensor("value_codes", ir.DataType.UINT8, (*batch, "blocks", plan.block, value_bytes)),
        StateTensor("value_parameters", ir.DataType.UINT8, (*batch, "blocks", parameter_bytes, value_groups)),
        *rows,
    ]


def attention_function(name: str, attention: Attention) -> ir.Function:
    """The function `name(query, key, value[, sinks], past_...) -> (attended, present_...)`.

    `query` is float32 [B, Hq, S, key_head_dim], `key` [B, Hkv, S, key_head_dim], `value` [B, Hkv, S, value_head_dim],
    `sinks` [Hq], `attended` [B, Hq, S, value_head_dim]; all sequences have the same length. A single token is appended
    before it attends, more of them after they have: then their own keys and values are met unquantized, as in the
    runtime.
    """
    plan, state = attention.plan, state_tensors(attention)
    shapes: dict[str, tuple[int | str, ...]] = {
        "query": ("batch", attention.num_attention_heads, "sequence", plan.key_head_dim),
        "key": ("batch", plan.num_key_value_heads, "sequence", plan.key_head_dim),
        "value": ("batch", plan.num_key_value_heads, "sequence", plan.value_head_dim),
    }
    if attention.has_sinks:
        shapes["sinks"] = (attention.num_attention_heads,)
    inputs = [_value(given, ir.DataType.FLOAT, shape) for given, shape in shapes.items()]
    inputs += [_value(f"past_{tensor.name}", tensor.dtype, tensor.shape) for tensor in state]

    def body(op: OpBuilder, *given: ir.Value) -> list[ir.Value]:
        query, key, value, *others = given
        sinks = others.pop(0) if attention.has_sinks else None
        past = {tensor.name: one for tensor, one in zip(state, others, strict=True)}
        outputs = _attend_and_append(op, attention, query, key, value, sinks, past)
        for output, name in zip(outputs, ["attended", *(f"present_{tensor.name}" for tensor in state)], strict=True):
            output.name = name
        return outputs

    function = build_function(body, inputs, domain=DOMAIN, name=name, opset_imports={"": OPSET})
    function.doc_string = _description(attention)
    return function


def _description(attention: Attention) -> str:
    plan = attention.plan
    if not attention.blocks:
        return "Attention over a cache of unquantized rows."
    return (
        f"Attention over {plan.sink} first and up to {plan.window} last rows and, between them, quantized blocks of "
        f"{plan.block} tokens: K in {plan.key_bits} bits by {plan.key_axis}, V in {plan.value_bits} bits by token."
    )


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def _attend_and_append(
    op: OpBuilder,
    attention: Attention,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    sinks: ir.Value | None,
    past: Mapping[str, ir.Value],
) -> list[ir.Value]:
    """The attended values, then the present state.

    Rows, and the blocks that are made of them, hold rounded keys and values. Those of the call itself are met as they
    are, but a single token's, which is appended before it attends.
    """
    plan = attention.plan
    single = op.Equal(op.Shape(key, start=2, end=3), [1])
    seen_keys, keys = _with_new(op, attention, past["key_rows"], key, single)
    seen_values, values = _with_new(op, attention, past["value_rows"], value, single)
    if not attention.blocks and plan.sliding_window is None:
        return [_attend(op, attention, query, {}, seen_keys, seen_values, sinks), keys, values]
    leaving = _blocks_leaving(op, plan, keys)
    rows = [_without(op, plan, one, leaving) for one in (keys, values)]
    if not attention.blocks:
        return [_attend(op, attention, query, {}, seen_keys, seen_values, sinks), *rows]
    new = _quantized_blocks(op, plan, keys, values, leaving)
    before = {name: op.Shape(past[name], start=2, end=3) for name in new}
    pool = {name: op.Concat(past[name], blocks, axis=2) for name, blocks in new.items()}
    early = op.Mul(leaving, op.Cast(single, to=ir.DataType.INT64))
    attended = {name: op.Slice(blocks, [0], op.Add(before[name], early), [2]) for name, blocks in pool.items()}
    unpooled_keys, unpooled_values = (_without(op, plan, one, early) for one in (seen_keys, seen_values))
    out = _attend(op, attention, query, attended, unpooled_keys, unpooled_values, sinks)
    return [out, *(_newest(op, attention, blocks) for blocks in pool.values()), *rows]


def _with_new(
    op: OpBuilder, attention: Attention, rows: ir.Value, new: ir.Value, single: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Rows and new ones after them: in float32 as attention meets them, and in the dtype that they are kept in.

    What is beyond float16 becomes its largest number, not infinity.
    """
    if attention.row_dtype == ir.DataType.FLOAT:
        both = op.Concat(rows, new, axis=2)
        return both, both
    kept = as_half(op, op.Clip(new, -LARGEST_FP16, LARGEST_FP16))
    seen = op.Where(single, as_float(op, kept), new)
    return op.Concat(as_float(op, rows), seen, axis=2), op.Concat(rows, kept, axis=2)


def _blocks_leaving(op: OpBuilder, plan: LayerPlan, keys: ir.Value) -> ir.Value:
    """How many blocks the rows [B, H, rows, d] are beyond sink and window: int64 [1]."""
    excess = op.Sub(op.Shape(keys, start=2, end=3), [plan.sink + plan.window])
    return op.Max(op.Div(op.Add(excess, [plan.block - 1]), [plan.block]), [0])


def _without(op: OpBuilder, plan: LayerPlan, rows: ir.Value, blocks: ir.Value) -> ir.Value:
    """The rows that remain when so many blocks after the sink have left."""
    window = op.Slice(rows, _leaving_end(op, plan, blocks), [END], [2])
    return op.Concat(op.Slice(rows, [0], [plan.sink], [2]), window, axis=2) if plan.sink else window


def _leaving_end(op: OpBuilder, plan: LayerPlan, blocks: ir.Value) -> ir.Value:
    return op.Add(op.Mul(blocks, [plan.block]), [plan.sink])


def _newest(op: OpBuilder, attention: Attention, blocks: ir.Value) -> ir.Value:
    """The blocks that may still be seen."""
    if attention.plan.sliding_window is None:
        return blocks
    count = op.Shape(blocks, start=2, end=3)
    return op.Slice(blocks, op.Max(op.Sub(count, [attention.blocks]), [0]), [END], [2])


def _quantized_blocks(
    op: OpBuilder, plan: LayerPlan, keys: ir.Value, values: ir.Value, count: ir.Value
) -> dict[str, ir.Value]:
    """The blocks that leave the rows, quantized and packed: the pool's tensors of `state_tensors`."""
    end = _leaving_end(op, plan, count)

    def blocks(rows: ir.Value, head_dim: int) -> ir.Value:
        shape = op.Concat([0, 0], count, [plan.block, head_dim], axis=0)
        return as_float(op, op.Reshape(op.Slice(rows, [plan.sink], end, [2]), shape))

    key_blocks = op.Transpose(blocks(keys, plan.key_head_dim), perm=[0, 1, 2, 4, 3])
    key_codes, key_parameters = quantize(op, key_blocks, plan.key_bits, axis=3 if plan.key_axis == "token" else 4)
    value_blocks = blocks(values, plan.value_head_dim)
    value_codes, value_parameters = quantize(op, value_blocks, plan.value_bits, axis=4)
    return {
        "key_codes": pack(op, key_codes, plan.key_bits, axis=3),
        "key_parameters": key_parameters,
        "value_codes": pack(op, value_codes, plan.value_bits, axis=4),
        "value_parameters": value_parameters,
    }


def _attend(
    op: OpBuilder,
    attention: Attention,
    query: ir.Value,
    pool: Mapping[str, ir.Value],
    keys: ir.Value,
    values: ir.Value,
    sinks: ir.Value | None,
) -> ir.Value:
    """`query` [B, Hq, S, key_head_dim] over the pool and the rows, the last S of which are its own."""
    plan = attention.plan
    heads, group = plan.num_key_value_heads, attention.num_attention_heads // plan.num_key_value_heads
    queries = op.Reshape(op.Mul(query, attention.scale), [0, heads, -1, plan.key_head_dim])
    scores = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 3, 2]))
    pooled = op.Mul(op.Shape(pool["key_codes"], start=2, end=3), [plan.block]) if pool else None
    if pooled is not None:
        scores = op.Concat(_key_scores(op, plan, queries, pool, pooled), scores, axis=-1)
    total = op.Shape(scores, start=3)
    by_query = op.Concat([0, heads, group], op.Shape(query, start=2, end=3), total, axis=0)
    weights = _softmax(op, attention, op.Reshape(scores, by_query), sinks)
    weights = op.Reshape(weights, op.Concat([0, heads, -1], total, axis=0))
    if pooled is None:
        out = op.MatMul(weights, values)
    else:
        out = op.MatMul(op.Slice(weights, pooled, [END], [3]), values)
        out = op.Add(out, _value_sums(op, plan, op.Slice(weights, [0], pooled, [3]), pool, pooled))
    return op.Reshape(out, [0, attention.num_attention_heads, -1, plan.value_head_dim])


def _softmax(op: OpBuilder, attention: Attention, scores: ir.Value, sinks: ir.Value | None) -> ir.Value:
    """Softmax of `scores` [B, H, G, S, T] over the keys that each query may see, with soft cap and sink logits.

    Keys lie in the order of their positions: pool, then rows. (Sink rows do not, but only a sliding window minds, and
    layers that have one keep no sink.)
    """
    plan = attention.plan
    if attention.softcap is not None:
        scores = op.Mul(op.Tanh(op.Div(scores, attention.softcap)), attention.softcap)
    count, total = op.Squeeze(op.Shape(scores, start=3, end=4)), op.Squeeze(op.Shape(scores, start=4))
    own = op.Unsqueeze(op.Range(op.Sub(total, count), total, 1), [1])
    positions = op.Range(0, total, 1)
    visible = op.LessOrEqual(positions, own)
    if plan.sliding_window is not None:
        visible = op.And(visible, op.Greater(positions, op.Sub(own, plan.sliding_window)))
    scores = op.Where(visible, scores, MINUS_INFINITY)
    if sinks is None:
        return op.Softmax(scores, axis=-1)
    column = op.Reshape(sinks, [1, plan.num_key_value_heads, -1, 1, 1])
    column = op.Expand(column, op.Concat(op.Shape(scores, end=4), [1], axis=0))
    weights = op.Softmax(op.Concat(scores, column, axis=-1), axis=-1)
    return op.Slice(weights, [0], [-1], [4])


def _key_scores(
    op: OpBuilder, plan: LayerPlan, queries: ir.Value, pool: Mapping[str, ir.Value], pooled: ir.Value
) -> ir.Value:
    """q . k of scaled `queries` [B, H, R, key_head_dim] with the pool's keys: [B, H, R, pooled]."""
    step, zero = step_and_zero(op, pool["key_parameters"], plan.key_bits)
    codes = unpack(op, pool["key_codes"], plan.key_bits, axis=3)
    if plan.key_axis == "channel":
        offsets = op.MatMul(op.Squeeze(zero, [3]), op.Transpose(queries, perm=[0, 1, 3, 2]))
        scores = op.Add(op.MatMul(op.Mul(op.Unsqueeze(queries, [2]), step), codes), op.Unsqueeze(offsets, [4]))
    else:
        queries = op.Unsqueeze(queries, [2])
        offsets = op.Mul(op.ReduceSum(queries, [4]), zero)
        scores = op.Add(op.Mul(op.MatMul(queries, codes), step), offsets)
    scores = op.Transpose(scores, perm=[0, 1, 3, 2, 4])
    return op.Reshape(scores, op.Concat([0, 0, 0], pooled, axis=0))


def _value_sums(
    op: OpBuilder, plan: LayerPlan, weights: ir.Value, pool: Mapping[str, ir.Value], pooled: ir.Value
) -> ir.Value:
    """Sum of the pool's values under `weights` [B, H, R, pooled]: [B, H, R, value_head_dim]."""
    step, zero = step_and_zero(op, pool["value_parameters"], plan.value_bits)
    codes = unpack(op, pool["value_codes"], plan.value_bits, axis=4)

    def by_token(x: ir.Value, last: int) -> ir.Value:
        return op.Reshape(x, op.Concat([0, 0], pooled, [last], axis=0))

    step = op.Transpose(by_token(step, 1), perm=[0, 1, 3, 2])
    sums = op.MatMul(op.Mul(weights, step), by_token(codes, plan.value_head_dim))
    return op.Add(sums, op.MatMul(weights, by_token(zero, 1)))
