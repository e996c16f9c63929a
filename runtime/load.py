"""Load an artifact: check it, and bind its weights to its generated code.

Loading runs the artifact's `model.py`, `plan.py` and kernels, from the text that was compared with its digest. The
digests find damage, not malice: load only artifacts whose code you would run, or load with `trust_code=False`.
"""

from __future__ import annotations

import hashlib
import importlib
import linecache
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch

from .backend import Attention
from .cubins import Archive, archives, runs_on
from .errors import ArtifactError, InputError
from .fused import PLAIN, Ops
from .fused_kernels import FUSED, FusedKernels
from .kernels import LayerKernels, check_kernels, unreadable
from .manifest import AGAIN, DTYPES, MANIFEST, Artifact, Files, brief, open_artifact, parse_json
from .manifest import FORMAT_VERSION as FORMAT_VERSION
from .manifest import file_digest as file_digest
from .model import CompiledModel
from .plan import CachePlan
from .reference import BESIDE_KERNELS, REFERENCE
from .tuning import read_tunings, tuning_for
from .warm_up import first_kernels, observed_calls
from .weights import check_tensors, empty_weights, read_weights

Backend = Literal["reference", "triton"]
Verify = Literal["digests", "manifest"]


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: Backend | None = None,
    trust_code: bool = True,
    verify: Verify = "digests",
) -> CompiledModel:
    """The model in the artifact folder `path`, by default in its own dtype and on the CPU. The device "cuda" is the one
    that is torch's current one during the load; the model stays there.

    `backend` chooses the attention: "triton" for the artifact's generated kernels, which need a CUDA device, or
    "reference" for plain PyTorch. The default is the kernels on a CUDA device and the reference elsewhere. With
    "reference", recurrent layers are computed in plain PyTorch, too; else as the model's `recurrences_from` says.

    With `trust_code=False`, Python of the artifact is run only if the installed compiler would write the same, byte for
    byte, for the artifact's config and plan; machine code of `--aot` is not used. This needs the compiler and a few
    seconds.

    The digests of the weights are computed while the weights are read. With `verify="manifest"` they are not: then the
    files of weights only need to have the tensors, dtypes, shapes and sizes that the manifest lists. This saves about a
    second of a CPU core for 1.6 GB, but damaged weights go unnoticed, and the model's answers may be wrong without an
    error. All other files are compared with their digests in any case. Meanwhile, the kernels are compiled that the
    first tokens need.

    Raises `ArtifactError` where the folder is not an artifact, holds a changed file, has another format version, or
    contradicts its manifest, and `InputError` where the device is missing, the backend cannot run on it, or `verify` is
    not known.
    """
    if verify not in ("digests", "manifest"):
        raise InputError(f'verify {verify!r} is not known; choose "digests" or "manifest"')
    artifact = open_artifact(Path(path))
    target = DTYPES[artifact.manifest.plan.dtype] if dtype is None else _dtype(dtype)
    place = _device(device)
    artifact.check_small_files()
    with ThreadPoolExecutor() as pool:
        digests = artifact.begin_checks(pool) if verify == "digests" else []
        try:
            model = _loaded(artifact, target, place, backend, trust_code)
        except ArtifactError:
            _all_equal(digests)  # a changed file is the reason for whatever else is wrong with it
            raise
        _all_equal(digests)
    return model


def _all_equal(digests: Sequence[Future[Path]]) -> None:
    for digest in digests:
        digest.result()


def _loaded(
    artifact: Artifact, target: torch.dtype, place: torch.device, backend: Backend | None, trust_code: bool
) -> CompiledModel:
    """The model, whose weights were not compared with their digests. Raises the same errors as `load`."""
    check_tensors(artifact)
    read_tunings(artifact.package.read("kernels/tuning.json").decode("utf-8", "replace"))
    ends, pad = _ids(artifact)
    if not trust_code:
        check_code(artifact)
    plan, code = _generated(artifact)
    attention, ops = choose_backend(artifact.package, plan, place, backend, target, compiled=trust_code)
    empty, groups = empty_weights(artifact, target), () if ops is PLAIN else code.JOINED
    with first_kernels(attention, ops, partial(observed_calls, code, empty, groups), plan, target, place):
        weights = read_weights(artifact, empty, place, groups)
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
        ops=ops,
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ArtifactError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}; pass one of these")
    return found


def _device(device: str | torch.device | None) -> torch.device:
    """The device, for "cuda" with its index. Raises `InputError`."""
    try:
        place = torch.device("cpu" if device is None else device)
        found = torch.empty(0, device=place).device
    except (AssertionError, RuntimeError) as error:  # what torch raises for a device that it was not built for
        reason = str(error).splitlines()[0]
        raise InputError(
            f'device "{device}" cannot be used ({reason}); name one that PyTorch has, such as "cpu"'
        ) from error
    return found if found.type == "cuda" else place


