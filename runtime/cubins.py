"""Kernels that were compiled with the artifact, launched through the CUDA driver without Triton.

An archive `kernels/aot/<target>.zip` holds the machine code for one target and `index.json`, which maps each launch of
each module of kernels to its code. The key is made by `variant` from everything that the code depends on: the compiler
stores the code under it, and this module looks it up.
"""

from __future__ import annotations

import ctypes
import io
import json
import re
import struct
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .errors import ArtifactError, InputError
from .manifest import AGAIN, brief, conform, parse_json

INDEX = "index.json"
TARGET = re.compile("sm_[1-9][0-9]{1,3}")
WARP = 32
ALIGNMENT = 16
"""Arguments that are marked as divisible (addresses in bytes, integers as they are) must be multiples of this."""

LARGEST_FILE = 64 << 20
"""A file of an archive with more bytes than this is not unpacked."""

DEFAULT_SHARED_BYTES = 48 << 10
"""Bytes of shared memory that a kernel may take without a request for more."""

PREFER_SHARED = 1  # CU_FUNC_CACHE_PREFER_SHARED
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint8: "*u8",
}
SLOTS = {"*": "Q", "i": "i4x", "f": "f4x"}
"""How `struct` writes a parameter into eight bytes, by the first letter of its type."""


def argument_type(value: Any) -> Any:
    """Triton's name of an argument's type; a list of names for a tuple of integers."""
    match value:
        case Tensor():
            return POINTERS[value.dtype]
        case bool():
            raise TypeError("a kernel's truth values are constants: pass them by keyword")
        case int():
            return "i32"
        case float():
            return "fp32"
        case tuple():
            return [argument_type(one) for one in value]
    raise TypeError(f"{type(value).__name__} cannot be an argument of a kernel")


def variant(kernel: str, types: Sequence[Any], keywords: dict[str, Any]) -> str:
    """The key of a launch: the kernel, the types of its arguments, its constants and its launch options."""
    return json.dumps([kernel, list(types), dict(sorted(keywords.items()))])


def flat(values: Sequence[Any]) -> list[Any]:
    """Arguments, or their types, with tuples taken apart, as kernels take them."""
    return [one for value in values for one in (value if isinstance(value, tuple | list) else (value,))]


