"""What a compile takes: seconds of each step, and the memory of the GPU and of the host, for models of known shapes.

    python examples/benchmarks/scale.py --shapes qwen2.5-1.5b,qwen2.5-7b
    python examples/benchmarks/scale.py --shapes llama3-70b --layers 2,4 --memory 16GiB  # parts of the model, streamed
    python examples/benchmarks/scale.py --shapes qwen2.5-7b --trained 60
    python examples/benchmarks/scale.py --shapes tiny --device cpu                     # a trial of the script

The models have the shapes of the named ones, random weights in bfloat16, and no tokenizer; the calibration texts are
random tokens, 8 of 2,048 unless told otherwise. With `--trained`, each model is trained first, as `trained.py` says,
and the texts are real ones. Weights are written to `--disk` and removed at the end. Every compile runs in a process of
its own. `host` is the largest resident memory of that process, and `check` that of it together with the process which
loads the artifact and checks it; both count the pages of files that are mapped. `gpu` is the largest memory of a GPU
that tensors of the one process took, or that both processes took during the check.

With `--layers` each model has only so many layers. Where two numbers are given, another row extrapolates the seconds of
the whole model: for each step a line through both, and none that falls. With `--memory`, no more of each device's
memory is used. A part of a model is spread over several GPUs, or read layer by layer, where the whole model would be.

Writes DIR/scale.csv and scale.md.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from torch import Tensor
from trained import byte_ids, trained
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from pmkvq_compiler.budget import parse_budget
from pmkvq_compiler.calibrate import opened
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.emit.tensor_file import TensorSpec, write_tensors
from pmkvq_compiler.options import CompileOptions

SHARD_BYTES = 4 * 10**9


def shape(
    kind: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv: int, tied: bool
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 131072,
    }


SHAPES = {
    "tiny": shape("qwen2", 512, 128, 256, 4, 4, 2, True),
    "qwen2.5-0.5b": shape("qwen2", 151936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": shape("qwen2", 151936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": shape("qwen2", 152064, 3584, 18944, 28, 28, 4, False),
    "qwen2.5-32b": shape("qwen2", 152064, 5120, 27648, 64, 40, 8, False),
    "llama3-70b": shape("llama", 128256, 8192, 28672, 80, 64, 8, False),
}


def config_of(name: str, layers: int | None) -> PretrainedConfig:
    values = dict(SHAPES[name])
    if layers is not None:
        values["num_hidden_layers"] = layers
    return AutoConfig.for_model(values.pop("model_type"), dtype="bfloat16", **values)


def write_model(config: PretrainedConfig, folder: Path, weight: Callable[[TensorSpec], Tensor]) -> None:
    """Write a checkpoint whose weights `weight` returns, on any device, in shards with an index."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder.mkdir(parents=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    specs = [TensorSpec(name, value.shape, torch.bfloat16) for name, value in model.named_parameters()]
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(one.bytes for one in shards[-1]) + spec.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(spec)
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(folder / name, shard, lambda spec: weight(spec).cpu(), {"format": "pt"})
    places = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def drawn(spec: TensorSpec, device: str) -> Tensor:
    weight = torch.empty(spec.shape, dtype=spec.dtype, device=device)
    return weight.fill_(1) if "norm" in spec.name else weight.normal_(std=0.02)


def write_inputs(config: PretrainedConfig, place: Path, device: str, arguments: argparse.Namespace) -> None:
    """Write a model and the texts to calibrate it on into the folder `place`."""
    size = arguments.texts, arguments.text_len
    if arguments.trained is None:
        write_model(config, place / "model", lambda spec: drawn(spec, device))
        ids = torch.randint(3, config.vocab_size, size)
    else:
        weights = trained(config, arguments.trained, device).state_dict()
        write_model(config, place / "model", lambda spec: weights[spec.name])
        ids = byte_ids("heldout")[: math.prod(size)].view(size)
    (place / "texts.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in ids.tolist()))


def compile_once(arguments: argparse.Namespace) -> None:
    """Compile the model in `--model` and print the figures as JSON; `main` starts a process for this."""
    folder = Path(arguments.model)
    limit_memory(None if arguments.memory is None else parse_budget(arguments.memory, 0), arguments.share)
    options = CompileOptions(
        model=str(folder),
        output=folder.parent / "artifact",
        budget="20%",
        max_len=arguments.max_len,
        calib=str(folder.parent / "texts.jsonl"),
        calib_samples=arguments.texts,
        calib_len=arguments.text_len,
        device=arguments.device,
    )
    with watched_check() as checking:
        result = compile_model(options, lambda step, done, total: None)
    if arguments.keep is not None:
        arguments.keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(folder.parent / "artifact", arguments.keep)
    gpus = [torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())]
    found = {
        "seconds": result.report.seconds,
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "check": checking.host,
        "gpu": max(checking.gpu, *gpus, 0),
        "spread": sum(gpu > 1 << 20 for gpu in gpus),
    }
    print(json.dumps(found))


@dataclass
class Noted:
    """The largest memory while an artifact was checked, in bytes: resident of both processes, and in use of a GPU."""

    host: int = 0
    gpu: int = 0


