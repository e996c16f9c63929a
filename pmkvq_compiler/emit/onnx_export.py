"""Writes a program as an ONNX model, `model.onnx`, beside the checkpoint, whose files hold the weights.

The graph computes in float32. Its inputs are `input_ids` and `position_ids` [batch, sequence], and the state of each
layer as `past_key_values.<layer>.<name>`. Its outputs are `logits` [batch, sequence, vocab_size] and the new state as
`present.<layer>.<name>`.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
import torch.onnx.ops
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx import Interpreter
from torch.fx.node import map_aggregate

from pmkvq_compiler.emit.expressions import MODEL_DTYPE
from pmkvq_compiler.emit.onnx_attention import DOMAIN, OPSET, Attention, StateTensor, attention_function, state_tensors
from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.passes.bake_plan import layer_plans
from pmkvq_compiler.passes.ops import cached_attention
from pmkvq_compiler.passes.program import Program

FILE = "model.onnx"
INPUTS = ("input_ids", "position_ids")
PLACE = "Attention"
"""An op that takes the place of an attention until a call of its function does. Its attribute is the layer's index."""


def write_onnx(program: Program, folder: Path, weight_files: Iterable[str]) -> list[Path]:
    """Write `model.onnx` for an outlined `program` into `folder`; returns the files.

    The weights stay in `weight_files` of the same folder, to which the model refers. The metadata of the model holds
    the plan. Raises `CompileError` if ONNX cannot express an op of the program or its cache.
    """
    plan = program.plan
    assert plan is not None
    attentions = [
        Attention.of(site, layer, plan.max_len, plan.dtype)
        for site, layer in zip(program.cached_sites, layer_plans(program), strict=True)
    ]
    weights = {name: tensor for file in weight_files for name, tensor in external_tensors(folder, file).items()}
    model = _translated(_Traced(program, weights))
    initializers = model.graph.initializers
    for placeholder, name in program.weights.items():
        initializers[placeholder].const_value = weights[name]
        initializers[placeholder].name = name
    for placeholder, constant in program.constants.items():
        initializers[placeholder].name = constant.name
    _name_dimensions(model.graph)
    _call_functions(model, attentions)
    model.producer_name, model.producer_version = "pmkvq-compiler", version("pmkvq-compiler")
    model.metadata_props["pmkvq.plan"] = json.dumps(plan.to_json())
    ir.save(model, folder / FILE)
    onnx.checker.check_model(folder / FILE, full_check=True)
    return [folder / FILE]


def check_expressible(program: Program) -> None:
    """Raises `CompileError` if a captured program has an op that is known to have no equivalent in ONNX."""
    if program.states:
        raise CompileError(
            "the model has layers with a recurrent state (a short convolution or a linear recurrence), which this "
            "compiler does not write into ONNX models; compile it without --onnx"
        )
    if program.graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default):
        raise CompileError(
            "the model multiplies each token by the matrices of its experts (aten::_grouped_mm), for which ONNX has no "
            "operator; compile it without --onnx"
        )
    chunked = next((site for site in program.sites if site.chunked), None)
    if chunked is not None:
        raise CompileError(
            f"layer {chunked.layer} attends in chunks of {chunked.sliding_window} tokens, which the ONNX model cannot "
            f"do; compile it without --onnx"
        )
    reader = next((site for site in program.sites if site.reads is not None), None)
    if reader is not None:
        raise CompileError(
            f"layer {reader.layer} attends to the keys and values of layer {reader.reads}, which the ONNX model cannot "
            f"share between layers; compile it without --onnx"
        )


def external_tensors(folder: Path, file: str) -> dict[str, ir.ExternalTensor]:
    """References to the tensors in a safetensors file, by name.

    The file begins with eight bytes that hold the length of the header. The header is a JSON object with the dtype,
    shape and offsets of each tensor. Then comes the data (https://huggingface.co/docs/safetensors).
    """
    with (folder / file).open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
    header.pop("__metadata__", None)
    return {
        name: ir.ExternalTensor(
            file,
            offset=8 + size + entry["data_offsets"][0],
            length=entry["data_offsets"][1] - entry["data_offsets"][0],
            dtype=ir.DataType.from_short_name(entry["dtype"].lower()),
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=folder,
        )
        for name, entry in header.items()
    }


class _Traced(nn.Module):
    """The program as a module that computes in float32, has no weight data, and marks the place of each attention."""

    def __init__(self, program: Program, weights: dict[str, ir.ExternalTensor]) -> None:
        super().__init__()
        self.program = program
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        for placeholder, name in program.weights.items():
            dtype = ir.tensor_adapters.to_torch_dtype(weights[name].dtype)
            with self.mode:
                empty = torch.empty(weights[name].shape.numpy(), dtype=dtype)
            self.register_parameter(placeholder, nn.Parameter(empty, requires_grad=False))
        for placeholder, constant in program.constants.items():
            self.register_buffer(placeholder, constant.value)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        given: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "cache": None}
        arguments = []
        for node in self.program.graph.find_nodes(op="placeholder"):
            value = given[node.name] if node.name in given else getattr(self, node.name)
            is_weight = node.name in self.program.weights
            arguments.append(value.to(torch.float32) if is_weight else value)
        return _Interpreter(self.program.graph_module).run(*arguments)


