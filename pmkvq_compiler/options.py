"""What a user may choose: one frozen record, filled by the command line or by a caller of `compile_model`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TARGETS = ("sm_80", "sm_90", "sm_100")
"""GPU architectures that kernels can be compiled for ahead of time."""


@dataclass(frozen=True)
class CompileOptions:
    """Options of one compile. Lengths are in tokens. `None` means that the model or the recipe decides."""

    model: str
    """A hub id, the folder of a Hugging Face model, a `.gguf` file, or `demo`."""
    output: Path
    """Folder of the artifact."""
    budget: str | None = None
    """`512MiB`, `25%` (of the 16-bit cache) or `3.2bits` (a number, on average); every recipe but `none` needs it."""
    max_len: int | None = None
    """Longest sequence, prompt and answer together."""
    batch_size: int = 1
    """Sequences that the cache holds at the same time."""
    serve: bool = False
    """Whether the budget also holds these sequences in vLLM, whose pages, rows and whole blocks take more."""
    recipe: str = "best"
    """A name in `recipes.RECIPES`."""
    bits: tuple[int, ...] | None = None
    """Code widths that layers may end at; `None` allows all of them."""
    sink: int | None = None
    """First tokens of a sequence that are not quantized."""
    window: int | None = None
    """Most recent tokens that are not quantized."""
    block: int | None = None
    """Tokens that are quantized together, a multiple of 16."""
    calib: str = "builtin"
    """A text file, a file of JSON lines, or `builtin`."""
    calib_samples: int = 4
    """Pieces of the calibration text; 8 take twice as long as 4 and lost 6 to 13% less in our benchmark."""
    calib_len: int = 1024
    """Tokens of each piece."""
    effective_len: int | None = None
    """Positions that a piece is spread over while PM-KVQ's scales and gradients are measured."""
    device: str = "auto"
    """Device that the model is measured on: `auto` (`cuda` if there is a GPU), `cpu`, `cuda:1`, or `cuda`, which
    is all GPUs if the model does not fit one."""
    dtype: str = "auto"
    """What the artifact stores: `float32`, `bfloat16`, `float16`, or `auto` for the checkpoint's own. For a GGUF file,
    `auto` is float32, or bfloat16 above a billion parameters unless they are stored in float32."""
    aot: tuple[str, ...] = ()
    """Members of `TARGETS` to compile the kernels for."""
    onnx: bool = False
    """Also write `model.onnx`."""
    whole: bool = False
    """Of a multimodal model, keep the modules that are not compiled, so that transformers and vLLM load it whole."""
    dump_passes: Path | None = None
    """Folder for the program after each pass, as readable Python."""
    dry_run: bool = False
    """Measure and plan, but write nothing."""
    force: bool = False
    """Replace an artifact that is in `output`."""
