"""Load an artifact: check it, bind its weights to its generated code.

Loading runs the artifact's `model.py`, `plan.py` and kernels, from the text that was compared with its digest. The
digests find damage, not malice: load artifacts that you would run code from, or with `trust_code=False`.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .backend import Attention
from .cubins import Archive, archives, runs_on
from .errors import ArtifactError, InputError
from .kernels import LayerKernels, check_kernels
from .manifest import AGAIN, DTYPES, MANIFEST, Artifact, Files, brief, open_artifact, parse_json
from .manifest import FORMAT_VERSION as FORMAT_VERSION
from .manifest import file_digest as file_digest
from .model import CompiledModel
from .plan import CachePlan
from .reference import REFERENCE
from .tuning import read_tunings, tuning_for

Backend = Literal["reference", "triton"]


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: Backend | None = None,
    trust_code: bool = True,
) -> CompiledModel:
    """The model in the artifact folder `path`, in its own dtype and on the CPU unless told otherwise.

    `backend` says what attends: "triton", the artifact's generated kernels (a CUDA device is needed), or "reference",
    plain PyTorch. Unless told, it is the kernels on a CUDA device and the reference elsewhere.

    With `trust_code=False`, no Python of the artifact is run that the installed compiler would not write, byte for
    byte, for its config and plan; machine code of `--aot` is not used then. It needs the compiler, and a few seconds.

    Raises `ArtifactError` where the folder is no artifact, holds a changed file, has a newer format, or is not what
    its manifest says, and `InputError` where the device is not there or the backend cannot run on it.
    """
    artifact = open_artifact(Path(path))
    target = DTYPES[artifact.manifest.plan.dtype] if dtype is None else _dtype(dtype)
    place = _device(device)
    artifact.check_files()
    _check_tensors(artifact)
    read_tunings(artifact.package.read("kernels/tuning.json").decode("utf-8", "replace"))
    ends, pad = _ids(artifact)
    if not trust_code:
        check_code(artifact)
    plan, code = _generated(artifact)
    attention = choose_attention(artifact.package, plan, place, backend, target, compiled=trust_code)
    weights = _read_weights(artifact, target, place)
    hidden_states, logits = code.bind(weights)
    return CompiledModel(
        plan=plan,
        weights=weights,
        hidden_states=hidden_states,
        logits=logits,
        vocab_size=artifact.manifest.vocab_size,
        eos_token_ids=ends,
        pad_token_id=pad,
        dtype=target,
        device=place,
        attention=attention,
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ArtifactError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}; pass one of these")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
        torch.empty(0, device=place)
    except (AssertionError, RuntimeError) as error:  # what torch raises for a device that it was not built for
        reason = str(error).splitlines()[0]
        raise InputError(
            f'device "{device}" cannot be used ({reason}); name one that PyTorch has, such as "cpu"'
        ) from error
    return place


# ---- what the artifact says of itself, compared with what it holds ----


def tensor_table(path: Path) -> dict[str, str]:
    """Dtype and shape of every tensor of a safetensors file, as in "F32 [128, 64]". Raises `ArtifactError`."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error


def _check_tensors(artifact: Artifact) -> None:
    """Raises `ArtifactError` where a tensor is missing, is one too many, or has another dtype or shape."""
    for path, expected in _tensor_files(artifact):
        found = tensor_table(path)
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise ArtifactError(
                    f"{path}: tensor {brief(name)} is {brief(found.get(name, 'missing'))} where {MANIFEST} "
                    f"says {brief(expected.get(name, 'nothing of it'))}; {AGAIN}"
                )


def _tensor_files(artifact: Artifact) -> list[tuple[Path, dict[str, str]]]:
    """Every safetensors file, the constants last, and the table of its tensors."""
    manifest = artifact.manifest
    constants = artifact.package.folder / manifest.constants.partition("/")[2]
    checkpoint = [(artifact.folder / name, manifest.tensors[name]) for name in manifest.weights]
    return [*checkpoint, (constants, manifest.tensors[manifest.constants])]


