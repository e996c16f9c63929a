"""What a user may choose: one frozen record, filled by the command line or by a caller of `compile_model`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

RECIPE_SUMMARIES = {
    "best": "what measures best",
    "pm-kvq": "the paper's, as its published code plans",
    "kivi": "a baseline: the same bits in every layer at once, K by channel over 32 tokens",
    "rotation": "a baseline: the same bits in every layer at once, K and V rotated",
    "uniform": "a baseline: the same bits in every layer at once, by token",
    "none": "the cache in the model's own dtype",
}
"""What each recipe is, in the order in which they are told. `recipes.RECIPES` has the recipes themselves."""
RECIPE_NAMES = tuple(RECIPE_SUMMARIES)
TARGETS = ("sm_80", "sm_90", "sm_100")
"""Architectures that kernels can be compiled for ahead of time."""


def final_bits() -> tuple[int, ...]:
    """The widths that layers may end at, widest first."""
    from pmkvq_compiler.runtime.plan import FINAL_BITS  # loads torch, for which `--help` does not wait

    return FINAL_BITS


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
    bits: tuple[int, ...] = field(default_factory=final_bits)
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