def runs_on(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for `target` runs on devices of a compute capability.

    From sm_90 up Triton uses instructions of exactly that architecture. Older code also runs on later minor versions.
    """
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    return major == capability[0] and (minor == capability[1] if major >= 9 else minor <= capability[1])


def archives(package: Path) -> dict[str, Path]:
    """The archives of the artifact whose package lies in `package`, by target."""
    paths = sorted((package / "kernels" / "aot").glob("sm_*.zip"))
    return {path.stem: path for path in paths if TARGET.fullmatch(path.stem)}


@dataclass(frozen=True)
class _Cubin:
    """Machine code: its function, the bytes of shared memory and warps that it runs with, and how many null pointers
    follow its parameters."""

    symbol: str
    shared: int
    num_warps: int
    hidden: int


@dataclass(frozen=True)
class _Variant:
    """The code for a launch: its file, and the numbers of the arguments that must be divisible by `ALIGNMENT`."""

    cubin: str
    divisible: tuple[int, ...]


@dataclass(frozen=True)
class _Kernels:
    """A module of kernels: its constants, and the code for its launches by their `variant`."""

    constants: dict[str, int | float | bool]
    variants: dict[str, _Variant]


@dataclass(frozen=True)
class _Index:
    """The schema of an archive's index."""

    modules: dict[str, _Kernels]
    cubins: dict[str, _Cubin]


class Archive:
    """The code for one target on one device. `content` is the archive's bytes, if the caller has read them already.

    Raises `ArtifactError` where it is damaged.
    """

    def __init__(self, path: Path, device: torch.device, content: bytes | None = None) -> None:
        self.target = path.stem
        self.path = path
        self.device = torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
        try:
            self.files = zipfile.ZipFile(io.BytesIO(path.read_bytes() if content is None else content))
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error
        self.index: dict[str, Any] = parse_json(self.read(INDEX), f"{path}: {INDEX}")
        known = conform(self.index, _Index, f"{path}: {INDEX}")
        lacking = {one.cubin for module in known.modules.values() for one in module.variants.values()}
        lacking -= known.cubins.keys() & {*self.files.namelist()}
        if lacking:
            raise ArtifactError(f"{path} lacks the code {brief(min(lacking))}; {AGAIN}")

    def read(self, name: str) -> bytes:
        """A file of the archive."""
        try:
            if self.files.getinfo(name).file_size > LARGEST_FILE:
                raise ValueError(f"{name} has more than {LARGEST_FILE >> 20} MiB")
            return self.files.read(name)
        except Exception as error:  # zipfile raises many kinds for damaged archives
            raise ArtifactError(
                f"{self.path} cannot be read ({type(error).__name__}: {brief(error)}); {AGAIN}"
            ) from error

    def kernels(self, name: str) -> CompiledKernels:
        """The compiled kernels of the module `name`, to be used like the module."""
        if name not in self.index["modules"]:
            raise ArtifactError(f"{self.path} has no kernels for {name}; {AGAIN}")
        entry = self.index["modules"][name]
        return CompiledKernels(self, entry["constants"], entry["variants"])

    @cache  # noqa: B019 - an archive lives as long as its model
    def function(self, name: str) -> Function:
        """The function in the file `name` of the archive, on the device."""
        about = self.index["cubins"][name]
        with torch.cuda.device(self.device):
            torch.cuda.current_stream().synchronize()  # makes sure that there is a CUDA context
            return load_function(self.read(name), about["symbol"], about["shared"], about["num_warps"])


class CompiledKernels:
    """Stands in for a module of kernels: its attributes are the module's kernels and constants."""

    def __init__(self, archive: Archive, constants: dict[str, Any], variants: dict[str, Any]) -> None:
        self.archive = archive
        self.constants = constants
        self.variants = variants
        self.kernels: dict[str, CompiledKernel] = {}

    @property
    def target(self) -> str:
        return self.archive.target

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self.constants:
            return SimpleNamespace(value=self.constants[name])
        return self.kernels.setdefault(name, CompiledKernel(name, self))


class CompiledKernel:
    """A kernel to be launched as Triton's are: `kernel[grid](*arguments, **constants)`."""

    def __init__(self, name: str, module: CompiledKernels) -> None:
        self.name = name
        self.module = module
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **keywords: self.launch(grid, arguments, keywords)

    def launch(self, grid: tuple[int, ...], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Raises `InputError` where nothing was compiled for such arguments or the driver refuses."""
        kinds = tuple(value.dtype if isinstance(value, Tensor) else type(value) for value in arguments)
        key = kinds, tuple(keywords.items())
        found = self.launches.get(key)
        if found is None:
            found = self.launches[key] = self._find(arguments, keywords)
        found(grid, arguments)

    def _find(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
        types = [argument_type(value) for value in arguments]
        entry = self.module.variants.get(variant(self.name, types, keywords))
        if entry is None:
            raise InputError(
                f"the kernel {self.name} was not compiled for {self.module.target} with {keywords} and arguments "
                f"{types}; compile the model again with --aot and the dtype that it is loaded with"
            )
        archive = self.module.archive
        hidden = archive.index["cubins"][entry["cubin"]]["hidden"]
        return Launch(self.name, archive.function(entry["cubin"]), flat(types), entry["divisible"], hidden)


class Launch:
    """A function with the parameters that it takes: those of `types`, then `hidden` null pointers."""

    def __init__(self, name: str, function: Function, types: list[str], divisible: list[int], hidden: int) -> None:
        self.name = name
        self.function = function
        self.divisible = divisible
        self.hidden = (0,) * hidden
        self.format = struct.Struct("<" + "".join(SLOTS[kind[0]] for kind in types) + "Q" * hidden)
        self.slots = ctypes.create_string_buffer(self.format.size)
        first, count = ctypes.addressof(self.slots), self.format.size // 8
        self.addresses = (ctypes.c_void_p * count)(*(first + 8 * number for number in range(count)))
        self.lock = threading.Lock()  # of the slots, which the driver copies

    def __call__(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in flat(arguments)]
        for at in self.divisible:
            if values[at] % ALIGNMENT:
                raise InputError(
                    f"argument {at} of the kernel {self.name} is {values[at]}, which is not a multiple of {ALIGNMENT} "
                    f'as the compiled kernel needs; load with backend="reference" and report this model'
                )
        with self.lock:
            try:
                self.format.pack_into(self.slots, 0, *values, *self.hidden)
            except struct.error as error:
                raise InputError(
                    f"an argument of the kernel {self.name} does not fit 32 bits ({error}); feed fewer tokens at once"
                ) from error
            self.function.launch(grid, self.addresses)


# ---- the CUDA driver ----


@dataclass(frozen=True)
class Function:
    """A function on a device. It need not keep its module alive: code stays on the device until the process ends."""

    device: int
    handle: ctypes.c_void_p
    shared: int
    num_warps: int

    def launch(self, grid: tuple[int, ...], parameters: Any) -> None:
        """Launch on the current stream of the device. `parameters` holds the addresses of the arguments."""
        x, y, z = (*grid, 1, 1)[:3]
        if not x * y * z:
            return
        with torch.cuda.device(self.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            block = self.num_warps * WARP
            call("cuLaunchKernel", self.handle, x, y, z, block, 1, 1, self.shared, stream, parameters, None)


def load_function(code: bytes, symbol: str, shared: int, num_warps: int) -> Function:
    """Load machine code onto the current device. `shared` is in bytes. Raises `InputError`."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), code)
    call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
    if shared > DEFAULT_SHARED_BYTES:
        call("cuFuncSetCacheConfig", function, PREFER_SHARED)
        call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared)
    return Function(torch.cuda.current_device(), function, shared, num_warps)


@cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library. Raises `InputError` where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise InputError(
            f"the compiled kernels need the CUDA driver, which cannot be loaded ({error}); install NVIDIA's driver or "
            f'load with backend="reference"'
        ) from error


def call(name: str, *arguments: Any) -> None:
    """Call a function of the driver. Raises `InputError` where it does not succeed."""
    library = driver()
    code = getattr(library, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorName(code, ctypes.byref(text))
        raise InputError(
            f"{name} failed with {(text.value or b'an unknown error').decode()} ({code}); update NVIDIA's driver, or "
            f'load with backend="reference"'
        )
