"""Captures the model of a configuration as one FX graph, without weights, with a marker in place of each attention and
of each other op that carries a state from token to token."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.passes.locate_attention import cache_owners
from pmkvq_compiler.passes.ops import MARKER
from pmkvq_compiler.passes.program import WRAPPER, Constant, Program
from pmkvq_compiler.source.masks import Sight, sight_of
from pmkvq_compiler.source.positions import counted_positions, take_positions_from_input
from pmkvq_compiler.source.rope import fix_frequencies
from pmkvq_compiler.source.state_functions import has_state_functions, state_markers
from pmkvq_compiler.source.token_mixing import check_mixing, number_states

IMPLEMENTATION = "pmkvq"
INPUTS = ("input_ids", "position_ids")
HEAD_DIM_MULTIPLE = 8
ATTENTION_LAYERS = frozenset(
    {"full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_sliding"}
)
STATE_LAYERS = frozenset({"linear_attention", "conv", "mamba", "mamba2", "hybrid", "hybrid_sliding"})
OTHER_LAYERS = frozenset({"mlp", "moe"})
"""The types of layers, by transformers' names for them, with attention, with another state, and with neither."""
KNOWN = "causal, sliding-window or chunked attention, short convolutions, gated delta rule or Mamba"
POSITIONS_TRIED = 1 << 20
"""The most positions at which an attention mask is compared with a plain sliding window."""


def capture(config: PretrainedConfig) -> Program:
    """The graph `(input_ids [B, S], position_ids [B, S]) -> logits [B, S, V]` of the causal language model of `config`.

    RoPE frequencies that change with the length of the text are those of short texts (see `rope`).

    The model is captured in bfloat16, whatever dtype its weights are stored in. So a cast to the model's own dtype and
    a cast to float32 look different in the graph. Buffers have the values and dtypes that they have in a float32 model.

    Raises `CompileError` if the architecture is not a causal language model, cannot be exported, or attends in a way
    that the marker cannot express.
    """
    _check_config(config)
    model = _empty_model(config)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    recorder = _AttentionRecorder()
    exported = _export(model.to("meta"), recorder)  # type: ignore[arg-type]
    program = _to_program(exported, model, buffers)
    program.states = number_states(program.graph, config.model_type)
    take_positions_from_input(program.graph)
    _check_graph(program, config)
    _set_windows(program.graph, recorder, config)
    _check_shared(program.graph, config)
    return program


def _check_config(config: PretrainedConfig) -> None:
    """Refuse models that the configuration already rules out: a failed capture would give a less clear reason."""
    if config.is_encoder_decoder:
        raise CompileError(f"{config.model_type} is an encoder-decoder model; only decoder-only models can be compiled")
    others = sorted(set(_layer_types(config)) - ATTENTION_LAYERS - STATE_LAYERS - OTHER_LAYERS)
    if others:
        raise CompileError(
            f"{config.model_type} has layers of type {', '.join(others)}, which keep another state than the cache can "
            f"hold; choose a model whose layers are {KNOWN}"
        )


def _layer_types(config: PretrainedConfig) -> tuple[str, ...]:
    """The types of the model's layers by transformers' names for them; empty if the configuration names none."""
    text = config.get_text_config()
    return tuple((getattr(text, "layer_types", None) or ())[: text.num_hidden_layers])