def _ids(artifact: Artifact) -> tuple[frozenset[int], int | None]:
    """Tokens that end a text, and the one that fills a batch, of generation_config.json. Ids beyond the vocabulary,
    such as a pad token of -1, can never occur and are as good as none."""
    name = "generation_config.json"
    generation = parse_json(artifact.files.read(name), name)
    if not isinstance(generation, dict):
        raise ArtifactError(f"{name} is no JSON object; {AGAIN}")
    found = {}
    for key in ("eos_token_id", "pad_token_id"):
        value = generation.get(key)
        ids = [] if value is None else value if isinstance(value, list) and key.startswith("eos") else [value]
        if any(type(one) is not int for one in ids):
            raise ArtifactError(f"{name}: {key} is {brief(value)!r}, which is no token id; {AGAIN}")
        found[key] = [one for one in ids if 0 <= one < artifact.manifest.vocab_size]
    return frozenset(found["eos_token_id"]), next(iter(found["pad_token_id"]), None)


def check_code(artifact: Artifact) -> None:
    """Raises `ArtifactError` where the artifact's Python is not what the installed compiler would write."""
    parent = __package__.rpartition(".")[0]
    try:
        # The one place where the runtime asks for the compiler, whose part it is when it is not a copy in an artifact:
        # a copy has no such sibling, and could not vouch for itself.
        regenerate = importlib.import_module(f"{parent}.regenerate")
    except ModuleNotFoundError as error:
        raise ArtifactError(
            "trust_code=False needs the compiler, which writes the code anew; install pmkvq-compiler and load with "
            "pmkvq_compiler.runtime.load"
        ) from error
    regenerate.check_code(artifact)


def _generated(artifact: Artifact) -> tuple[CachePlan, ModuleType]:
    """The plan, and the generated model; both as the manifest has them."""
    plan = _attribute(_run(artifact.package, "plan.py"), "PLAN")
    if plan != artifact.manifest.plan:
        raise ArtifactError(f"{artifact.package.folder / 'plan.py'} and {MANIFEST} have different plans; {AGAIN}")
    code = _run(artifact.package, "model.py")
    _attribute(code, "bind")
    vocab_size = _attribute(code, "VOCAB_SIZE")
    if vocab_size != artifact.manifest.vocab_size:
        raise ArtifactError(
            f"{MANIFEST} has a vocab_size of {artifact.manifest.vocab_size} and model.py {brief(vocab_size)}; {AGAIN}"
        )
    return artifact.manifest.plan, code


def _attribute(module: ModuleType, name: str) -> Any:
    if not hasattr(module, name):
        raise ArtifactError(f"{module.__file__} has no {name}; {AGAIN}")
    return getattr(module, name)


def _run(package: Files, name: str) -> ModuleType:
    """A generated file as a module, run from the text that was compared with its digest. Raises `ArtifactError`."""
    try:
        return import_generated(package.folder / name, package.read(name))
    except ArtifactError:
        raise
    except Exception as error:  # whatever damaged code may raise
        raise ArtifactError(
            f"{package.folder / name} cannot be imported ({type(error).__name__}: {brief(error)}); {AGAIN}"
        ) from error


def import_generated(path: Path, text: bytes | None = None) -> ModuleType:
    """Run a generated file as a sibling of this runtime, which its relative imports then find.

    That holds inside an artifact and in the compiler's environment alike, and leaves one set of classes in either.
    What runs is `text`, or what the file holds; a `.pyc` beside it is neither read nor written.
    """
    parent = __package__.rpartition(".")[0]
    name = f"{parent}._artifact_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}_{path.stem}"
    text = path.read_bytes() if text is None else text
    module = ModuleType(name)
    module.__file__, module.__package__ = str(path), parent
    code = compile(text, str(path), "exec", dont_inherit=True)
    # Triton, and tracebacks, show the source of what runs, not of what lies there by then.
    lines = text.decode("utf-8").splitlines(keepends=True)
    linecache.cache[str(path)] = len(text), None, lines, str(path)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


# ---- what attends ----


