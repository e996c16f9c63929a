"""An op that mixes tokens, and leaves no marker, is found; ops on each token by itself are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph

from pmkvq_compiler.errors import CompileError
from pmkvq_compiler.source.token_mixing import check_mixing


def shifted_in_place(x: Tensor) -> Tensor:
    out = x.clone()
    out.copy_(F.pad(x, (0, 0, 1, 0))[:, :-1])
    return out


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "the token before": lambda x: x + F.pad(x, (0, 0, 1, 0))[:, :-1],
    "the token before, in place": shifted_in_place,
    "the last token": lambda x: x + x[:, -1:],
    "the largest token": lambda x: x - x.amax(1, keepdim=True),
    "a product over tokens": lambda x: x @ torch.einsum("bsc,bsd->bcd", x, x),
    "a running sum": lambda x: x.cumsum(1),
    "a running sum, counted from the end": lambda x: x.transpose(1, 2).cumsum(-1).transpose(1, 2),
    "a mean": lambda x: x - x.mean(1, keepdim=True),
    "a sum": lambda x: x * x.sum((1, 2), keepdim=True),
    "the reverse": lambda x: x.flip(1),
    "a rotation": lambda x: x.roll(1, 1),
    "attention by itself": lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "a softmax over tokens": lambda x: x.softmax(1),
    "a convolution": lambda x: F.conv1d(x.transpose(1, 2), torch.ones(8, 1, 3), padding=2, groups=8),
    "linear attention": lambda x: x @ (x.transpose(1, 2) @ x),
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "a norm": lambda x: F.rms_norm(x, [8]) + x.mean(-1, keepdim=True),
    "heads": lambda x: x.view(*x.shape[:2], 2, 4).transpose(1, 2).flatten(2),
    "parts of channels": lambda x: torch.cat([-x[..., 4:], x[..., :4]], -1).cumsum(-1),
    "tokens in one row": lambda x: (x.flatten(0, 1) @ torch.ones(8, 8)).view(x.shape),
    "the best channels": lambda x: x.topk(2).values,
    "a look at all tokens that changes nothing": lambda x: x + 0 * x.shape[0] if x.max() is None else x,
    "experts": lambda x: x.flatten(0, 1).repeat_interleave(2, dim=0).view(-1, 2, 8).sum(1),
}


def graph_of(function: Callable[[Tensor], Tensor]) -> Graph:
    class Toy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    shape = {0: Dim("batch"), 1: Dim("sequence")}
    return torch.export.export(Toy(), (torch.zeros(2, 7, 8),), dynamic_shapes=(shape,), strict=False).graph


def check(function: Callable[[Tensor], Tensor]) -> None:
    graph = graph_of(function)
    (x,) = (node for node in graph.find_nodes(op="placeholder") if node.meta["val"].dim() == 3)
    check_mixing(graph, "toy", x.meta["val"].shape[1])


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_tokens_is_refused(name: str) -> None:
    with pytest.raises(CompileError, match=r"toy mixes tokens outside of attention \(aten"):
        check(MIXING[name])


@pytest.mark.parametrize("name", ALONE)
def test_what_each_token_computes_alone_is_not(name: str) -> None:
    check(ALONE[name])
