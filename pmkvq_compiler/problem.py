"""What a compile is asked for, resolved once.

`resolve` reads the options right after the capture, when the model's attention is known. Whatever measures, plans or
reports reads the `Problem` that it makes and asks no option again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pmkvq_compiler.budget import LARGEST_BYTES, parse_budget
from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.passes.program import AttentionSite
from pmkvq_compiler.recipes import Recipe, resolved
from pmkvq_compiler.runtime.plan import CODE_BITS, FINAL_BITS
from pmkvq_compiler.runtime.quantize import WORD_BITS
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits


@dataclass(frozen=True)
class Problem:
    """A request for one model: lengths are in tokens, sizes in bytes."""

    sites: tuple[AttentionSite, ...]
    dtype: torch.dtype
    """The model's own, in which sink and window are kept."""
    max_len: int
    batch_size: int
    recipe_name: str
    recipe: Recipe
    """With the user's sink, window and block in place of its own."""
    bits: tuple[int, ...]
    """Final widths to choose from."""
    budget: int | None
    """None where the recipe takes what it takes."""
    device: str
    """Where the model runs to be measured."""
    calib: str
    calib_samples: int
    calib_len: int
    effective_len: int | None
    """Length that the positions of a text are stretched to; None: decided from `max_len`."""

    @property
    def original_bytes(self) -> int:
        """Bytes of the whole cache at 16 bits a number."""
        return cache_bytes_at_16_bits(self.sites, self.max_len, self.batch_size)


def resolve(options: CompileOptions, sites: Sequence[AttentionSite], max_len: int, dtype: torch.dtype) -> Problem:
    """The problem that `options` pose for a model of `dtype` whose attention is at `sites`, with `max_len` tokens a
    sequence. Raises `UsageError` for options that no cache can have."""
    recipe = resolved(options)
    _check_cache(options, recipe)
    original = cache_bytes_at_16_bits(sites, max_len, options.batch_size)
    if original > LARGEST_BYTES:
        raise UsageError(
            f"the cache of {options.batch_size:,} sequence(s) of {max_len:,} tokens has {original:,} bytes at 16 bits, "
            f"more than any machine holds; choose a smaller --batch-size or --max-len"
        )
    return Problem(
        sites=tuple(sites),
        dtype=dtype,
        max_len=max_len,
        batch_size=options.batch_size,
        recipe_name=options.recipe,
        recipe=recipe,
        bits=FINAL_BITS if options.bits is None else options.bits,
        budget=None if options.budget is None else parse_budget(options.budget, original),
        device=pick_device(options.device),
        calib=options.calib,
        calib_samples=options.calib_samples,
        calib_len=options.calib_len,
        effective_len=options.effective_len,
    )


def _check_cache(options: CompileOptions, recipe: Recipe) -> None:
    if options.budget is None and recipe.quantizes:
        raise UsageError(f"recipe {options.recipe!r} needs a budget; give --budget, 25% for example")
    if recipe.block < WORD_BITS or recipe.block % WORD_BITS:
        raise UsageError(f"a block of {recipe.block} tokens is not a multiple of {WORD_BITS}; choose 64")
    if recipe.sink < 0 or not recipe.windows:
        raise UsageError(
            f"sink {recipe.sink} and window {options.window} are not possible: a window holds at least one block of "
            f"{recipe.block} tokens, a sink none or more"
        )
    wrong = [bits for bits in options.bits or () if bits not in CODE_BITS]
    if wrong or options.bits == ():
        raise UsageError(f"bits {wrong or 'none'} cannot be stored; choose among {', '.join(map(str, CODE_BITS))}")


def pick_device(name: str) -> str:
    """The device to run the model on; `auto` is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.device(name).type in ("cpu", "cuda")
        torch.empty(0, device=name if usable else "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here; choose auto, cpu or cuda") from error
    if not usable:
        raise UsageError(f"device {name!r} cannot run a calibration; choose auto, cpu or cuda")
    return name
