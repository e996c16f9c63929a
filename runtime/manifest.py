"""The manifest of an artifact, `pmkvq.json`, which is read once and checked against a schema, and the listed files.

The dataclasses are the schema: every value is of the annotated type, every key is known and none is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch

from .errors import ArtifactError
from .plan import CODE_BITS, CachePlan, LayerPlan, sequence_bytes

FORMAT_VERSION = 9
MANIFEST = "pmkvq.json"
LARGEST_JSON = 64 << 20
"""A JSON file with more bytes is not read. The manifest of a model with 100,000 tensors has a tenth of this."""

LARGEST_INTEGER = 1 << 62
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CODES_PACKED = 8
"""Head dimensions, and tokens of a block, are multiples of this, so that codes fill whole bytes at every width."""

LONGEST_QUOTE = 200
"""An error message quotes no more characters of a file than this."""

AGAIN = "copy the artifact again or compile it again"
Option = str | int | float | bool | None


@dataclass(frozen=True)
class Manifest:
    """`files` has the sha256 of every file that may be used. `tensors` has, for each safetensors file, the dtype and
    shape of its tensors, as in "F32 [128, 64]". `key_rotations` lists the layers whose keys are rotated at run time."""

    format_version: int
    package: str
    weights: tuple[str, ...]
    vocab_size: int
    plan: CachePlan
    key_rotations: tuple[int, ...]
    tensors: dict[str, dict[str, str]]
    options: dict[str, Option | tuple[Option, ...]]
    fingerprints: dict[str, str]
    files: dict[str, str]

    @property
    def constants(self) -> str:
        """The file of the tensors that are not weights."""
        return f"{self.package}/constants.safetensors"


@dataclass(frozen=True)
class Files:
    """The files of a folder. Only those are read that `digests` lists by name, if their sha256 is the listed one.

    While the compiler writes a folder there are no digests (None), and any file is read.
    """

    folder: Path
    digests: Mapping[str, str] | None = None

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file() if self.digests is None else name in self.digests

    def read(self, name: str) -> bytes:
        """The bytes of a file, after its digest was compared with them. Raises `ArtifactError`."""
        path = self._listed(name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error
        self._compare(name, io.BytesIO(content))
        return content

    def check(self, name: str) -> Path:
        """The path of a file, after its digest was compared, for files too large for memory. Raises `ArtifactError`."""
        path = self._listed(name)
        try:
            with path.open("rb") as file:
                self._compare(name, file)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error
        return path

    def _listed(self, name: str) -> Path:
        path = self.folder / name
        if self.digests is not None and name not in self.digests:
            raise ArtifactError(f"{path} is not listed in {MANIFEST}, so it is not used; {AGAIN}")
        if not path.is_file():
            raise ArtifactError(f"{path} is missing; {AGAIN}")
        return path

    def _compare(self, name: str, file: io.BufferedReader | io.BytesIO) -> None:
        if self.digests is not None and hashlib.file_digest(file, "sha256").hexdigest() != self.digests[name]:
            raise ArtifactError(
                f"{self.folder / name} was changed after the compile: its sha256 is not the one in {MANIFEST}; {AGAIN}"
            )


@dataclass(frozen=True)
class Artifact:
    """A manifest and the files that it lists: `files` lie beside it, those of `package` in the package's folder."""

    folder: Path
    manifest: Manifest
    files: Files
    package: Files

    def check_files(self) -> None:
        """Raises `ArtifactError` where a listed file is missing or was changed."""
        self.check_small_files()
        with ThreadPoolExecutor() as pool:
            for check in self.begin_checks(pool):
                check.result()

    def check_small_files(self) -> None:
        """`check_files` for all files but the large ones: weights, and what was kept of a multimodal model."""
        for files in (self.files, self.package):
            for name in files.digests or ():
                if files is self.package or not name.endswith(".safetensors"):
                    files.check(name)

    def begin_checks(self, pool: Executor) -> list[Future[Path]]:
        """`check_files` for the large files, all at the same time. The results raise `ArtifactError`."""
        return [pool.submit(self.files.check, one) for one in self.files.digests or () if one.endswith(".safetensors")]


