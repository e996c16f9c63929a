"""An artifact with the shapes of a model and no weights, to time serving with random ones.

    python examples/serve/shapes.py 2 2 -o out/shapes
    python examples/serve/benchmark.py out/shapes/artifact --source out/shapes/source --load-format dummy

Every layer gets the same bits of K and V. Besides the model folders it writes `site`, which holds the artifact's
package as pip installs it: put it on PYTHONPATH where nothing can be installed. The shapes are Qwen2.5-7B's.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pmkvq_compiler.emit.artifact import write_manifest
from pmkvq_compiler.emit.model_source import vocab_size
from pmkvq_compiler.emit.package import emit_package
from pmkvq_compiler.passes.base import run_passes
from pmkvq_compiler.passes.locate_attention import LocateAttention
from pmkvq_compiler.passes.pipeline import pipeline
from pmkvq_compiler.runtime.manifest import open_artifact
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan, sequence_bytes
from pmkvq_compiler.source.capture import capture
from pmkvq_compiler.source.source import open_source

QWEN_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
PACKAGE = "shapes"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("key_bits", type=int, choices=(2, 4, 8))
    parser.add_argument("value_bits", type=int, choices=(2, 4, 8))
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--key-axis", choices=("token", "channel"), default="channel")
    parser.add_argument("--max-len", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=QWEN_7B["num_hidden_layers"], help="default: %(default)s")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/shapes"))
    options = parser.parse_args(arguments)
    config = AutoConfig.for_model("qwen2", **{**QWEN_7B, "num_hidden_layers": options.layers})
    config.dtype, config.architectures = torch.bfloat16, ["Qwen2ForCausalLM"]
    config.save_pretrained(options.output / "source")
    artifact = options.output / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    write_artifact(config, options, artifact)
    write_site(artifact, options.output / "site")
    print(f"{artifact} has no weights; serve it with --load-format dummy")


def write_artifact(config: Any, options: argparse.Namespace, folder: Path) -> None:
    program = capture(config)
    run_passes(program, [LocateAttention()])
    layers = [
        LayerPlan(
            num_key_value_heads=site.num_key_value_heads,
            key_head_dim=site.key_head_dim,
            value_head_dim=site.value_head_dim,
            key_bits=options.key_bits,
            value_bits=options.value_bits,
            key_axis=options.key_axis,
            sink=4,
            window=options.window,
            block=64,
            sliding_window=None,
            stages=((options.key_bits, options.value_bits),),
            arena_bytes=0,
        )
        for site in program.sites
    ]
    layers = [dataclasses.replace(one, arena_bytes=sequence_bytes(one, options.max_len, 2)) for one in layers]
    budget = sum(layer.arena_bytes for layer in layers)
    plan = CachePlan("uniform", budget, options.max_len, 1, "bfloat16", tuple(layers))
    run_passes(program, pipeline({}, {}, {}, plan))
    with tempfile.TemporaryDirectory() as small:  # a source is opened with weights, of which nothing is kept
        shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 16}
        tiny = AutoConfig.for_model("qwen2", **shape, num_attention_heads=1, num_key_value_heads=1)
        AutoModelForCausalLM.from_config(tiny).save_pretrained(small)
        source = open_source(small)
        source.config = config
    written = emit_package(program, source, folder, PACKAGE)
    config.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}\n")
    save_file({"nothing": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    written += [folder / name for name in ("config.json", "generation_config.json", "model.safetensors")]
    content = {
        "package": PACKAGE,
        "weights": ["model.safetensors"],
        "vocab_size": vocab_size(program),
        "plan": plan.to_json(),
        "key_rotations": [],
        "tensors": {"model.safetensors": {"nothing": "F32 [1]"}, f"{PACKAGE}/constants.safetensors": {}},
        "options": {},
        "fingerprints": {},
    }
    write_manifest(folder, content, written)
    open_artifact(folder)


def write_site(artifact: Path, site: Path) -> None:
    """The package as it is installed, with its entry point."""
    shutil.rmtree(site, ignore_errors=True)
    shutil.copytree(artifact / PACKAGE, site / PACKAGE)
    files = [path.name for path in artifact.iterdir() if path.name != PACKAGE]
    (site / PACKAGE / "artifact").mkdir()
    for name in files:
        shutil.copy(artifact / name, site / PACKAGE / "artifact" / name)
    info = site / f"{PACKAGE}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{PACKAGE} = {PACKAGE}.runtime.vllm:register\n")


if __name__ == "__main__":
    main()