class _Interpreter(Interpreter):
    """Runs a graph, which was captured in the model's dtype on the meta device, in float32 on the CPU."""

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _Interpreter(self.fetch_attr(target)).run(*args)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is cached_attention:
            query, key, value, _, layer = args
            if kwargs.get("key_rotation") is not None:
                query, key = (_rotated(x, kwargs["key_rotation"]) for x in (query, key))
            return _mark(query, key, value, layer, kwargs["sinks"])
        return super().call_function(target, map_aggregate(args, _placed), map_aggregate(kwargs, _placed))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """`rotate_heads`, with a matrix for each head: torch 2.11 cannot export its view of heads in groups."""
    each = rotation.repeat_interleave(x.shape[1] // len(rotation), 0)
    return torch.matmul(x.to(rotation.dtype), each).to(x.dtype)


def _mark(q: Tensor, k: Tensor, v: Tensor, layer: int, sinks: Tensor | None) -> Tensor:
    operands = [q, k, v] if sinks is None else [q, k, v, sinks]
    shape = (*q.shape[:3], v.shape[-1])
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{PLACE}", operands, {"layer": layer}, dtype=torch.float32, shape=shape)


def _placed(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    return torch.float32 if argument is MODEL_DTYPE else argument


def _translated(traced: _Traced) -> ir.Model:
    """The graph in ONNX's standard operators, with markers in place of attention. Its weights have no data yet."""
    sizes = {0: Dim("batch"), 1: Dim("sequence")}
    with traced.mode:
        examples = tuple(torch.zeros(2, 7, dtype=torch.long) for _ in INPUTS)
    try:
        with _silence():
            exported = torch.export.export(traced, examples, strict=False, dynamic_shapes=(sizes, sizes))
            program = torch.onnx.export(exported, opset_version=OPSET, optimize=False, verbose=False)
    except Exception as error:  # whatever the exporter raises for an op that it does not know
        raise CompileError(
            f"the model cannot be written as ONNX ({first_line(error)}); compile it without --onnx"
        ) from error
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # traces of this process, with the paths of its files
    return program.model


@contextmanager
def _silence() -> Iterator[None]:
    """Within, the exporter does not warn about packages that it does not need, nor log the trace of a failed op."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def _name_dimensions(graph: ir.Graph) -> None:
    """Name the sizes of `input_ids` "batch" and "sequence" wherever they occur, and the result "logits"."""
    names = dict(zip(map(str, graph.inputs[0].shape or ()), ("batch", "sequence"), strict=True))
    symbols = re.compile(rf"\b({'|'.join(names)})\b")
    values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(
                size if isinstance(size, int) else symbols.sub(lambda match: names[match[0]], str(size))
                for size in value.shape
            )
    graph.outputs[0].name = "logits"


def _call_functions(model: ir.Model, attentions: Sequence[Attention]) -> None:
    """Replace each marker by a call of its attention's function, and add the layer's state to inputs and outputs."""
    graph = model.graph
    functions: dict[Attention, ir.Function] = {}
    for place in [node for node in graph if node.domain == DOMAIN]:
        layer = place.attributes["layer"].as_int()
        attention = attentions[layer]
        if attention not in functions:
            name = f"CachedAttention_{len(functions) + 1}" if functions else "CachedAttention"
            functions[attention] = attention_function(name, attention)
        state = state_tensors(attention)
        past = [_state_value("past_key_values", layer, tensor, "past") for tensor in state]
        present = [_state_value("present", layer, tensor, "present") for tensor in state]
        (out,) = place.outputs
        attended = ir.Value(name=f"attended.{layer}", type=out.type, shape=out.shape)
        call = ir.Node(
            DOMAIN, functions[attention].name, [*place.inputs, *past], outputs=[attended, *present], name=attended.name
        )
        graph.insert_after(place, call)
        out.replace_all_uses_with(attended)
        graph.remove(place, safe=True)
        graph.inputs.extend(past)
        graph.outputs.extend(present)
    for function in functions.values():
        model.functions[function.identifier()] = function
    graph.opset_imports[DOMAIN] = 1


def _state_value(prefix: str, layer: int, tensor: StateTensor, when: str) -> ir.Value:
    """A layer's state as an input or output of the graph. The sizes that grow with the text get names of their own."""
    own = {"blocks": f"{when}_blocks_{layer}", "rows": f"{when}_rows_{layer}"}
    shape = ir.Shape(own.get(size, size) if isinstance(size, str) else size for size in tensor.shape)
    return ir.Value(name=f"{prefix}.{layer}.{tensor.name}", type=ir.TensorType(tensor.dtype), shape=shape)
