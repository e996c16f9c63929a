"""What a user may choose: one frozen record, filled by the command line or by a caller of `compile_model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "sm_100")
"""Architectures that kernels can be compiled for ahead of time."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compile. Lengths are in tokens; `None` means "decide from the model"."""

    model: str
    output: Path
    budget: str | None = None
    """`512MiB`, `25%` (of the 16-bit cache) or `3.2bits` (true bits a number); needed by every recipe but `none`."""
    max_len: int | None = None
    batch_size: int = 1
    recipe: str = "best"
    bits: tuple[int, ...] | None = None
    """Widths that layers may end at; `None` is all of them."""
    sink: int | None = None
    window: int | None = None
    block: int | None = None
    calib: str = "builtin"
    calib_samples: int = 4
    calib_len: int = 1024
    effective_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    aot: tuple[str, ...] = ()
    onnx: bool = False
    dump_passes: Path | None = None
    """Folder for the program after each pass, as readable Python."""
    dry_run: bool = False
    force: bool = False
