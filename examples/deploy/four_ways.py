"""Continue a text in four ways and compare: the runtime, transformers, the installed wheel and onnxruntime.

    pmkvq-compile demo --recipe uniform --bits 4 --budget 40% --max-len 4096 --onnx -o out/four
    python examples/deploy/four_ways.py out/four

The first three run the same code. onnxruntime has kernels of its own and uses the final bits from the start, so it is
compared with the runtime at those bits. The wheel is built with hatchling.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from pmkvq_compiler import runtime

sys.path.append(str(Path(__file__).parents[1] / "onnx"))
from onnx_generate import OnnxDecoder

CHUNK = 512
"""Tokens of a prompt that are read at once, in each of the four ways."""

IN_THE_WHEEL = """
import json, sys, {package}, torch
ids, new_tokens = json.load(sys.stdin)
torch.set_num_threads({threads})
print(json.dumps({package}.load().generate(torch.tensor([ids]), new_tokens, eos_token_id=())[0, len(ids) :].tolist()))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that pmkvq-compile --onnx wrote")
    parser.add_argument("--prompt-tokens", type=int, default=600, help="length of the prompt, from held-out text")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(arguments.artifact / "tokenizer.json"))
    text = files("pmkvq_compiler").joinpath("data/heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False).ids[: arguments.prompt_tokens]])
    texts = same_code(arguments.artifact, ids, arguments.max_new_tokens)
    expected = texts["runtime.load"]
    print(tokenizer.decode(expected) + "\n")
    for name, tokens in texts.items():
        print(f"{name:<22} {_agreement(tokens, expected)}")
    tokens, reference, error = with_onnxruntime(arguments.artifact, ids, arguments.max_new_tokens)
    print(f"{'onnxruntime':<22} {_agreement(tokens, reference)}; logits differ by {error:.1e} in relative norm")
    return int(any(tokens != expected for tokens in texts.values()) or error > 1e-3)


def same_code(artifact: Path, ids: Tensor, new_tokens: int) -> dict[str, list[int]]:
    """The tokens that follow `ids` [1, S] in each of the three ways that run the same code."""
    start = ids.shape[1]
    compiled = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True)
    options = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
    return {
        "runtime.load": runtime.load(artifact).generate(ids, new_tokens, eos_token_id=())[0, start:].tolist(),
        "AutoModelForCausalLM": compiled.generate(ids, **options)[0, start:].tolist(),
        "installed wheel": with_wheel(artifact, ids, new_tokens),
    }


def with_wheel(artifact: Path, ids: Tensor, new_tokens: int) -> list[int]:
    """The tokens from a process that sees the artifact as an installed wheel."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    package = json.loads((artifact / "pmkvq.json").read_text(encoding="utf-8"))["package"]
    with tempfile.TemporaryDirectory() as folder:
        build = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, str(artifact.absolute())]
        subprocess.run(build, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        subprocess.run([*pip, "install", "-q", "--no-deps", "--target", f"{folder}/site", wheel], check=True)
        done = subprocess.run(
            [sys.executable, "-c", IN_THE_WHEEL.format(package=package, threads=torch.get_num_threads())],
            input=json.dumps([ids[0].tolist(), new_tokens]),
            capture_output=True,
            text=True,
            check=True,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": f"{folder}/site"},
        )
    tokens: list[int] = json.loads(done.stdout)
    return tokens


def with_onnxruntime(artifact: Path, ids: Tensor, new_tokens: int) -> tuple[list[int], list[int], float]:
    """The tokens of onnxruntime, those of the runtime at final bits, and the difference of their logits in relative
    norm, up to and including the first step at which the two choose different tokens."""
    decoder = OnnxDecoder(artifact / "model.onnx", threads=torch.get_num_threads())
    model, cache = as_in_onnx(artifact)
    found = _greedy(lambda piece: torch.from_numpy(decoder(piece.numpy())), ids, new_tokens)
    expected = _greedy(lambda piece: model(piece, cache), ids, new_tokens)
    chosen, reference = found.argmax(-1), expected.argmax(-1)
    same = int((chosen == reference).int().cumprod(0).sum())
    seen, error = slice(0, same + 1), found - expected
    return chosen.tolist(), reference.tolist(), float(error[seen].norm() / expected[seen].norm())


def as_in_onnx(artifact: Path, batch_size: int = 1) -> tuple[runtime.CompiledModel, runtime.Cache]:
    """The artifact and a cache that compute as `model.onnx` does: in float32, with a 16-bit model's rows in float16 and
    final bits from the start. Each sequence has the bytes of the whole plan."""
    model = runtime.load(artifact, dtype="float32")
    layers = tuple(
        dataclasses.replace(layer, stages=layer.stages[-1:], arena_bytes=batch_size * layer.arena_bytes)
        for layer in model.plan.layers
    )
    plan = dataclasses.replace(model.plan, layers=layers)
    rows = torch.float32 if plan.dtype == "float32" else torch.float16
    return model, runtime.Cache(plan, batch_size, None, rows, model.device)


def _greedy(step: Callable[[Tensor], Tensor], ids: Tensor, new_tokens: int) -> Tensor:
    """The logits [N, V] that the tokens after `ids` [1, S] are chosen from."""
    *_, last = (step(piece) for piece in ids.split(CHUNK, dim=1))
    logits = [last[0, -1]]
    for _ in range(new_tokens - 1):
        logits.append(step(logits[-1].argmax().view(1, 1))[0, -1])
    return torch.stack(logits)


def _agreement(tokens: list[int], expected: list[int]) -> str:
    same = int(np.cumprod(np.equal(tokens, expected)).sum())
    return f"all {same} tokens are the runtime's" if same == len(expected) else f"token {same + 1} differs"


if __name__ == "__main__":
    sys.exit(main())