def open_artifact(folder: Path) -> Artifact:
    """The artifact in `folder`: a folder that the compiler wrote, or the one inside a package that was installed.

    Raises `ArtifactError` where there is none, or where its manifest is damaged or of another format version. The
    files themselves are compared with their digests when they are read.
    """
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(
            f"{folder} is not an artifact: it has no {MANIFEST}; pass a folder that pmkvq-compile wrote"
        )
    data = read_json(folder / MANIFEST)
    _check_version(folder, data)
    manifest = conform(data, Manifest, MANIFEST)
    _check_plan(manifest.plan)
    _check_names(manifest)
    inside, around = folder / manifest.package, folder.absolute().parent
    if not inside.is_dir() and around.name != manifest.package:
        raise ArtifactError(f"{inside} is missing; {AGAIN}")
    prefix = manifest.package + "/"
    beside = {name: digest for name, digest in manifest.files.items() if not name.startswith(prefix)}
    within = {name.removeprefix(prefix): manifest.files[name] for name in manifest.files.keys() - beside.keys()}
    return Artifact(folder, manifest, Files(folder, beside), Files(inside if inside.is_dir() else around, within))


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def brief(value: object) -> str:
    """A quote from a file for an error message, on one line and not too long."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_QUOTE else text[:LONGEST_QUOTE] + "..."


# ---- JSON ----


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises `ArtifactError` where the file is too large, is not JSON, or is ambiguous."""
    try:
        with path.open("rb") as file:
            return parse_json(file.read(LARGEST_JSON + 1), str(path))
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error


