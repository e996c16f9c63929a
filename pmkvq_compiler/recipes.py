"""The recipes: what each of them lets the planner choose from.

`RECIPES` is the one list of them. The command line, its help, the guides' tests and the planner's tests read it, in its
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

    `key_axes`, `key_transforms` and `value_transforms` span the formats of K and V; "scale" is meant for K
    grouped by token and is left out by channel, whose own group does not mind a scale. Without `key_axes` nothing is
    quantized. `measure` is what the planner minimizes: the predicted loss of the output ("output"), or PM-KVQ's measure
    ("gradient"). `same_bits`: K and V share a width. `per_layer`: layers may differ. `progressive`: codes begin at 16
    bits. `exact_layers`: a layer may also stay unquantized. `summary` says in the help what the recipe is; it changes
    nothing that is measured.
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
        """Whether it has any format of codes to choose."""
        return bool(self.key_axes)


RECIPES = {
    "best": Recipe(
        summary="what measures best",
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
        summary="the paper's, as its published code plans",
        key_transforms=("scale",),
        sink=1,
        measure="gradient",
        per_layer=True,
        progressive=True,
    ),
    "kivi": Recipe(
        summary="a baseline: the same bits in every layer at once, K by channel over 32 tokens",
        key_axes=("channel",),
        sink=0,
        block=32,
    ),
    "rotation": Recipe(
        summary="a baseline: the same bits in every layer at once, K and V rotated",
        key_transforms=("rotate",),
        value_transforms=("rotate",),
    ),
    "uniform": Recipe(summary="a baseline: the same bits in every layer at once, by token"),
    "none": Recipe(summary="the cache in the model's own dtype", key_axes=(), sink=0, exact_layers=True),
}


def resolved(options: CompileOptions) -> Recipe:
    """The recipe of the options with the user's sink, window and block in place of its own. `windows` keeps those that
    hold a block, which may be none. Raises `UsageError` for a name that is no recipe's."""
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