def _ids(artifact: Artifact) -> tuple[frozenset[int], int | None]:
    """The ids in generation_config.json of the tokens that end a text, and of the one that pads a batch. Ids outside
    the vocabulary, such as a pad token of -1, can never occur and are left out."""
    name = "generation_config.json"
    generation = parse_json(artifact.files.read(name), name)
    if not isinstance(generation, dict):
        raise ArtifactError(f"{name} is not a JSON object; {AGAIN}")
    found = {}
    for key in ("eos_token_id", "pad_token_id"):
        value = generation.get(key)
        ids = [] if value is None else value if isinstance(value, list) and key.startswith("eos") else [value]
        if any(type(one) is not int for one in ids):
            raise ArtifactError(f"{name}: {key} is {brief(value)!r}, which is not a token id; {AGAIN}")
        found[key] = [one for one in ids if 0 <= one < artifact.manifest.vocab_size]
    return frozenset(found["eos_token_id"]), next(iter(found["pad_token_id"]), None)


def check_code(artifact: Artifact) -> None:
    """Raises `ArtifactError` where the artifact's Python is not what the installed compiler would write."""
    parent = __package__.rpartition(".")[0]
    try:
        # Only here does the runtime use the compiler. The copy of the runtime in an artifact has no compiler beside it,
        # and could not vouch for its own artifact.
        regenerate = importlib.import_module(f"{parent}.regenerate")
    except ModuleNotFoundError as error:
        raise ArtifactError(
            "trust_code=False needs the compiler, which writes the code anew; install pmkvq-compiler and load with "
            "pmkvq_compiler.runtime.load"
        ) from error
    regenerate.check_code(artifact)


def _generated(artifact: Artifact) -> tuple[CachePlan, ModuleType]:
    """The plan and the generated model. Raises `ArtifactError` where they differ from the manifest."""
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
    """Run a generated file as a module beside this runtime, so that its relative imports find this runtime.

    This works inside an artifact and inside the compiler, and in both there is only one set of the runtime's classes.
    It runs `text`, or else the file's content; a `.pyc` beside the file is neither read nor written.
    """
    parent = __package__.rpartition(".")[0]
    name = f"{parent}._artifact_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}_{path.stem}"
    text = path.read_bytes() if text is None else text
    module = ModuleType(name)
    module.__file__, module.__package__ = str(path), parent
    code = compile(text, str(path), "exec", dont_inherit=True)
    # Triton and tracebacks read the source from here: the text that runs, even if the file changes later.
    lines = text.decode("utf-8").splitlines(keepends=True)
    linecache.cache[str(path)] = len(text), None, lines, str(path)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module


# ---- backends ----


def choose_attention(
    package: Files | Path,
    plan: CachePlan,
    device: torch.device,
    backend: Backend | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> Sequence[Attention]:
    """The attention of every layer, as `choose_backend` chooses it."""
    return choose_backend(package, plan, device, backend, dtype, compiled)[0]


def choose_backend(
    package: Files | Path,
    plan: CachePlan,
    device: torch.device,
    backend: Backend | None = None,
    dtype: torch.dtype | None = None,
    compiled: bool = True,
) -> tuple[Sequence[Attention], Ops]:
    """The attention of every layer and the model's other ops: the reference path and plain PyTorch, or kernels in the
    artifact's `package`, which is given as its listed files or as its folder.

    Kernels that were compiled with the artifact are used if they are for this device and the model's `dtype` (by
    default the plan's). Otherwise Triton compiles the kernels at their first launch; where the artifact has compiled
    kernels and none fit, a warning says so. Layers that the kernels cannot read are left to the reference path, with a
    warning, unless "triton" was asked for. With `compiled=False` the artifact's compiled kernels are ignored.

    Raises `InputError` where the backend is not known or cannot run on the device, and `ArtifactError` where the
    kernels cannot be read.
    """
    chosen = backend or ("triton" if device.type == "cuda" else "reference")
    if chosen == "reference":
        return [REFERENCE] * len(plan.layers), PLAIN
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
    reasons = [unreadable(layer) for layer in plan.layers]
    for layer in plan.layers if backend == "triton" else ():
        check_kernels(layer)
    for reason in dict.fromkeys(reason for reason in reasons if reason is not None):
        warnings.warn(f"{reason}: such layers are computed in plain PyTorch, which is slower", stacklevel=3)
    modules = {
        name: _run(files, f"kernels/{name}.py") if archive is None else archive.kernels(name)
        for name in dict.fromkeys((*names, FUSED))
    }
    attention = [
        LayerKernels(modules[name], tuning) if reason is None else BESIDE_KERNELS
        for name, reason in zip(names, reasons, strict=True)
    ]
    return attention, FusedKernels(modules[FUSED])


def _fitting_archive(
    package: Files, stored: torch.dtype, device: torch.device, dtype: torch.dtype | None
) -> Archive | None:
    """The compiled kernels for the device and dtype. None if there are none, with a warning if there are others."""
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
    """Raises `InputError` where Triton is not installed or cannot run kernels on the device."""
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
