"""The request of a compile, resolved once.

`resolve` reads the options right after the capture, when the model's attention layers are known, and returns a
`Problem`. All code that measures, plans or reports reads that problem and no longer looks at the options.
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
from pmkvq_compiler.runtime.plan import CODE_BITS, FINAL_BITS, StatePlan
from pmkvq_compiler.runtime.quantize import WORD_BITS
from pmkvq_compiler.unquantized import cache_bytes_at_16_bits


@dataclass(frozen=True)
class Problem:
    """A request for one model. Lengths are in tokens and sizes in bytes."""

    sites: tuple[AttentionSite, ...]
    states: tuple[StatePlan, ...]
    """The states that ops besides attention carry from token to token. No budget covers them."""
    dtype: torch.dtype
    """The dtype of the model's weights, and of the tokens in sink and window."""
    max_len: int
    batch_size: int
    serve: bool
    """Whether the budget is also that of vLLM's cache."""
    recipe_name: str
    recipe: Recipe
    """The named recipe, with the user's sink, window and block where they were given."""
    bits: tuple[int, ...]
    """Code widths that layers may end at."""
    budget: int | None
    """None if the recipe quantizes nothing: then the cache takes as much as it needs."""
    device: str
    """Device that the model is measured on."""
    calib: str
    calib_samples: int
    calib_len: int
    effective_len: int | None
    """Number of positions that the tokens of a text are spread over; None stands for the larger of `max_len` and
    `calib_len`."""

    @property
    def original_bytes(self) -> int:
        """Bytes that the whole cache would take at 16 bits a number."""
        return cache_bytes_at_16_bits(self.sites, self.max_len, self.batch_size)


def resolve(
    options: CompileOptions,
    sites: Sequence[AttentionSite],
    max_len: int,
    dtype: torch.dtype,
    states: tuple[StatePlan, ...] = (),
) -> Problem:
    """Resolve `options` for a model of `dtype` whose attention layers are `sites` and whose other states are `states`,
    with sequences of up to `max_len` tokens. Raises `UsageError` for options that no cache can have."""
    recipe = resolved(options)
    _check_cache(options, recipe)
    if options.serve and states:
        raise UsageError(
            "the model has layers with a recurrent state, which vLLM serves only from the original model; leave "
            "--serve out"
        )
    original = cache_bytes_at_16_bits(sites, max_len, options.batch_size)
    if original > LARGEST_BYTES:
        raise UsageError(
            f"the cache of {options.batch_size:,} sequence(s) of {max_len:,} tokens takes {original:,} bytes at 16 "
            f"bits, more than any machine holds; choose a smaller --batch-size or --max-len"
        )
    return Problem(
        sites=tuple(sites),
        states=states,
        dtype=dtype,
        max_len=max_len,
        batch_size=options.batch_size,
        serve=options.serve,
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
        raise UsageError(f"recipe {options.recipe!r} needs a budget; give one, such as --budget 25%")
    if options.serve and not recipe.quantizes:
        raise UsageError(
            f"--serve counts pages of quantized keys and values, and recipe {options.recipe!r} has none; leave one of "
            f"them out"
        )
    if recipe.block < WORD_BITS or recipe.block % WORD_BITS:
        raise UsageError(f"a block of {recipe.block} tokens is not a multiple of {WORD_BITS}; choose 64")
    if recipe.sink < 0 or not recipe.windows:
        raise UsageError(
            f"sink {recipe.sink} and window {options.window} are not possible; choose a window that holds at least one "
            f"block of {recipe.block} tokens, and a sink of 0 or more tokens"
        )
    wrong = [bits for bits in options.bits or () if bits not in CODE_BITS]
    if wrong or options.bits == ():
        raise UsageError(f"bits {wrong or 'none'} cannot be stored; choose among {', '.join(map(str, CODE_BITS))}")


def pick_device(name: str) -> str:
    """The device to measure the model on; `auto` is the GPU if there is one. Raises `UsageError` for a device that
    cannot be used."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        usable = torch.device(name).type in ("cpu", "cuda")
        torch.empty(0, device=name if usable else "cpu")
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used here; choose auto, cpu or cuda") from error
    if not usable:
        raise UsageError(f"device {name!r} cannot be used to measure a model; choose auto, cpu or cuda")
    return name
