"""Writes a program as a Python package, together with the files that make its folder a Hugging Face repository."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.resources
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from pmkvq_compiler.emit.artifact import save_tensors
from pmkvq_compiler.emit.kernel_source import kernel_files
from pmkvq_compiler.emit.model_source import model_source
from pmkvq_compiler.emit.names import in_markdown, one_line, project_name
from pmkvq_compiler.emit.whole import write_config
from pmkvq_compiler.passes.bake_plan import layer_plans
from pmkvq_compiler.passes.program import Program
from pmkvq_compiler.runtime.manifest import DTYPES, MANIFEST
from pmkvq_compiler.runtime.plan import CachePlan, LayerPlan
from pmkvq_compiler.source.multimodal import Whole
from pmkvq_compiler.source.source import Source
from pmkvq_compiler.templates import read, render

CONSTANTS = "constants.safetensors"
TAGS = ["kv-cache-quantization", "pm-kvq", "custom_code"]


def emit_package(
    program: Program, source: Source, folder: Path, package: str, whole: Whole | None = None
) -> list[Path]:
    """Write the outlined `program` into `folder`: the Python package `package`, the modules for transformers beside it,
    and the model card. Returns the files.

    The package holds the generated `model.py` and `plan.py`, the constants and a copy of the runtime. It needs only
    torch and safetensors, and for text also tokenizers. Only the modules beside it need transformers. `whole` is the
    model that the folder is a checkpoint of, if it is not `source` alone.
    """
    if program.plan is None:
        raise ValueError("the program has no plan; run BakePlan first")
    plan = dataclasses.replace(program.plan, layers=tuple(layer_plans(program)))
    values: dict[str, Any] = {
        "package": package,
        "version": importlib.metadata.version("pmkvq-compiler"),
        "name": in_markdown(source.name),
        "metadata": _card_metadata(source),
        "architecture": _architecture(source) if whole is None else whole.architecture,
        "plan": plan,
        "state_bytes": plan.state_bytes(DTYPES[plan.dtype].itemsize),
        "modules": ", ".join(map(in_markdown, source.whole.modules if source.whole else ())),
        "whole": whole is not None,
    }
    target = folder / package
    target.mkdir(parents=True)
    pages = {
        target / "model.py": model_source(program),
        target / "plan.py": plan_source(plan),
        target / "__init__.py": render("package_init.py.j2", **values),
        target / "__main__.py": render("package_main.py.j2", **values),
        target / "chat.py": read("chat.py"),
        target / "text.py": read("text.py"),
        target / "chat_process.py": read("chat_process.py"),
        target / "chat_template.py": read("chat_template.py"),
        folder / "modeling_pmkvq.py": read("modeling_pmkvq.py"),
        folder / "modeling_compiled.py": render(
            "modeling_compiled.py.j2", **values, config_class=type((whole or source).config).__name__
        ),
        folder / "README.md": render("model_card.md.j2", **values),
    }
    kernels = kernel_files(program.cached_sites, plan.layers)
    pages |= {target / "kernels" / name: text for name, text in kernels.items()}
    pages |= {target / "runtime" / name: text for name, text in _runtime_files().items()}
    for path, text in pages.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    constants = {constant.name: constant.value.contiguous() for constant in program.constants.values()}
    save_tensors(constants, target / CONSTANTS)
    return [*pages, target / CONSTANTS]


def _card_metadata(source: Source) -> str:
    """The metadata of the model card as YAML, which the hub reads. Names in it are not under our control."""
    return ModelCardData(
        model_name=source.name,
        base_model=source.base_model,
        base_model_relation="quantized" if source.base_model else None,
        license=source.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=TAGS,
    ).to_yaml()


def write_for_transformers(
    source: Source, max_len: int, folder: Path, scratch: Path, whole: Whole | None = None
) -> list[Path]:
    """Write the config, the generation defaults (for sequences of `max_len` tokens) and the tokenizer into `folder`;
    returns the files.

    transformers decides what the files are called, so it first writes into an empty folder in `scratch`. Config and
    processors are those of `whole`, if the folder is a checkpoint of that model.
    """
    place = scratch / "transformers"
    place.mkdir()
    source.save_generation_config(place, max_len)
    source.save_tokenizer(place)
    if whole is None:
        _write_config(source, place)
    else:
        write_config(whole, source.dtype, place)
    made = {path: folder / path.relative_to(place) for path in sorted(place.rglob("*")) if path.is_file()}
    for path, target in made.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    return list(made.values())


def _write_config(source: Source, folder: Path) -> None:
    """Write `config.json`: the source model's config with the stored dtype.

    So transformers can load the weights as an ordinary model. If remote code is trusted, it loads the compiled model.
    """
    config = copy.deepcopy(source.config)
    config.dtype = source.dtype
    config.architectures = [_architecture(source)]
    config.auto_map = {"AutoModelForCausalLM": f"modeling_compiled.{_architecture(source)}"}
    config.save_pretrained(folder)


def _architecture(source: Source) -> str:
    """The class of transformers that the weights belong to. Folds do not change it."""
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)]
    return str(model_class.__name__)


def write_project(folder: Path, package: str, name: str) -> list[Path]:
    """Write `pyproject.toml`, which lists all files that a wheel must contain. Only the manifest is written later.
    Returns the file."""
    project = folder / "pyproject.toml"
    files = {path.name for path in folder.iterdir()} | {project.name, MANIFEST}
    text = render(
        "pyproject.toml.j2",
        package=package,
        project=project_name(package),
        description=f"{one_line(name)} with a progressively quantized KV cache",
        version=importlib.metadata.version("pmkvq-compiler"),
        files=sorted(files - {package}),
    )
    project.write_text(text, encoding="utf-8")
    return [project]


def plan_source(plan: CachePlan) -> str:
    """The text of `plan.py`: one line for each layer, with the fields that are equal in all layers written once."""
    fields = [field.name for field in dataclasses.fields(LayerPlan)]
    common = [name for name in fields if len({getattr(layer, name) for layer in plan.layers}) == 1]
    own = [name for name in fields if name not in common]
    shared = [f"{name}={getattr(plan.layers[0], name)!r}" for name in common]
    lines = [", ".join(f"{name}={getattr(layer, name)!r}" for name in own) for layer in plan.layers]
    return render("plan.py.j2", plan=plan, shared=shared, lines=lines)


def _runtime_files() -> dict[str, str]:
    """The texts of the runtime's files, by their path in it."""
    return dict(_texts(importlib.resources.files("pmkvq_compiler.runtime"), ""))


def _texts(folder: Traversable, place: str) -> Iterator[tuple[str, str]]:
    for file in folder.iterdir():
        if file.name.endswith(".py"):
            yield f"{place}{file.name}", file.read_text(encoding="utf-8")
        elif file.is_dir():
            yield from _texts(file, f"{place}{file.name}/")
