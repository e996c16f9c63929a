"""Finds the stored tensor for each tensor of a model, from names, shapes and dtypes, before any number is read."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PretrainedConfig

from pmkvq_compiler.errors import CompileError, first_line
from pmkvq_compiler.source.checkpoint import PLAIN, Checkpoint, StoredTensor

MOST_BUFFER_BYTES = 1 << 32


def model_class(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """transformers' class for the model, and the config that it takes, which may be the text part of `config`."""
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text = config.get_text_config()
    return found, text if found.config_class is type(text) else config


def skeleton(name: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of the model called `name`, without memory; tied tensors are the same object.

    Raises `CompileError` if no model can be built from the config.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # whatever the code of an architecture may raise
        raise CompileError(
            f"no model of type {config.model_type} can be built from the config of {name}: {first_line(error)}; "
            f"correct it or choose another model"
        ) from error
    if sum(buffer.nbytes for buffer in model.buffers()) > MOST_BUFFER_BYTES:
        raise CompileError(
            f"the config of {name} asks for buffers of more than {MOST_BUFFER_BYTES >> 30} GiB besides the weights, "
            f"which happens with too many positions; correct max_position_embeddings"
        )
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    return state


def stored_names(name: str, config: PretrainedConfig, checkpoint: Checkpoint) -> dict[str, str] | None:
    """The checkpoint's name of each tensor of the model called `name`. None if the checkpoint stores some tensors in
    another form than the model's, so that transformers has to convert them.

    Tied tensors are one tensor in the model and may be stored under any of their names. If they are stored with
    different numbers, they are not tied, as in transformers; then `config` is changed to say so. Raises `CompileError`
    for weights that are stored as codes, and for a config that does not belong to this checkpoint.
    """
    state = skeleton(name, config)
    if _untied(state, checkpoint):
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        state = skeleton(name, config)
    tensors = checkpoint.tensors
    _check_counts(name, state, tensors)
    _check_layers(name, state, tensors, model_class(config)[0]._keys_to_ignore_on_load_unexpected or ())
    by_object = {id(value): own for own, value in state.items() if own in tensors}
    names = {own: own if own in tensors else by_object.get(id(value)) for own, value in state.items()}
    _check_plain(tensors, set(names.values()))
    found = {own: stored for own, stored in names.items() if stored is not None}
    if len(found) < len(names) or any(tensors[stored].shape != state[own].shape for own, stored in found.items()):
        return None
    return found


def _untied(state: dict[str, Tensor], checkpoint: Checkpoint) -> bool:
    """Whether tensors that the config ties are stored with different numbers."""
    first: dict[int, str] = {}
    for name, value in state.items():
        if name in checkpoint.tensors:
            other = first.setdefault(id(value), name)
            if other != name and not torch.equal(checkpoint.read(name), checkpoint.read(other)):
                return True
    return False


def _check_counts(name: str, state: dict[str, Tensor], tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse a config that asks for far more numbers than are stored, because creating them could take all memory."""
    asked = sum({id(value): value.numel() for value in state.values()}.values())
    held = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    if asked > 2 * held:
        raise CompileError(
            f"the config of {name} asks for {asked:,} weights, but its checkpoint holds {held:,}; fetch config.json "
            f"and the weights again"
        )


def _check_layers(name: str, state: Collection[str], tensors: Collection[str], ignored: Collection[str]) -> None:
    """Refuse a config with fewer layers than are stored, not counting layers that transformers ignores by name."""
    patterns = {_layer_pattern(own) for own in state}
    for stored in set(tensors) - set(state):
        pattern = _layer_pattern(stored)
        if pattern != stored and pattern in patterns and not any(re.search(one, stored) for one in ignored):
            raise CompileError(
                f"the checkpoint of {name} holds {stored}, a layer that its config leaves out; correct "
                f"num_hidden_layers in config.json"
            )


def _layer_pattern(name: str) -> str:
    """A tensor's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name, count=1)


def _check_plain(tensors: Mapping[str, StoredTensor], wanted: Collection[str | None]) -> None:
    """Refuse weights whose stored numbers are codes. Integer tensors that the model does not use may stay."""
    for name, tensor in tensors.items():
        taken = name in wanted or tensor.dtype.startswith("F") or name.endswith("weight")
        if taken and tensor.dtype not in PLAIN:
            raise CompileError(
                f"weight {name} is stored in {tensor.dtype}, whose numbers mean nothing without the scales of its "
                f"quantization; compile the full-precision checkpoint"
            )