def parse_json(content: bytes, where: str) -> Any:
    """The value of a JSON text without NaN, infinity, and keys that occur twice. Raises `ArtifactError`."""
    if len(content) > LARGEST_JSON:
        raise ArtifactError(f"{where} has more than {LARGEST_JSON >> 20} MiB, which no artifact needs; {AGAIN}")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ArtifactError(f"{where} cannot be read (values are nested too deeply); {AGAIN}") from error
    except ValueError as error:
        raise ArtifactError(f"{where} cannot be read ({brief(error)}); {AGAIN}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {brief(next(name for name in names if names.count(name) > 1))!r} occurs twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


# ---- the schema ----


def conform(value: Any, expected: Any, where: str) -> Any:
    """A JSON value as the type `expected`: a dataclass, whose fields with defaults may be missing, a dict, a tuple, a
    union, a Literal or a plain type.

    Raises `ArtifactError`, which names the first place where the value does not fit.
    """
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if dataclasses.is_dataclass(expected):
        return _conform_object(value, expected, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _unlike(value, "an object", where)
        keys = {name: _key(name, arguments[0], where) for name in value}
        return {keys[name]: conform(one, arguments[1], f"{where}: {name}") for name, one in value.items()}
    if origin is tuple:
        repeated = arguments[-1] is Ellipsis
        if not isinstance(value, list) or not (repeated or len(value) == len(arguments)):
            raise _unlike(value, "a list" if repeated else f"a list of {len(arguments)}", where)
        kinds = [arguments[0]] * len(value) if repeated else arguments
        return tuple(conform(one, kind, f"{where}[{n}]") for n, (one, kind) in enumerate(zip(value, kinds)))  # noqa: B905
    if origin in (typing.Union, types.UnionType):
        return _conform_union(value, arguments, where)
    if origin is Literal:
        if not any(value == one and type(value) is type(one) for one in arguments):
            raise _unlike(value, " or ".join(map(repr, arguments)), where)
        return value
    return _conform_plain(value, expected, where)


def _conform_object(value: Any, expected: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _unlike(value, "an object", where)
    kinds = _annotations(expected)
    needed = {field.name for field in dataclasses.fields(expected) if field.default is dataclasses.MISSING}
    for what, names in (("lacks", needed - value.keys()), ("has the unknown", value.keys() - kinds.keys())):
        if names:
            raise ArtifactError(f"{brief(where)} {what} key {brief(min(names))!r}; {AGAIN}")
    return expected(**{name: conform(one, kinds[name], f"{where}: {name}") for name, one in value.items()})


def _key(name: str, expected: type, where: str) -> str | int:
    """A key of an object, which JSON knows as strings only."""
    if expected is str:
        return name
    if not re.fullmatch("[0-9]{1,9}", name):
        raise _unlike(name, "a number as a key", where)
    return int(name)


@functools.cache
def _annotations(expected: Any) -> dict[str, Any]:
    return typing.get_type_hints(expected)


def _conform_union(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    for kind in kinds:
        try:
            return conform(value, kind, where)
        except ArtifactError:
            continue
    raise _unlike(value, " or ".join(_name(kind) for kind in kinds), where)


def _conform_plain(value: Any, expected: type, where: str) -> Any:
    if expected is float and type(value) is int:
        value = float(value) if abs(value) <= LARGEST_INTEGER else math.inf
    fits = type(value) is expected
    if isinstance(value, int | float):
        fits &= math.isfinite(value) if expected is float else abs(value) <= LARGEST_INTEGER
    if not fits:
        raise _unlike(value, _name(expected), where)
    return value


NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "null"}


def _name(kind: Any) -> str:
    return NAMES.get(kind, "a list" if typing.get_origin(kind) is tuple else "an object")


def _unlike(value: Any, expected: str, where: str) -> ArtifactError:
    try:
        shown = json.dumps(value)
    except (ValueError, RecursionError):  # of more digits than Python writes
        shown = f"a {type(value).__name__}"
    return ArtifactError(f"{brief(where)} is {brief(shown)} instead of {expected}; {AGAIN}")


def _check_version(folder: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int:
        raise ArtifactError(f"{folder / MANIFEST} names no format_version; compile the artifact again")
    if version != FORMAT_VERSION:
        upgrade = "upgrade pmkvq-compiler, or " if version > FORMAT_VERSION else ""
        raise ArtifactError(
            f"{folder} has format version {conform(version, int, MANIFEST)} and this runtime reads {FORMAT_VERSION}; "
            f"{upgrade}compile the model with this version"
        )


def _check_names(manifest: Manifest) -> None:
    """Every path stays inside the artifact and is written one way only."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", manifest.package):
        raise ArtifactError(f"{MANIFEST}: package is {brief(manifest.package)!r}, which cannot name a package; {AGAIN}")
    for name, digest in manifest.files.items():
        path = PurePosixPath(name)
        if name != path.as_posix() or path.is_absolute() or {"..", "."} & {*path.parts} or re.search(r"[\\:\0]", name):
            raise ArtifactError(f"{MANIFEST}: files: {brief(name)!r} is not a path inside the artifact; {AGAIN}")
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise ArtifactError(f"{MANIFEST}: files: {brief(name)}: {brief(digest)!r} is not a sha256; {AGAIN}")
    if not manifest.weights or len({*manifest.weights}) < len(manifest.weights) or "/" in "".join(manifest.weights):
        raise ArtifactError(f"{MANIFEST}: weights must list files beside it, each of them once; {AGAIN}")
    for name in (*manifest.weights, manifest.constants):
        if name not in manifest.files or name not in manifest.tensors:
            raise ArtifactError(f"{MANIFEST} lists {brief(name)!r} without its digest or its tensors; {AGAIN}")
    tensors = [name for table in manifest.tensors.values() for name in table]
    if len(manifest.tensors) != len(manifest.weights) + 1 or len({*tensors}) < len(tensors):
        raise ArtifactError(f"{MANIFEST}: tensors must be those of the weights' files, each tensor once; {AGAIN}")
    if not 0 < manifest.vocab_size < 1 << 31:
        raise ArtifactError(f"{MANIFEST}: vocab_size {manifest.vocab_size} is not between 1 and 2^31 - 1; {AGAIN}")
    if not {*manifest.key_rotations} <= manifest.plan.places.keys():
        raise ArtifactError(f"{MANIFEST}: key_rotations names layers that the plan does not have; {AGAIN}")


def _check_plan(plan: CachePlan) -> None:
    """Raises `ArtifactError` for a plan that the compiler never writes. The runtime would hang, or fail far from
    here."""
    if plan.dtype not in DTYPES:
        raise ArtifactError(f"{MANIFEST}: plan: dtype {brief(plan.dtype)!r} is not one of {', '.join(DTYPES)}; {AGAIN}")
    itemsize = DTYPES[plan.dtype].itemsize
    if not plan.layers or min(plan.max_len, plan.batch_size) < 1 or max(plan.max_len, plan.batch_size) >= 1 << 31:
        raise ArtifactError(f"{MANIFEST}: plan has no layers, or a max_len or batch_size below 1 or too large; {AGAIN}")
    for number, layer in enumerate(plan.layers):
        fault = _fault(layer)
        if fault is None and layer.arena_bytes < plan.batch_size * sequence_bytes(layer, plan.max_len, itemsize):
            fault = f"arena_bytes {layer.arena_bytes:,} cannot hold {plan.batch_size} x {plan.max_len:,} tokens"
        if fault is not None:
            raise ArtifactError(f"{MANIFEST}: plan: layers[{number}]: {fault}; {AGAIN}")
    fault = _fault_of_states(plan, itemsize)
    if fault is not None:
        raise ArtifactError(f"{MANIFEST}: plan: {fault}; {AGAIN}")
    if plan.arena_bytes > plan.budget:
        raise ArtifactError(f"{MANIFEST}: plan: layers take more than the budget of {plan.budget:,} bytes; {AGAIN}")


def _fault_of_states(plan: CachePlan, itemsize: int) -> str | None:
    """What is wrong with the places of a plan's layers and states, if anything."""
    indices = list(plan.attention_layers)
    if indices and (len(indices) != len(plan.layers) or indices != sorted({*indices}) or indices[0] < 0):
        return "attention_layers must be the rising indices of all its layers"
    if len({(state.layer, state.index) for state in plan.states}) < len(plan.states):
        return "states must each have a place of their own"
    for state in plan.states:
        if min(state.layer, state.index) < 0 or not state.shape or min(state.shape) < 1:
            return "states must have a place and a shape"
        if state.nbytes(itemsize) > LARGEST_INTEGER:
            return "states must fit a machine's memory"
    return None


def _fault(layer: LayerPlan) -> str | None:
    """What is wrong with the plan of a layer, if anything."""
    sizes = (layer.num_key_value_heads, layer.key_head_dim, layer.value_head_dim, layer.window, layer.block)
    if min(sizes) < 1 or layer.sink < 0 or max(*sizes, layer.sink) >= 1 << 31:
        return "heads, head dimensions, window and block must be at least 1, sink at least 0, and all below 2^31"
    if layer.key_head_dim % CODES_PACKED or layer.value_head_dim % CODES_PACKED:
        return f"head dimensions must be multiples of {CODES_PACKED}"
    if layer.sliding_window is not None and layer.sliding_window < 1:
        return f"sliding_window is {layer.sliding_window} and must be at least 1"
    if layer.chunked and layer.sliding_window is None:
        return "a chunked layer needs a sliding_window, which is the length of its chunks"
    if not layer.quantized:
        return None
    if layer.stages[-1] != (layer.key_bits, layer.value_bits) or not {*itertools.chain(*layer.stages)} <= {*CODE_BITS}:
        return f"stages must be pairs of {', '.join(map(str, CODE_BITS))} bits that end at key_bits and value_bits"
    for wide, narrow in itertools.pairwise(layer.stages):
        if wide == narrow or wide[0] < narrow[0] or wide[1] < narrow[1]:
            return "stages must each have fewer bits than the one before"
    if layer.block % CODES_PACKED:
        return f"a block must be a multiple of {CODES_PACKED} tokens"
    return None
