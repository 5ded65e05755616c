"""Matches the tensors of a checkpoint with the leaves of a network."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from jlora._src.types import Path as LeafPath
from jlora.files.errors import ModelError, first_bullets
from jlora.files.hub_files import CONFIG
from jlora.files.quantized_tensors import QuantizedTensor
from jlora.files.safetensors import Tensor
from jlora.files.tensor_names import TensorNames, torch_shape
from jlora.models._family import Family
from jlora.models._reading import are_equal

Stored: TypeAlias = Tensor | QuantizedTensor
_NEW_HEAD = "; pass key=jax.random.key(0) to start a new head"


def match_tensors(
    folder: Path,
    tensors: Mapping[str, Stored],
    names: TensorNames,
    shapes: Mapping[LeafPath, Any],
    family: Family,
    ties: Mapping[str, str],
    *,
    may_start: bool,
) -> dict[LeafPath, list[Any]]:
    """The tensors of each leaf.

    Args:
      folder: the checkpoint's, for messages.
      tensors: of the checkpoint, by name.
      names: of the network's leaves.
      shapes: of the network's leaves.
      family: of the network.
      ties: the embedding to which each output projection is tied. If a file has only one of the two, it serves as both.
      may_start: skip leaves of a head that the checkpoint lacks, or has in another shape.

    Raises:
      ModelError: listing every tensor that is missing, unknown to the network, of another shape, or different in value
        from the one it is tied to.
    """
    own = {tensor for name in names.values() for tensor in name.files}
    available, foreign = _by_network_name(tensors, own | set(ties), family)
    untied = _conflicts(available, {head: table for head, table in ties.items() if head not in own})
    for pair in ties.items():
        for absent, present in (pair, pair[::-1]):
            if absent not in available and present in available:
                available[absent] = available[present]
    heads = {path for path in shapes if re.search(family.heads, path)}
    found: dict[LeafPath, list[Any]] = {}
    unfit: list[str] = []
    for path, shape in shapes.items():
        wrong = _unfit(available, names[path].files, torch_shape(shape.shape, names[path]))
        if not wrong:
            found[path] = [available[tensor] for tensor in names[path].files]
        elif path not in heads or not may_start:
            unfit += [line + _NEW_HEAD for line in wrong] if path in heads else wrong
    if problems := unfit + foreign + untied:
        raise ModelError(
            f"{folder}: {len(problems)} tensor(s) do not match the network in its {CONFIG}:"
            f"{first_bullets(problems)}\nExpected a complete checkpoint of that network; nothing was loaded."
        )
    return found


def _by_network_name(
    tensors: Mapping[str, Stored], wanted: Collection[str], family: Family
) -> tuple[dict[str, Stored], list[str]]:
    """The tensors by their names in the network, and one line per unknown or duplicate tensor."""
    available: dict[str, Stored] = {}
    foreign = []
    for name, tensor in tensors.items():
        modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))
        spellings = (modern, family.prefix + modern, modern.removeprefix(family.prefix))
        match = next((spelling for spelling in spellings if spelling in wanted), None)
        if match in available:
            foreign.append(f"{name!r} and {available[match].name!r} are one tensor of the network")
        elif match is not None:
            available[match] = tensor
        elif not re.search(family.unread, modern):
            foreign.append(f"{name!r} of shape {tensor.shape}: the network has no such tensor")
    return available, foreign


def _conflicts(available: Mapping[str, Stored], ties: Mapping[str, str]) -> list[str]:
    """One line per output projection whose values differ from the embedding that it is tied to."""
    return [
        f"{head!r} and {table!r} have different values, but {CONFIG} ties them (tie_word_embeddings): transformers "
        "uses both; pass untie=True"
        for head, table in ties.items()
        if head in available and table in available and not are_equal(available[head], available[table])
    ]


def _unfit(available: Mapping[str, Stored], files: Collection[str], expected: tuple[int, ...]) -> list[str]:
    """One line per tensor of a leaf that is missing or has another shape."""
    missing = [f"{name!r} of shape {expected} is missing" for name in files if name not in available]
    return missing + [
        f"{name!r} has shape {available[name].shape}, expected {expected}"
        for name in files
        if name in available and available[name].shape != expected
    ]
