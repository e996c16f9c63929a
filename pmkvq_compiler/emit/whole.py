"""Keeps a multimodal model whole: beside the compiled language model, the artifact holds the other modules.

The artifact is then a checkpoint of the multimodal model, whose language model has folded weights. transformers and
vLLM load it with what turns images into embeddings; the artifact's own code takes the language model's tensors alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pmkvq_compiler.emit.artifact import METADATA
from pmkvq_compiler.emit.tensor_file import DTYPES, TensorSpec, write_tensors
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.passes.rename_tensors import RenameTensors
from pmkvq_compiler.runtime.weights import tensor_table
from pmkvq_compiler.source.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from pmkvq_compiler.source.multimodal import Whole
from pmkvq_compiler.source.source import Source

PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
"""Files that say how images, video and chats become input."""
CONFIG = "config.json"
FIRST_SHARD = "model-00001-of-00001.safetensors"


def check_whole(source: Source) -> None:
    """Raises `UsageError` if there is no multimodal model around `source`, or if it cannot be kept."""
    whole, reason = source.whole, None
    if whole is None:
        reason = "is no multimodal model"
    elif whole.architecture is None:
        reason = f"is a {whole.config.model_type}, which transformers does not load as a model of images and text"
    elif not source.has_plain_tensors:
        reason = "has a language model whose tensors transformers converts while it loads them"
    else:
        stored = {name: one.dtype for name, one in whole.others.tensors.items() if one.dtype not in DTYPES}
        reason = next((f"stores {name} in {dtype}, which is not copied" for name, dtype in stored.items()), None)
    if reason is not None:
        raise UsageError(f"{source.name} {reason}, so it cannot be kept whole; leave --whole out")


def rename(program: Program, whole: Whole, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    """Call the tensors of `program` as the whole model does. Returns `read` for the new names."""
    before = list(program.weights.values())
    run_passes(program, [RenameTensors(whole.beginnings)])
    names = dict(zip(program.weights.values(), before, strict=True))
    return lambda name: read(names[name])


def other_bytes(whole: Whole) -> int:
    """The bytes of the tensors that are kept beside the language model's."""
    return sum(one.bytes for one in _specs(whole.others))


def write_others(whole: Whole, folder: Path, sizes: dict[str, int]) -> tuple[list[str], list[Path]]:
    """Write the whole model's other tensors beside the files of its language model, and an index of all.

    `sizes` are the bytes of the language model's files. transformers reads `model.safetensors` and nothing beside it,
    so a file of this name is renamed. Returns the names of the language model's files, and the paths of the others and
    the index.
    """
    model = list(sizes)
    if model == [SINGLE_FILE]:
        (folder / SINGLE_FILE).rename(folder / FIRST_SHARD)
        model = [FIRST_SHARD]
    others = folder / "others.safetensors"
    write_tensors(others, _specs(whole.others), lambda one: whole.others.read(one.name), METADATA)
    files = {name: file for file in (*model, others.name) for name in tensor_table(folder / file)}
    index = {"metadata": {"total_size": sum(sizes.values()) + other_bytes(whole)}, "weight_map": files}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return model, [others, folder / INDEX_FILE]


def write_config(whole: Whole, dtype: torch.dtype, place: Path) -> None:
    """Write the whole model's config into the folder `place`, with the dtype of the language model's weights and a
    pointer to the compiled model, and copy the files of its processors that `place` lacks."""
    folder = whole.others.folder
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config.pop("transformers_weights", None)
    for part in (config, config.get("text_config", {})):
        part.pop("torch_dtype", None)
        part["dtype"] = str(dtype).removeprefix("torch.")
    config["auto_map"] = {"AutoModelForCausalLM": f"modeling_compiled.{whole.architecture}"}
    (place / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in PROCESSORS:
        if (folder / name).is_file() and not (place / name).exists():
            shutil.copyfile(folder / name, place / name)


def _specs(others: Checkpoint) -> list[TensorSpec]:
    return [TensorSpec(name, torch.Size(one.shape), DTYPES[one.dtype]) for name, one in others.tensors.items()]