@contextmanager
def watched_check() -> Iterator[Noted]:
    """Within, the process that checks the artifact is looked at every 50 ms.

    The system's own count for children begins with the memory of this process, which they are copies of at first.
    """
    noted, ended = Noted(), threading.Event()

    def watch() -> None:
        own = psutil.Process()
        while not ended.wait(0.05):
            with suppress(psutil.Error):
                for child in own.children():
                    if "pmkvq_compiler.emit.check" in child.cmdline():
                        noted.host = max(noted.host, own.memory_info().rss + child.memory_info().rss)
                        noted.gpu = max(noted.gpu, *map(used_bytes, range(torch.cuda.device_count())), 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield noted
    finally:
        ended.set()
        watcher.join()


def used_bytes(index: int) -> int:
    free, total = torch.cuda.mem_get_info(index)
    return total - free


def limit_memory(limit: int | None, share: float) -> None:
    """Use no more than `limit` bytes of each GPU; on the CPU, only say that no more is free.

    Say that only a `share` of this is free, if the model stands for a whole one of which it needs this share.
    """
    free = opened.free_bytes
    if limit is not None:
        for index in range(torch.cuda.device_count()):
            torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info(index)[1], index)
    opened.free_bytes = lambda device: int(share * (free(device) if limit is None else min(free(device), limit)))


def measured(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a shape: those measured, and an extrapolated one if two parts of it were measured."""
    whole: int = SHAPES[name]["num_hidden_layers"]
    counts = [whole] if arguments.layers is None else [int(count) for count in arguments.layers.split(",")]
    rows = [measured_once(name, count, arguments) for count in counts]
    if None in rows or len(rows) != 2:
        return [row for row in rows if row is not None]
    one, other = rows

    def at_whole(step: str) -> float:
        slope = max(0.0, (other[step] - one[step]) / (other["layers"] - one["layers"]))
        return float(other[step] + slope * (whole - other["layers"]))

    scaled = {step: at_whole(step) for step in STEPS}
    scaled |= {"total": sum(scaled.values())}
    return [one, other, other | scaled | {"layers": whole, "device": f"{other['device']}, extrapolated"}]


def measured_once(name: str, layers: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    config = config_of(name, layers)
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(dir=arguments.disk) as place:
        write_inputs(config, Path(place), device, arguments)
        if device != "cpu":
            gc.collect()  # a model refers to itself
            torch.cuda.empty_cache()
        command = [sys.executable, __file__, "--model", str(Path(place, "model")), "--device", arguments.device]
        command += ["--max-len", str(arguments.max_len), "--texts", str(arguments.texts)]
        command += ["--text-len", str(arguments.text_len)]
        command += [] if arguments.keep is None else ["--keep", str(arguments.keep / f"{name}-{layers}")]
        command += [] if arguments.memory is None else ["--memory", arguments.memory]
        whole = needed_bytes(config_of(name, None), device, arguments.text_len)
        command += ["--share", str(needed_bytes(config, device, arguments.text_len) / whole)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            print(f"{name}: the compile failed", flush=True)
            return None
        found = json.loads(done.stdout.splitlines()[-1])
    row = {"model": name, "layers": layers, "device": device_name(device)}
    row["device"] = f"{found['spread']} x {row['device']}" if found["spread"] > 1 else row["device"]
    row["device"] += "" if arguments.memory is None else f", {arguments.memory}"
    row |= {step: found["seconds"].get(step, 0.0) for step in STEPS}
    row |= {"total": sum(found["seconds"].values())}
    row |= {f"{what}_gib": round(found[what] / 2**30, 2) for what in ("gpu", "host", "check")}
    print(" ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def needed_bytes(config: PretrainedConfig, device: str, text_len: int) -> int:
    """The bytes that a model needs on a device to be calibrated there in one piece."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return opened.needed_bytes(config, model.num_parameters() * dtype.itemsize, text_len, dtype)


STEPS = ("source", "capture", "calibrate", "plan", "passes", "emit", "check")


def device_name(device: str) -> str:
    return f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name()


def write(rows: Sequence[dict[str, Any]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "scale.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    shown = [*STEPS, "total"]
    lines = [
        f"| model | layers | device | {', '.join(shown)}, s | GPU, GiB | host, GiB | check, GiB |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['layers']} | {row['device']} | {', '.join(f'{row[step]:.1f}' for step in shown)} | "
        f"{row['gpu_gib']:.1f} | {row['host_gib']:.1f} | {row['check_gib']:.1f} |"
        for row in rows
    ]
    (folder / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="qwen2.5-1.5b,qwen2.5-7b", help=f"of {', '.join(SHAPES)} (%(default)s)")
    parser.add_argument("--layers", help="keep only so many layers of each shape; 2,4 measures two parts")
    parser.add_argument("--device", default="auto", help="as for pmkvq-compile (%(default)s)")
    parser.add_argument("--max-len", type=int, default=32768, help="tokens that plans are made for (%(default)s)")
    parser.add_argument("--texts", type=int, default=8, help="calibration texts (%(default)s)")
    parser.add_argument("--text-len", type=int, default=2048, help="tokens of a text (%(default)s)")
    parser.add_argument(
        "--memory", help="bytes of the device that a compile may use, such as 24GiB (all that are free)"
    )
    parser.add_argument("--trained", type=float, metavar="SECONDS", help="train each model for so long first")
    parser.add_argument("--disk", type=Path, help="folder with room for two copies of the weights (the system's)")
    parser.add_argument("--output", type=Path, default=Path("out/scale"))
    parser.add_argument("--keep", type=Path, help="keep artifacts in this folder, such as for startup.py")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--share", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.model is not None:
        compile_once(arguments)
        return
    names = arguments.shapes.split(",")
    if unknown := set(names) - set(SHAPES):
        parser.error(f"--shapes {min(unknown)} is not known; choose from {', '.join(SHAPES)}")
    rows = [row for name in names for row in measured(name, arguments)]
    if rows:
        write(rows, arguments.output)
    if len({row["model"] for row in rows}) < len(names):
        sys.exit(1)


if __name__ == "__main__":
    main()