def _empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model with bfloat16 parameters on the meta device, and buffers that hold the values of a float32 model."""
    _AttentionRecorder().register()  # transformers builds a model only with an implementation that is registered
    try:
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config),
                attn_implementation=IMPLEMENTATION,
                dtype=torch.float32,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever the code of an architecture may raise
        if IMPLEMENTATION in str(error):
            raise CompileError(
                f"{config.model_type} does not route its attention through transformers' AttentionInterface; choose "
                f"another model"
            ) from error
        raise CompileError(
            f"{config.model_type} cannot be built as a causal language model: {_brief(error)}; choose another model"
        ) from error
    if (model._is_stateful or STATE_LAYERS & {*_layer_types(config)}) and not has_state_functions(model):
        raise CompileError(
            f"{config.model_type} carries a recurrent state from token to token that the cache cannot hold; choose a "
            f"model whose layers are {KNOWN}"
        )
    fix_frequencies(model)
    model.tie_weights()
    kept = set(model._keep_in_fp32_modules_strict or ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(torch.bfloat16)
    return model.eval()


class _AttentionRecorder:
    """The attention function of one capture. It leaves markers, and remembers the mask of each layer.

    transformers describes a mask as a function of positions. Here, the mask tensor that the model passes around is only
    a key by which that function is found again, also from a view of it.
    """

    IGNORED = frozenset({"dropout", "position_ids", "use_cache", "output_attentions", "sliding_window"})
    """Arguments that add no information to q, k, v and the mask."""

    def __init__(self) -> None:
        self.masks: dict[int, tuple[Tensor, Callable[..., Tensor]]] = {}
        self.mask_of_layer: dict[int, Callable[..., Tensor] | None] = {}

    def register(self) -> None:
        AttentionInterface.register(IMPLEMENTATION, self.attend)
        AttentionMaskInterface.register(IMPLEMENTATION, self.make_mask)

    def make_mask(self, *, mask_function: Callable[..., Tensor], device: torch.device, **_: Any) -> Tensor:
        token = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.masks[_memory(token)] = token, mask_function
        return token

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        layer = module.layer_idx
        if not isinstance(layer, int) or layer < 0:
            raise CompileError(
                f"the module {type(module).__name__} computes the attention of several layers, whose caches cannot be "
                f"told apart; choose another model"
            )
        unknown = sorted(
            name for name, value in others.items() if name not in self.IGNORED and value not in (None, False)
        )
        if unknown:
            raise CompileError(
                f"the attention of layer {layer} takes {', '.join(unknown)}, which the cache cannot represent; choose "
                f"another model"
            )
        known = None if attention_mask is None else self.masks.get(_memory(attention_mask))
        self.mask_of_layer[layer] = None if known is None else known[1]
        scale = q.shape[-1] ** -0.5 if scaling is None else float(scaling)
        out = MARKER(q, k, v, s_aux, scale, layer, 0, float(softcap or 0))
        return out.transpose(1, 2).contiguous(), None


def _memory(tensor: Tensor) -> int:
    """What identifies the memory of a tensor; its views have the same."""
    return tensor.untyped_storage()._cdata


class _NumbersAsOps(TorchFunctionMode):
    """Within, a tensor that is made of one number on the meta device is an op of the graph and not a constant, which
    would have lost the number."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and isinstance(args[0], (int, float)) and str(kwargs.get("device")) == "meta":
            return torch.full((), args[0], **kwargs)
        return func(*args, **kwargs)


class _LanguageModel(nn.Module):
    """The function from inputs to logits. A mask of ones keeps transformers from looking for packed sequences."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        ones = torch.ones_like(input_ids)
        with _NumbersAsOps():
            return self.model(
                input_ids=input_ids, position_ids=position_ids, attention_mask=ones, use_cache=False
            ).logits


def _export(model: PreTrainedModel, recorder: _AttentionRecorder) -> ExportedProgram:
    recorder.register()
    batch, sequence = Dim("batch"), Dim("sequence")
    shape = {0: batch, 1: sequence}
    # A size of 1 would become a constant of the graph, and one tensor given twice would become one input.
    examples = tuple(torch.zeros(2, 7, dtype=torch.long, device="meta") for _ in INPUTS)
    try:
        with torch.no_grad(), state_markers(model):
            return torch.export.export(_LanguageModel(model), examples, strict=False, dynamic_shapes=(shape, shape))
    except CompileError:
        raise
    except Exception as error:  # whatever the code of an architecture may raise
        torchs = type(error).__module__.startswith("torch")  # such messages are written for developers of PyTorch
        reason = "its control flow depends on the tokens or on their number" if torchs else _brief(error)
        raise CompileError(
            f"{model.config.model_type} cannot be captured as one graph by torch.export: {reason}; choose another "
            f"architecture"
        ) from error


def _to_program(exported: ExportedProgram, model: PreTrainedModel, buffers: dict[str, Tensor]) -> Program:
    """A plain graph with readable placeholders: first the inputs, then each weight and constant that is used, once."""
    state = model.state_dict(keep_vars=True)
    owner: dict[int, str] = {}
    for name, tensor in state.items():
        owner.setdefault(id(tensor), name)
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    graph, weights, constants = Graph(), {}, {}
    placeholders: dict[str, Node] = {}
    copies: dict[Node, Node] = {}
    for node in sorted(exported.graph.find_nodes(op="placeholder"), key=lambda node: node.name not in INPUTS):
        if not node.users and node.name not in INPUTS:
            continue
        target = specs[node.name].target
        name = node.name if target is None else target.removeprefix(WRAPPER)
        if name in state:
            name = owner[id(state[name])]
        if name not in placeholders:
            placeholder = placeholders[name] = graph.placeholder(name.replace(".", "_"))
            placeholder.meta["val"] = node.meta["val"]
            if name in state:
                weights[placeholder.name] = name
            elif target is not None:
                constants[placeholder.name] = Constant(
                    name, buffers[name] if name in buffers else _literal(exported, target)
                )
        copies[node] = placeholders[name]
    for node in exported.graph.nodes:
        if node.op == "output":
            (logits,) = node.args[0]
            graph.output(copies[logits]).meta["val"] = logits.meta["val"]
        elif node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return Program(GraphModule(nn.Module(), graph), weights, constants)


def _literal(exported: ExportedProgram, name: str) -> Tensor:
    """The value of a constant tensor that the model's code creates while it runs."""
    value = exported.constants[name]
    if value.is_meta or value.dtype == torch.bfloat16:
        raise CompileError(
            f"the model creates the constant {name} while it runs, and the capture cannot know its exact value; choose "
            f"another model"
        )
    return value


