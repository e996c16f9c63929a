from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from pmkvq_compiler.runtime.fused import joined, merged_linears
from pmkvq_compiler.runtime.weights import side_by_side

QKV = ("layers.{layer}.q.weight", "layers.{layer}.k.weight", "layers.{layer}.v.weight")
CPU = torch.device("cpu")


def tensors(rows: tuple[int, ...] = (16, 8, 8), layers: int = 2, columns: int = 8) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        name.replace("{layer}", str(layer)): torch.randn(count, columns)
        for layer in range(layers)
        for name, count in zip(QKV, rows, strict=True)
    }


def placed(found: dict[str, Tensor], groups: list[tuple[str, ...]]) -> dict[str, Tensor]:
    places = side_by_side(found, groups, CPU)
    return {name: places[name].copy_(tensor) if name in places else tensor for name, tensor in found.items()}


def of_layer(weights: dict[str, Tensor], layer: int) -> list[Tensor]:
    return [weights[name.replace("{layer}", str(layer))] for name in QKV]


@pytest.mark.parametrize("layer", [0, 1, 11])
def test_tensors_of_a_group_lie_side_by_side_in_every_layer(layer: int) -> None:
    found = tensors(layers=12)
    weights = placed(found, [QKV])
    assert all(torch.equal(weights[name], found[name]) for name in found)
    together = joined(of_layer(weights, layer))
    assert together is not None
    assert torch.equal(together, torch.cat(of_layer(found, layer)))
    together[17, 0] = 5.0
    assert weights[f"layers.{layer}.k.weight"][1, 0] == 5.0, "it is the same memory"


def test_copies_lie_side_by_side_like_what_they_copy() -> None:
    weights = copy.deepcopy(placed(tensors(), [QKV]))
    assert joined(of_layer(weights, 1)) is not None
    moved = {name: tensor.clone() for name, tensor in weights.items()}
    assert joined(of_layer(moved, 1)) is None


def test_tensors_without_memory_are_placed_in_the_same_way() -> None:
    empty = {name: tensor.to("meta") for name, tensor in tensors().items()}
    assert joined(of_layer(empty, 0)) is None
    places = side_by_side(empty, [QKV], torch.device("meta"))
    whole = joined(of_layer(places, 0))
    assert whole is not None
    assert whole.shape == (32, 8)


def test_what_cannot_be_joined_stays_apart() -> None:
    other_columns = tensors()
    other_columns["layers.0.k.weight"] = torch.randn(8, 16)
    other_dtype = tensors()
    other_dtype["layers.0.v.weight"] = torch.randn(8, 8, dtype=torch.float64)
    missing = tensors()
    del missing["layers.0.v.weight"]
    unaligned = tensors((16, 3, 8), columns=3)
    for found in (other_columns, other_dtype, missing, unaligned):
        places = side_by_side(found, [QKV], CPU)
        assert not {name for name in places if ".0." in name}
        assert joined([found["layers.0.q.weight"], found["layers.0.k.weight"]]) is None


def test_a_tensor_lies_in_one_place() -> None:
    """A group without layers, and one that shares a tensor with it."""
    found = tensors(layers=1)
    names = ("layers.0.q.weight", "layers.0.k.weight")
    places = side_by_side(found, [names, QKV], CPU)
    assert places.keys() == {*names}


def test_neighbours_in_another_order_are_not_joined() -> None:
    q, k, v = of_layer(placed(tensors(), [QKV]), 0)
    assert joined([q, k]) is not None
    for order in ([k, q], [q, v], [q, k[1:]], [q, k.T.contiguous().T]):
        assert joined(order) is None


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("side", [True, False])
def test_products_side_by_side_are_those_of_each_weight(side: bool, biased: bool) -> None:
    found, groups = tensors(), [QKV] if side else []
    found |= {name.replace("weight", "bias"): tensor[:, 0].clone() for name, tensor in tensors().items()}
    weights = placed(found, [*groups, tuple(name.replace("weight", "bias") for name in QKV)] if side else [])
    biases = [weights[name.replace("{layer}", "1").replace("weight", "bias")] for name in QKV] if biased else None
    x, norm = torch.randn(2, 3, 8), torch.rand(8)
    out = merged_linears(x, of_layer(weights, 1), biases, norm, 1e-5)
    normed = torch.nn.functional.rms_norm(x, [8], norm, 1e-5)
    for at, (one, weight) in enumerate(zip(out, of_layer(found, 1), strict=True)):
        expected = normed @ weight.T + (biases[at] if biases else 0)
        assert torch.allclose(one, expected, atol=1e-6)
    together = {one.untyped_storage().data_ptr() for one in out}
    assert len(together) == (1 if side else 3), "one product computes them all"
