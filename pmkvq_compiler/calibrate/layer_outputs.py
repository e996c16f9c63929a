"""The outputs of every layer of the source model for one text, in float32, to compare an artifact's layers with.

Rounding errors of 16-bit dtypes grow from layer to layer until they hide a fault, so the outputs are computed in
float32. When the artifact is checked, each of its layers starts from the output of the source's layer before it. So the
error that is found in a layer was made in that layer.

The process that checks an artifact imports this module, so it does without transformers, which takes seconds to import.
`watch_layers` runs the source model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

TOKENS = 64
"""How many tokens from the beginning of the text are used."""
QUERIES = 8
"""How many of the last of these tokens have their scores and logits kept."""


@dataclass(frozen=True)
class LayerOutputs:
    """Scores and hidden states of every layer by its index, and the logits of the model; all float32 on the CPU.

    `scores` [Hq, QUERIES, TOKENS] are the products of the last queries with all keys, without scale and soft cap.
    `hidden` [1, TOKENS, hidden_size] is the tensor that a layer passes to the next one; some architectures give it
    another shape. Both are empty if the model's layers are not a list of modules. `logits` are [QUERIES, V].
    """

    logits: Tensor
    scores: dict[int, Tensor] = field(default_factory=dict)
    hidden: dict[int, Tensor] = field(default_factory=dict)


def layer_tensors(layers: LayerOutputs) -> dict[str, Tensor]:
    """The tensors of `layers` by the names under which a file stores them. `layers_of` is the inverse."""
    tensors = {"layers.logits": layers.logits}
    tensors |= {f"layers.scores.{layer}": scores for layer, scores in layers.scores.items()}
    return tensors | {f"layers.hidden.{layer}": hidden for layer, hidden in layers.hidden.items()}


def layers_of(tensors: Mapping[str, Tensor]) -> LayerOutputs:
    found: dict[str, dict[int, Tensor]] = {"scores": {}, "hidden": {}}
    for name, tensor in tensors.items():
        kind, _, layer = name.removeprefix("layers.").partition(".")
        if name.startswith("layers.") and layer:
            found[kind][int(layer)] = tensor
    return LayerOutputs(tensors["layers.logits"], **found)
