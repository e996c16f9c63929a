"""The last step of a compile: load the artifact in a fresh process and compare it with the source model.

An artifact passes or fails by the errors of its layers, each on its own and in float32 (see `layer_errors`). Two more
figures describe the output of the whole model. *Full precision*: the check text is given in one call. There, attention
sees K and V before they are quantized, so only folds, generated code and rounding make a difference. *Planned
precision*: the same text is given piece by piece, with a cache whose layers are all at their final bits.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import pmkvq_compiler.runtime as runtime
from pmkvq_compiler.calibrate.layer_outputs import LayerOutputs, layer_tensors, layers_of
from pmkvq_compiler.children import isolated
from pmkvq_compiler.divergence import divergences, relative_norm
from pmkvq_compiler.emit.artifact import save_tensors
from pmkvq_compiler.emit.fetched import load_anyhow
from pmkvq_compiler.emit.layer_errors import LayerError, layer_errors
from pmkvq_compiler.errors import CompileError, Defect

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""Largest relative norm of the logits' difference at full precision, by the dtype of the weights. It is used for models
whose layers cannot be compared one by one."""

LAYER_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2, "float16": 3e-3}
"""Largest error of a layer, by the dtype of the weights."""

PIECE = 64


def check_artifact(
    folder: Path,
    scratch: Path,
    dtype: str,
    rooms: Mapping[str, int],
    input_ids: Tensor,
    logits: Tensor,
    layers: LayerOutputs,
) -> dict[str, float]:
    """Compare the artifact in `folder`, whose weights are in `dtype`, with the source model; returns figures by name.

    The source model is given by its `logits` [N, V] for the last N tokens of `input_ids` [1, S], and by the outputs of
    its `layers` for the first tokens. The artifact runs on the first of the devices in `rooms`, which have so many
    bytes free. The two processes exchange files in `scratch`.

    Raises `CompileError` if the artifact does not load, or if one of its layers differs from the source's.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as place:  # a name that no process of a killed compile writes to
        reference, found = Path(place, "reference.safetensors"), Path(place, "figures.json")
        tensors = {"input_ids": input_ids, "logits": logits, **layer_tensors(layers)}
        save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, reference)
        files = folder, reference, found
        command = [sys.executable, "-m", "pmkvq_compiler.emit.check", json.dumps(rooms), *map(str, files)]
        with isolated():
            done = subprocess.run(
                command,
                cwd=place,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        if done.returncode != 0:
            raise _ended(done.returncode, done.stderr.decode(errors="replace"))
        measured = json.loads(found.read_text(encoding="utf-8"))
    figures: dict[str, float] = measured["figures"]
    errors, tolerance = [LayerError(*one) for one in measured["layers"]], LAYER_TOLERANCE[dtype]
    if not errors:
        errors = [LayerError("the logits", figures["full_precision_error"])]
        tolerance = TOLERANCE[dtype]
    for one in errors:
        if not one.error <= tolerance:
            raise CompileError(
                f"{one.place} differ from the source model's by {one.error:.1e} in relative norm, which is more than "
                f"{tolerance:.0e}, so the artifact is not kept; please report this model"
            )
    if not figures["planned_precision_kl"] < float("inf"):
        raise CompileError("the artifact's logits are not finite at the planned bits; choose a larger --budget")
    return {"largest_layer_error": max(one.error for one in errors), **figures}


def _ended(code: int, said: str) -> CompileError:
    """The error for a process that could not load the artifact. If this is a defect, the output of the process (`said`)
    becomes its cause, which is kept with the traceback."""
    if code < 0:
        return CompileError(
            f"the process that checks the artifact was ended by {signal.Signals(-code).name}, perhaps because memory "
            f"ran out; free some memory and compile again"
        )
    reason = (said.strip().splitlines() or ["it printed no reason"])[-1]
    defect = Defect(f"the artifact does not load in a fresh process ({reason})")
    defect.__cause__ = RuntimeError(said)
    return defect


def measure(model: runtime.CompiledModel, input_ids: Tensor, logits: Tensor) -> dict[str, float]:
    """Relative norms of the logits' difference at full and planned precision, and the mean KL (nats) at the latter."""
    length, count = input_ids.shape[1], logits.shape[0]
    last = torch.zeros(count, dtype=torch.long), torch.arange(length - count, length)
    none = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
    whole = model(input_ids, only=last).cpu()
    cache = model.new_cache(max_len=length)
    for layer in cache.layers:
        while layer.stage + 1 < len(layer.plan.stages):
            layer.lower()
    for start in range(0, length - count, PIECE):
        model(input_ids[:, start : min(start + PIECE, length - count)], cache, only=none)
    planned = model(input_ids[:, -count:], cache)[0].cpu()
    return {
        "full_precision_error": relative_norm(whole, logits),
        "planned_precision_error": relative_norm(planned, logits),
        "planned_precision_kl": divergences(planned, logits).mean().item(),
    }


if __name__ == "__main__":
    rooms, artifact, tensors, output = sys.argv[1:]
    reference = load_file(tensors)
    model = load_anyhow(artifact, json.loads(rooms))
    input_ids = reference["input_ids"]
    measured = {
        "figures": measure(model, input_ids, reference["logits"]),
        "layers": [astuple(one) for one in layer_errors(model, input_ids, layers_of(reference))],
    }
    Path(output).write_text(json.dumps(measured), encoding="utf-8")
