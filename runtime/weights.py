"""The tensors of an artifact: compared with the manifest, and read onto a device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import ArtifactError
from .manifest import AGAIN, DTYPES, MANIFEST, Artifact, brief

LAYER = "{layer}"
"""Stands for the index of every layer in the names of tensors that are to lie side by side."""

ALIGNMENT = 16
"""Bytes that kernels load at once."""


def tensor_table(path: Path) -> dict[str, str]:
    """Dtype and shape of every tensor of a safetensors file, as in "F32 [128, 64]". Raises `ArtifactError`."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read ({brief(error)}); {AGAIN}") from error


def check_tensors(artifact: Artifact) -> None:
    """Raises `ArtifactError` where a tensor is missing, is not listed, or has another dtype or shape."""
    for path, expected in tensor_files(artifact):
        found = tensor_table(path)
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name) != expected.get(name):
                raise ArtifactError(
                    f"{path}: tensor {brief(name)} is {brief(found.get(name, 'missing'))} where {MANIFEST} "
                    f"says {brief(expected.get(name, 'nothing about it'))}; {AGAIN}"
                )


def tensor_files(artifact: Artifact) -> list[tuple[Path, dict[str, str]]]:
    """Every safetensors file, the constants last, and the table of its tensors."""
    manifest = artifact.manifest
    constants = artifact.package.folder / manifest.constants.partition("/")[2]
    checkpoint = [(artifact.folder / name, manifest.tensors[name]) for name in manifest.weights]
    return [*checkpoint, (constants, manifest.tensors[manifest.constants])]


def empty_weights(artifact: Artifact, target: torch.dtype) -> dict[str, Tensor]:
    """The weights and constants without memory. Raises `ArtifactError`.

    Weights that are stored in the model's own dtype have the dtype `target`; constants, and weights that the model
    keeps in float32, stay as they are.
    """
    stored = DTYPES[artifact.manifest.plan.dtype]
    *checkpoint, constants = [file for file, _ in tensor_files(artifact)]
    try:
        weights = {name: one.to(target) if one.dtype == stored else one for name, one in empty_tensors(checkpoint)}
        return weights | dict(empty_tensors([constants]))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"the weights in {artifact.folder} cannot be read ({brief(error)}); {AGAIN}") from error


def empty_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The names of the tensors in safetensors files, and tensors like them without memory."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dictionary
                part = file.get_slice(name)
                some = part[:0] if part.get_shape() else file.get_tensor(name)
                yield name, torch.empty(part.get_shape(), dtype=some.dtype, device="meta")


def read_weights(
    artifact: Artifact, empty: Mapping[str, Tensor], device: torch.device, groups: Iterable[Sequence[str]]
) -> dict[str, Tensor]:
    """The weights and constants on a device, in the dtypes of the `empty` ones. Tensors of `groups` lie side by side.

    Raises `ArtifactError`.
    """
    weights, places = {}, side_by_side(empty, groups, device)
    try:
        for path, _ in tensor_files(artifact):
            with safe_open(path, framework="pt", device=str(device)) as file:
                for name in file.keys():  # noqa: SIM118 - it is no dictionary
                    tensor = file.get_tensor(name).to(empty[name].dtype)
                    weights[name] = places[name].copy_(tensor) if name in places else tensor
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"the weights in {artifact.folder} cannot be read ({brief(error)}); {AGAIN}") from error
    return weights


def side_by_side(
    tensors: Mapping[str, Tensor], groups: Iterable[Sequence[str]], device: torch.device
) -> dict[str, Tensor]:
    """Memory on a device for the tensors that `groups` names, those of a group side by side; see `fused.joined`.

    In the names of a group, LAYER stands for every layer that has them all. Tensors that cannot be joined, or would not
    begin at multiples of ALIGNMENT bytes, are left out.
    """
    places: dict[str, Tensor] = {}
    for names in _of_every_layer(groups, tensors):
        first, *others = group = [tensors[name] for name in names]
        alike = all((one.shape[1:], one.dtype) == (first.shape[1:], first.dtype) for one in others)
        if alike and not any(one.nbytes % ALIGNMENT for one in group) and places.keys().isdisjoint(names):
            sizes = [len(one) for one in group]
            whole = torch.empty(sum(sizes), *first.shape[1:], dtype=first.dtype, device=device)
            places |= zip(names, whole.split(sizes), strict=True)
    return places


def _of_every_layer(groups: Iterable[Sequence[str]], names: Iterable[str]) -> Iterator[list[str]]:
    """The groups of names that are all among `names`."""
    known, in_order = set(names), sorted(names)
    for group in groups:
        pattern = re.escape(group[0]).replace(re.escape(LAYER), "([0-9]+)")
        found = [match for name in in_order if (match := re.fullmatch(pattern, name))]
        for match in found:
            own = [name.replace(LAYER, match[1]) for name in group] if match.re.groups else [*group]
            if known.issuperset(own):
                yield own
