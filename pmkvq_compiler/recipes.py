"""The recipes: what each of them lets the planner choose from.

`RECIPES` is the only list of them. The command line, its help, and the tests of guides and planner read it in this
order. Experiments may add entries of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from pmkvq_compiler.errors import UsageError
from pmkvq_compiler.options import CompileOptions

if TYPE_CHECKING:  # the command line lists the recipes before it loads torch
    from pmkvq_compiler.formats import Transform
    from pmkvq_compiler.runtime.plan import KeyAxis


@dataclass(frozen=True)
class Recipe:
    """What a plan may be made of.

    `key_axes`, `key_transforms`, `value_transforms` and `windows` (in tokens) span the formats that K and V may have.
    If `key_axes` is empty, nothing is quantized. The transform "scale" is used only for K grouped by token: a group
    along one channel is quantized equally well whatever the channel's scale. `sink` and `block` are in tokens.

    `measure` is what the planner minimizes: the predicted loss of the model's output ("output"), or PM-KVQ's measure
    ("gradient"). With `same_bits`, K and V have equally wide codes. With `per_layer`, layers may differ. With
    `progressive`, codes begin at 16 bits and get narrower as the cache fills. With `exact_layers`, layers may also stay
    unquantized. `summary` explains the recipe in the help; it does not affect what is measured.
    """

    key_axes: tuple[KeyAxis, ...] = ("token",)
    key_transforms: tuple[Transform, ...] = ("none",)
    value_transforms: tuple[Transform, ...] = ("none",)
    windows: tuple[int, ...] = (128,)
    sink: int = 4
    block: int = 64
    measure: Literal["output", "gradient"] = "output"
    same_bits: bool = True
    per_layer: bool = False
    progressive: bool = False
    exact_layers: bool = False
    summary: str = field(default="", repr=False, compare=False)

    @property
    def quantizes(self) -> bool:
        """Whether the recipe quantizes anything."""
        return bool(self.key_axes)


RECIPES = {
    "best": Recipe(
        summary="the best quality in our benchmarks: chooses for each layer the bits of K and of V, how K is grouped, "
        "how many recent tokens stay exact, and linear maps that make K and V easier to quantize",
        key_axes=("token", "channel"),
        key_transforms=("none", "match"),
        value_transforms=("none", "match"),
        windows=(64, 96, 128, 192, 256),
        same_bits=False,
        per_layer=True,
        progressive=True,
        exact_layers=True,
    ),
    "pm-kvq": Recipe(
        summary="the paper's method as its published code plans: chooses bits for each layer from gradients; K and V "
        "share them, both are grouped by token, and K's scales are folded into the weights",
        key_transforms=("scale",),
        sink=1,
        measure="gradient",
        per_layer=True,
        progressive=True,
    ),
    "kivi": Recipe(
        summary="a baseline after KIVI: the same bits in every layer from the first block on; K is grouped by channel "
        "over 32 tokens, V by token",
        key_axes=("channel",),
        sink=0,
        block=32,
    ),
    "rotation": Recipe(
        summary="a baseline: like uniform, but K and V are rotated by a Hadamard matrix before they are quantized",
        key_transforms=("rotate",),
        value_transforms=("rotate",),
    ),
    "uniform": Recipe(
        summary="the simplest baseline: the same bits in every layer from the first block on; K and V are grouped by "
        "token and quantized as they are"
    ),
    "none": Recipe(
        summary="no quantization: the cache stays in the model's own dtype and takes no --budget",
        key_axes=(),
        sink=0,
        exact_layers=True,
    ),
}


def resolved(options: CompileOptions) -> Recipe:
    """The recipe that the options name, with the user's sink, window and block where they are given.

    Windows that are shorter than a block are left out, so `windows` may end up empty. Raises `UsageError` if there is
    no recipe of that name.
    """
    recipe = RECIPES.get(options.recipe)
    if recipe is None:
        raise UsageError(f"there is no recipe {options.recipe!r}; choose among {', '.join(RECIPES)}")
    block = recipe.block if options.block is None else options.block
    windows = recipe.windows if options.window is None else (options.window,)
    return replace(
        recipe,
        sink=recipe.sink if options.sink is None else options.sink,
        windows=tuple(window for window in windows if window >= block),
        block=block,
    )