def _check_graph(program: Program, config: PretrainedConfig) -> None:
    """Refuse graphs that cannot work over a cache, because they mix tokens outside of attention and of known states, or
    do not take their positions from `position_ids`."""
    model_type, graph = config.model_type, program.graph
    markers = graph.find_nodes(op="call_function", target=MARKER)
    _check_layers(program, [marker.args[5] for marker in markers], config)
    for marker in markers:
        for name, tensor in zip(("query and key", "value"), (marker.args[1], marker.args[2]), strict=True):
            head_dim = tensor.meta["val"].shape[-1]
            if head_dim % HEAD_DIM_MULTIPLE:
                raise CompileError(
                    f"layer {marker.args[5]} has {name} heads of {head_dim} channels, which is not a multiple of "
                    f"{HEAD_DIM_MULTIPLE}, so its codes cannot be packed; choose another model"
                )
    check_mixing(graph, model_type, markers[0].meta["val"].shape[2])
    for node in counted_positions(graph):
        raise CompileError(
            f"{model_type} counts positions itself ({node.name}) instead of taking position_ids, so it cannot "
            f"continue from a cache; choose another model"
        )


def _check_layers(program: Program, layers: list[int], config: PretrainedConfig) -> None:
    """Refuse graphs in which a layer with attention or with another state, by the configuration, has no marker."""
    model_type, types = config.model_type, dict(enumerate(_layer_types(config)))
    count = config.get_text_config().num_hidden_layers
    attending = [layer for layer, kind in types.items() if kind in ATTENTION_LAYERS] if types else [*range(count)]
    if len(set(layers)) < len(layers):
        raise CompileError(
            f"{model_type} computes attention {len(layers)} times in {len(attending)} layers, but the cache keeps the "
            f"keys and values of one attention in each layer; choose another architecture"
        )
    if not attending:
        raise CompileError(
            f"{model_type} has no layer with attention, so it has no KV cache to quantize; choose a model that has one"
        )
    if layers != attending:
        raise CompileError(
            f"{model_type} has {len(attending)} layers, but only {len(layers)} of them (layers {layers}) route their "
            f"attention through transformers' AttentionInterface; choose a model in which all layers do"
        )
    known = {state.layer for state in program.states}
    for layer, kind in types.items():
        if kind in STATE_LAYERS and layer not in known:
            raise CompileError(
                f"layer {layer} of {model_type} is of type {kind}, but carries its state through functions that this "
                f"compiler does not know; choose another model"
            )


def _set_windows(graph: Graph, recorder: _AttentionRecorder, config: PretrainedConfig) -> None:
    """Write into each marker what its layer's mask lets a query see."""
    text = config.get_text_config()
    positions = min(getattr(text, "max_position_embeddings", None) or 1 << 17, POSITIONS_TRIED)
    chunk = getattr(text, "attention_chunk_size", None)
    sights: dict[int, Sight] = {}
    for marker in graph.find_nodes(op="call_function", target=MARKER):
        layer = marker.args[5]
        mask = recorder.mask_of_layer[layer]
        if id(mask) not in sights:
            try:
                sights[id(mask)] = sight_of(mask, positions, chunk)
            except Exception as error:  # a mask function may need anything
                reason = str(error) if isinstance(error, ValueError) else "it depends on more than positions"
                raise CompileError(
                    f"the attention mask of layer {layer} of {config.model_type} is neither causal nor a sliding "
                    f"window, so the cache cannot represent it: {reason}; choose another model"
                ) from error
        marker.update_arg(6, sights[id(mask)].window)
        if sights[id(mask)].chunked:
            marker.update_kwarg("chunked", True)


def _check_shared(graph: Graph, config: PretrainedConfig) -> None:
    """Refuse layers that share keys and values but do not attend to them in the same way: one set of kernels serves all
    layers that read a cache."""
    owners = cache_owners(graph.find_nodes(op="call_function", target=MARKER))
    for marker, owner in owners.items():
        if marker.args[0].meta["val"].shape != owner.args[0].meta["val"].shape or _manner(marker) != _manner(owner):
            raise CompileError(
                f"layer {marker.args[5]} of {config.model_type} attends to the keys and values of layer "
                f"{owner.args[5]} with other heads, another sliding window or another soft cap, and one cache cannot "
                f"serve both; choose another model"
            )


def _manner(marker: Node) -> tuple[Any, ...]:
    _, _, _, sinks, _, _, window, softcap = marker.args
    return window, marker.kwargs.get("chunked", False), softcap, sinks is not None


def _brief(error: Exception) -> str:
    """The type and first line of an error, to be quoted within a sentence."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:300]}"
