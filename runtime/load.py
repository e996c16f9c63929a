"""Load an artifact: check it, bind its weights to its generated code.

Loading runs the artifact's `model.py`. The digests find damage, not malice: load artifacts that you would run code
from.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .cubins import Archive, archives, runs_on
from .errors import ArtifactError, InputError
from .kernels import LayerKernels, check_kernels, read_tunings, tuning_for
from .model import CompiledModel
from .plan import CachePlan

FORMAT_VERSION = 3
Backend = Literal["reference", "triton"]
MANIFEST = "pmkvq.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: Backend | None = None,
) -> CompiledModel:
    """The model in the artifact folder `path`, in its own dtype and on the CPU unless told otherwise.

    `backend` says what attends: "triton", the artifact's generated kernels (a CUDA device is needed), or "reference",
    plain PyTorch. Unless told, it is the kernels on a CUDA device and the reference elsewhere.

    Raises `ArtifactError` where the folder is no artifact, holds a changed file, or has a newer format, and
    `InputError` where the device is not there or the backend cannot run on it.
    """
    folder = Path(path)
    manifest = _read_manifest(folder)
    package = _package_folder(folder, manifest)
    _verify_files(folder, package, manifest)
    code = import_generated(package / "model.py")
    plan = import_generated(package / "plan.py").PLAN
    stored = DTYPES[plan.dtype]
    target = stored if dtype is None else _dtype(dtype)
    place = _device(device)
    kernels = choose_kernels(package, plan, place, backend, target)
    checkpoint = [folder / name for name in manifest["weights"]]
    weights = _read_weights(checkpoint, package / "constants.safetensors", stored, target, place)
    hidden_states, logits = code.bind(weights)
    generation = _read_json(folder / "generation_config.json")
    ends = generation.get("eos_token_id")
    return CompiledModel(
        plan=plan,
        weights=weights,
        hidden_states=hidden_states,
        logits=logits,
        vocab_size=manifest["vocab_size"],
        eos_token_ids=frozenset([ends] if isinstance(ends, int) else ends or []),
        pad_token_id=generation.get("pad_token_id"),
        dtype=target,
        device=place,
        kernels=kernels,
    )


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ArtifactError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}; pass one of these")
    return DTYPES[dtype]


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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); compile the artifact again") from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST}; pass a folder that pmkvq-compile wrote"
        )
    manifest = _read_json(folder / MANIFEST)
    version = manifest.get("format_version")
    if not isinstance(version, int):
        raise ArtifactError(f"{folder / MANIFEST} names no format_version; compile the artifact again")
    if version != FORMAT_VERSION:
        upgrade = "upgrade pmkvq-compiler, or " if version > FORMAT_VERSION else ""
        raise ArtifactError(
            f"{folder} has format version {version} and this runtime reads {FORMAT_VERSION}; "
            f"{upgrade}compile the model with this version"
        )
    return manifest


def _package_folder(folder: Path, manifest: dict[str, Any]) -> Path:
    """Where the package's files lie: inside the artifact, or around it where a wheel has put the artifact into it."""
    inside = folder / manifest["package"]
    return inside if inside.is_dir() else folder.parent


def _verify_files(folder: Path, package: Path, manifest: dict[str, Any]) -> None:
    prefix = manifest["package"] + "/"
    for name, digest in manifest["files"].items():
        path = package / name.removeprefix(prefix) if name.startswith(prefix) else folder / name
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; copy the artifact again or compile it again")
        if file_digest(path) != digest:
            raise ArtifactError(
                f"{path} was changed after the compile: its sha256 is not the one in {MANIFEST}; "
                f"copy the artifact again or compile it again"
            )


def import_generated(path: Path) -> ModuleType:
    """Run a generated file as a sibling of this runtime, which its relative imports then find.

    That holds inside an artifact and in the compiler's environment alike, and leaves one set of classes in either.
    """
    parent = __package__.rpartition(".")[0]
    name = f"{parent}._artifact_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def choose_kernels(
    package: Path,
    plan: CachePlan,
    device: torch.device,
    backend: Backend | None = None,
    dtype: torch.dtype | None = None,
) -> list[LayerKernels] | None:
    """The kernels of every layer of the artifact whose package lies in `package`; None where the reference attends.

    Those that were compiled with the artifact, where they are for such a device and the model's `dtype` (the plan's
    unless told), else those that Triton compiles when they are first launched. An artifact that has compiled kernels,
    but none that fit, warns of that.

    Raises `InputError` where the backend is not known or cannot run on the device.
    """
    chosen = backend or ("triton" if device.type == "cuda" else "reference")
    if chosen == "reference":
        return None
    if chosen != "triton":
        raise InputError(f'backend {backend!r} is not known; choose "triton" or "reference"')
    names = import_generated(package / "kernels" / "layers.py").KERNELS
    table = (package / "kernels" / "tuning.json").read_text(encoding="utf-8")
    tuning = tuning_for(device, read_tunings(table))
    archive = _fitting_archive(package, DTYPES[plan.dtype], device, dtype) if device.type == "cuda" else None
    if archive is None:
        _check_triton(device)
    for layer in plan.layers:
        check_kernels(layer)
    modules = {
        name: import_generated(package / "kernels" / f"{name}.py") if archive is None else archive.kernels(name)
        for name in dict.fromkeys(names)
    }
    return [LayerKernels(modules[name], tuning) for name in names]


def _fitting_archive(
    package: Path, stored: torch.dtype, device: torch.device, dtype: torch.dtype | None
) -> Archive | None:
    """The compiled kernels for the device; None, and a warning if there are others, where there are none."""
    found = archives(package)
    if not found:
        return None
    capability = torch.cuda.get_device_capability(device)
    fitting = [target for target in found if runs_on(target, capability)]
    if fitting and dtype in (None, stored):
        return Archive(found[fitting[-1]], device)
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


def _read_weights(
    checkpoint: list[Path], constants: Path, stored: torch.dtype, target: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Weights of the model's dtype `stored` in `target`; constants, and what the model keeps in float32, as they
    are."""
    weights: dict[str, Tensor] = {}
    try:
        for file in checkpoint:
            shard = load_file(file, device=str(device))
            weights.update({key: value.to(target) if value.dtype == stored else value for key, value in shard.items()})
        weights.update(load_file(constants, device=str(device)))
    except (SafetensorError, OSError) as error:
        folder = checkpoint[0].parent
        raise ArtifactError(f"the weights in {folder} cannot be read ({error}); compile the artifact again") from error
    return weights
