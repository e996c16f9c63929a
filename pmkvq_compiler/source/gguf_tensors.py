"""Compares the tensors of a GGUF file with those of the model that its header describes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.gguf_header import GgufHeader

ROPE_FREQUENCIES = "rope_freqs.weight"
"""The tensor that RoPE's frequencies are divided by. The configuration has the same information."""

LARGEST_IN_FLOAT32 = 10**9
"""With more numbers than this, a model is stored in 16 bits unless the user chooses otherwise."""

EXPERTS = re.compile(r"blk\.\d+\.ffn_(gate|up)_exps\.weight")
"""Tensors that are joined while loading. No tensor of the model has their names."""


def check_tensors(path: Path, header: GgufHeader, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises `CompileError` if the file lacks one of the model's tensors or has a tensor that the model does not use.

    `shapes` has the shape of each tensor by the model's own names.
    """
    architecture = header.fields["general.architecture"]
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, _layer_count(header))
    expected: dict[str, Sequence[int]] = {}
    for name, shape in shapes.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is not None:
            expected[stored if stored.endswith((".weight", ".bias")) else f"{stored}.weight"] = shape
    for name, shape in expected.items():
        stored_shape = header.tensors[name].shape if name in header.tensors else None
        if name == "output.weight" and stored_shape is None:
            continue
        forms = {tuple(shape), tuple(shape)[shape[0] == 1 :]}  # one row may be stored as a vector
        if architecture == "gpt2":
            forms.add(tuple(shape)[::-1])
        if stored_shape not in forms:
            held = "is missing" if stored_shape is None else f"has shape {list(stored_shape)}"
            raise CompileError(
                f"{path} cannot be compiled: tensor {name} {held}, but the header asks for {list(shape)}; "
                f"fetch the file again"
            )
    more = [name for name in header.tensors if name not in expected and not EXPERTS.fullmatch(name)]
    more = [name for name in more if name != ROPE_FREQUENCIES]
    if more:
        raise CompileError(
            f"{path} cannot be compiled as it is: its architecture {architecture} takes no tensor {more[0]}, which "
            f"would be left out; compile the model's safetensors checkpoint instead"
        )


def default_dtype(header: GgufHeader) -> torch.dtype:
    """The dtype that `auto` stands for: float32 for small models and for those whose weights are stored in float32, and
    bfloat16 for all others, which would take twice the memory for digits that were never stored."""
    counts: Counter[bool] = Counter()
    for tensor in header.tensors.values():
        counts[tensor.type == GGMLQuantizationType.F32] += math.prod(tensor.shape)
    small = counts.total() <= LARGEST_IN_FLOAT32
    return torch.float32 if small or counts[True] > counts[False] else torch.bfloat16


def _layer_count(header: GgufHeader) -> int:
    return int(header.fields[f"{header.fields['general.architecture']}.block_count"])
