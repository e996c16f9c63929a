"""The recipes: what each of them lets the planner choose from. Experiments may add entries of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pmkvq_compiler.formats import Format, Transform
from pmkvq_compiler.options import CompileOptions
from pmkvq_compiler.runtime.plan import KeyAxis


@dataclass(frozen=True)
class Recipe:
    """What a plan may be made of.

    `key_axes`, `key_transforms` and `value_transforms` span the formats of K and V; "scale" is meant for K
    grouped by token and is left out by channel, whose own group does not mind a scale. `measure` is what
    the planner minimizes: the predicted loss of the output ("output"), or PM-KVQ's measure ("gradient").
    `same_bits`: K and V share a width. `per_layer`: layers may differ. `progressive`: codes begin at 16 bits.
    `exact_layers`: a layer may also stay unquantized.
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


RECIPES = {
    "best": Recipe(
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
        key_transforms=("scale",),
        sink=1,
        measure="gradient",
        per_layer=True,
        progressive=True,
    ),
    "kivi": Recipe(
        key_axes=("channel",),
        sink=0,
        block=32,
    ),
    "rotation": Recipe(
        key_transforms=("rotate",),
        value_transforms=("rotate",),
    ),
    "uniform": Recipe(),
    "none": Recipe(sink=0, exact_layers=True),
}


def resolved(options: CompileOptions) -> Recipe:
    """The recipe of the options with the user's sink, window and block in place of its own. `windows` keeps those that
    hold a block, which may be none."""
    recipe = RECIPES[options.recipe]
    block = recipe.block if options.block is None else options.block
    windows = recipe.windows if options.window is None else (options.window,)
    return replace(
        recipe,
        sink=recipe.sink if options.sink is None else options.sink,
        windows=tuple(window for window in windows if window >= block),
        block=block,
    )


def key_formats(recipe: Recipe, bits: tuple[int, ...], can_scale: bool) -> list[Format]:
    """The ways to keep K; where scales cannot be folded, or K is grouped by channel, "scale" becomes "none"."""

    def transforms(axis: KeyAxis) -> dict[Transform, None]:
        scales = can_scale and axis == "token"
        return dict.fromkeys("none" if one == "scale" and not scales else one for one in recipe.key_transforms)

    return [
        Format(width, axis, transform, window)
        for width in bits
        for axis in recipe.key_axes
        for transform in transforms(axis)
        for window in recipe.windows
    ]


def value_formats(recipe: Recipe, bits: tuple[int, ...], can_transform: bool) -> list[Format]:
    """The ways to keep V; where nothing can be folded, all transforms are "none"."""
    transforms: dict[Transform, None] = dict.fromkeys(
        one if can_transform else "none" for one in recipe.value_transforms
    )
    return [
        Format(width, "token", transform, window)
        for width in bits
        for transform in transforms
        for window in recipe.windows
    ]
