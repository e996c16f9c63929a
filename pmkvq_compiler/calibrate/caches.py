"""Shows every attention call of a transformers model as it will be over the artifact's caches.

Layers may read the cache of another layer, and the cache of latent attention holds latents where the model's own code
has expanded them to the keys and values of every head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pmkvq_compiler.calibrate.attention_hook import AttentionCall
from pmkvq_compiler.passes.program import AttentionSite, Latent
from pmkvq_compiler.problem import Problem

Restore = Callable[[Tensor], Tensor]
"""From the output of a call over the cache to the output that the model's code expects."""


@dataclass(frozen=True)
class LatentCache:
    """Latent attention of a layer: its expanding linear layer, whose last input [B, S, R] is kept in `inputs`."""

    latent: Latent
    expand: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.expand.register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.inputs[:] = arguments[:1]

    def compressed(self, call: AttentionCall) -> tuple[AttentionCall, Restore]:
        """The call over latents, by the rules of `CompressLatents`."""
        latent, nope = self.latent, self.latent.key_dim
        weight = self.expand.weight.unflatten(0, (latent.num_heads, nope + latent.value_dim))
        (inputs,) = self.inputs
        vector = inputs.reshape(call.key.shape[0], 1, call.key.shape[2], -1)
        query = torch.cat([call.query[..., :nope] @ weight[:, :nope], call.query[..., nope:]], dim=-1)
        key = torch.cat([vector, call.key[:, :1, :, nope:]], dim=-1)
        from_latent = weight[:, nope:].transpose(1, 2)
        return replace(call, query=query, key=key, value=vector), lambda out: out @ from_latent.to(out.dtype)


@dataclass(frozen=True)
class Caches:
    """`cache_of` names, for each layer that reads the cache of another one, that layer."""

    cache_of: Mapping[int, int] = field(default_factory=dict)
    latents: Mapping[int, LatentCache] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, problem: Problem) -> Caches:
        """The caches that an artifact of `model` has."""
        return cls(problem.cache_of, latent_caches(model, problem.sites))

    def seen(self, call: AttentionCall) -> tuple[AttentionCall, Restore]:
        """The call as it is over the cache, and how to make the model's output of the call's."""
        call = replace(call, layer=self.cache_of.get(call.layer, call.layer))
        if call.layer in self.latents:
            return self.latents[call.layer].compressed(call)
        return call, lambda out: out


def latent_caches(model: nn.Module, sites: tuple[AttentionSite, ...]) -> dict[int, LatentCache]:
    found = {}
    for site in sites:
        if site.latent is not None:
            expand = model.get_submodule(site.latent.weight.removesuffix(".weight"))
            assert isinstance(expand, nn.Linear)
            found[site.layer] = LatentCache(site.latent, expand)
    return found
