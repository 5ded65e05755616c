"""Tied embeddings: one leaf that is both lookup table and output projection; two modules in PEFT.

Such a leaf is read and written as two leaves, the second one transposed; `join` reunites them if they agree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._src.types import Array, LoraFactors
from jlora._src.types import Path as LeafPath
from jlora.files.errors import PeftError
from jlora.files.tensor_names import TensorName, TensorNames
from jlora.messages import bullets
from jlora.peft import layout
from jlora.peft.config import PeftConfig


class _Transposed:
    """A table as the projection's weight; copied only when its values are read."""

    def __init__(self, table: Any) -> None:
        self.table, self.shape, self.dtype = table, tuple(table.shape[::-1]), table.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.table, dtype).T


def heads(names: TensorNames) -> dict[LeafPath, tuple[LeafPath, str]]:
    """For each tied projection, under an artificial path: the path of its table, and its tensor."""
    return {
        f"{path} ({tensor.removesuffix('.weight')})": (path, tensor)
        for path, name in names.items()
        for tensor in name.tied
    }


def projections(names: TensorNames, keys: Collection[str]) -> list[str]:
    """The output projections among an adapter's modules, tied to an embedding here or in PyTorch's model."""
    tied = {tensor for name in names.values() for tensor in name.tied}
    tied |= {tensor for name in names.values() for tensor in name.tensors if tensor.endswith("lm_head.weight")}
    modules = sorted(tensor.removesuffix(".weight") for tensor in tied)
    return [module for module in modules if any(f".{module}." in key for key in keys)]


def split_names(names: TensorNames) -> TensorNames:
    """The table with a leaf for each tied projection."""
    return {**names, **{head: TensorName((tensor,), "linear") for head, (_, tensor) in heads(names).items()}}


def split_leaves(leaves: Mapping[LeafPath, Any], names: TensorNames) -> dict[LeafPath, Any]:
    """The parameters with a leaf for each tied projection."""
    found = dict(leaves)
    for head, (path, _) in heads(names).items():
        leaf = leaves[path]
        is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
        found[head] = jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype) if is_shape else _Transposed(leaf)
    return found


def split_adapters(
    adapters: Mapping[LeafPath, LoraFactors | Array], names: TensorNames
) -> dict[LeafPath, LoraFactors | Array]:
    """The adapters, with a second one for each tied projection of an adapted table."""
    tied = {head: adapters[path] for head, (path, _) in heads(names).items() if path in adapters}
    return {**adapters, **{head: _transposed(value) for head, value in tied.items()}}


def join(
    adapters: Mapping[LeafPath, LoraFactors | Array], names: TensorNames, config: PeftConfig, folder: Path
) -> dict[LeafPath, LoraFactors | Array]:
    """The inverse of `split_adapters`.

    Raises:
      PeftError: listing every table whose projection has a different adapter, or none, and vice versa.
    """
    found, wrong = dict(adapters), []
    for head, (path, tensor) in heads(names).items():
        table, projection = found.get(path), found.pop(head, None)
        # PyTorch, too, keeps both in one array: a table that the config does not name goes into it.
        loaded = projection is None and not isinstance(table, LoraFactors) and not config.saves(names[path].tensors[0])
        if not loaded and not _agree(table, projection):
            wrong.append(f"{path!r}: {_what(table)} for the lookup, {_what(projection)} for {tensor!r}")
    if wrong:
        raise PeftError(
            f"{folder}: the embedding is also the output projection, and the adapter trains the two separately:"
            f"{bullets(wrong)}\nExpected the same for both. Load the network with a separate projection, "
            "models.load(path, untie=True), and the adapter with its names and parameters. Nothing was loaded."
        )
    return found


def _transposed(value: Any) -> Any:
    if not isinstance(value, LoraFactors):
        return value.T
    axes = layout.axes("linear", False)
    return LoraFactors(value.b.T, value.a.T, scale=value.scale, axes=axes, dropout=value.dropout)


def _agree(table: Any, projection: Any) -> bool:
    if isinstance(table, LoraFactors) and isinstance(projection, LoraFactors):
        if table.magnitude is not None or projection.magnitude is not None or table.scale != projection.scale:
            return False
        return np.array_equal(table.a, projection.b.T) and np.array_equal(table.b, projection.a.T)
    if table is None or projection is None or isinstance(table, LoraFactors) or isinstance(projection, LoraFactors):
        return table is projection
    return np.array_equal(table, projection.T)


def _what(value: Any) -> str:
    if value is None:
        return "nothing"
    if not isinstance(value, LoraFactors):
        return "a weight trained whole"
    return f"factors of scale {value.scale}" + ("" if value.magnitude is None else " with a magnitude")