def choose_attention(
    package: Files | Path,
    plan: CachePlan,
    device: torch.device,
    backend: Backend | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> Sequence[Attention]:
    """What attends over the cache of every layer of the artifact's `package`, its listed files or its folder: the
    reference path, or the layer's kernels.

    The kernels are those that were compiled with the artifact, where they are for such a device and the model's `dtype`
    (the plan's unless told), else those that Triton compiles when they are first launched. An artifact that has
    compiled kernels, but none that fit, warns of that. Without `compiled` they are left alone.

    Raises `InputError` where the backend is not known or cannot run on the device, and `ArtifactError` where the
    kernels cannot be read.
    """
    chosen = backend or ("triton" if device.type == "cuda" else "reference")
    if chosen == "reference":
        return [REFERENCE] * len(plan.layers)
    if chosen != "triton":
        raise InputError(f'backend {backend!r} is not known; choose "triton" or "reference"')
    files = Files(package) if isinstance(package, Path) else package
    names = _attribute(_run(files, "kernels/layers.py"), "KERNELS")
    if not isinstance(names, tuple) or len(names) != len(plan.layers):
        raise ArtifactError(f"kernels/layers.py does not name the kernels of {len(plan.layers)} layers; {AGAIN}")
    tuning = tuning_for(device, read_tunings(files.read("kernels/tuning.json").decode("utf-8", "replace")))
    archive = None
    if compiled and device.type == "cuda":
        archive = _fitting_archive(files, DTYPES[plan.dtype], device, dtype)
    if archive is None:
        _check_triton(device)
    for layer in plan.layers:
        check_kernels(layer)
    modules = {
        name: _run(files, f"kernels/{name}.py") if archive is None else archive.kernels(name)
        for name in dict.fromkeys(names)
    }
    return [LayerKernels(modules[name], tuning) for name in names]


def _fitting_archive(
    package: Files, stored: torch.dtype, device: torch.device, dtype: torch.dtype | None
) -> Archive | None:
    """The compiled kernels for the device; None, and a warning if there are others, where there are none."""
    places = {target: f"kernels/aot/{path.name}" for target, path in archives(package.folder).items()}
    found = {target: name for target, name in places.items() if name in package}
    if not found:
        return None
    capability = torch.cuda.get_device_capability(device)
    fitting = [target for target in found if runs_on(target, capability)]
    if fitting and dtype in (None, stored):
        return Archive(package.folder / found[fitting[-1]], device, package.read(found[fitting[-1]]))
    wanted = f"sm_{capability[0]}{capability[1]}" if not fitting else str(dtype).removeprefix("torch.")
    present = ", ".join(found) if not fitting else str(stored).removeprefix("torch.")
    warnings.warn(
        f"the artifact's compiled kernels are for {present}, not for {wanted}: Triton compiles its kernels when they "
        f"are first launched; to spare that, compile the model for {wanted} with --aot",
        stacklevel=3,
    )
    return None


def _check_triton(device: torch.device) -> None:
    """Raises `InputError` where Triton is not there or cannot run kernels on the device."""
    try:
        import triton
    except ImportError as error:
        raise InputError(
            f'backend "triton" needs the package triton, which cannot be imported ({error}); '
            f'install it or load with backend="reference"'
        ) from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise InputError(
            f'backend "triton" needs a CUDA device and the model is on {device}; load with device="cuda" or '
            f'backend="reference"'
        )


def _read_weights(artifact: Artifact, target: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Weights of the model's own dtype in `target`; constants, and what the model keeps in float32, as they are."""
    stored = DTYPES[artifact.manifest.plan.dtype]
    *checkpoint, (constants, _) = _tensor_files(artifact)
    weights: dict[str, Tensor] = {}
    try:
        for file, _ in checkpoint:
            shard = load_file(file, device=str(device))
            weights.update({key: value.to(target) if value.dtype == stored else value for key, value in shard.items()})
        weights.update(load_file(constants, device=str(device)))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"the weights in {artifact.folder} cannot be read ({brief(error)}); {AGAIN}") from error
    return weights
