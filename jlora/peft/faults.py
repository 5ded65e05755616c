"""Finds every fault of an adapter's tensors: one line each."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import HEADS
from jlora.files.errors import PeftError
from jlora.files.safetensors import Tensor
from jlora.files.tensor_names import LayerOfLeaf, ModuleKind, TensorNames, module_of, to_torch, torch_shape
from jlora.messages import bullets, nearest
from jlora.peft import layout
from jlora.peft.config import PeftConfig
from jlora.peft.keys import PREFIX, AdapterTensors
from jlora.peft.layout import Part

_NO_VOCABULARY = re.compile(r"position|token_type|wpe")
_UNLOAD = "`PeftModel.from_pretrained(base, folder).unload().save_pretrained(new_folder)` in PyTorch"


def check_vocabulary(folder: Path, found: AdapterTensors, at: Mapping[str, LayerOfLeaf]) -> None:
    """Raises a PeftError listing every module whose vocabulary size differs from the parameters'."""
    wrong: dict[str, tuple[int, int]] = {}
    for weight, (path, name, _) in at.items():
        is_table = name.kind == "embedding" and not _NO_VOCABULARY.search(weight)
        if path in found.leaves and (is_table or weight.endswith("lm_head.weight")):
            ours = torch_shape(tuple(found.leaves[path].shape), name)[0]
            theirs = _rows(found, weight, "a" if is_table else "b") - {ours}
            for rows in theirs:  # one, unless the file is damaged
                wrong[weight] = rows, ours
    if wrong:
        lines = [
            f"{module_of(w)!r} has {theirs} rows, {at[w].path!r} has {ours}" for w, (theirs, ours) in wrong.items()
        ]
        raise PeftError(
            f"{folder}: the vocabulary was resized before the adapter was trained:{bullets(lines)}\nExpected one of "
            f"the same size. Resize the base too (`base.resize_token_embeddings({next(iter(wrong.values()))[0]})`), "
            f"write it with the rows from the adapter's training ({_UNLOAD}), and load that. Nothing was loaded."
        )


def _rows(found: AdapterTensors, weight: str, part: Part) -> set[int]:
    """The numbers of rows of a weight, from its tensors in the file; ``part`` is the factor with that many."""
    factor = found.layers.get(module_of(weight), {}).get(part)
    shapes = [found.whole[weight].shape[:1]] if weight in found.whole else []
    shapes += [] if factor is None else [factor.shape[1:2] if part == "a" else factor.shape[:1]]
    return {rows for shape in shapes for rows in shape}


def mixed_leaves(layers: Collection[str], whole: Collection[str], names: TensorNames) -> list[str]:
    """Stacked leaves with some layers trained whole and others by factors; jlora needs one or the other."""
    return [
        f"{path!r}: {next(t for t in name.tensors if t in whole)!r} is trained whole, and other layers of this leaf by "
        "factors; merge it where it was trained (`model.merge_and_unload().save_pretrained(folder)`) and load the "
        "merged model"
        for path, name in names.items()
        if name.stacked
        and any(tensor in whole for tensor in name.tensors)
        and any(module_of(tensor) in layers and tensor.endswith(".weight") for tensor in name.tensors)
    ]


def wrong_factors(
    config: PeftConfig, found: AdapterTensors, theirs: Mapping[str, str], at: Mapping[str, LayerOfLeaf]
) -> list[str]:
    """Factors that are missing, unexpected, or of another shape or dtype.

    Args:
      theirs: our names of tensors to the adapter's.
      at: our names of tensors to leaves and layers.
    """
    return [
        fault
        for weight, their_weight in theirs.items()
        if at[weight].name.kind in layout.NDIM and weight.endswith(".weight")
        for fault in _wrong_layer(config, found, weight, module_of(their_weight), at[weight])
    ]


def _wrong_layer(config: PeftConfig, found: AdapterTensors, weight: str, module: str, leaf: LayerOfLeaf) -> list[str]:
    """The faults of one module; ``weight`` is our name for its weight, ``module`` the adapter's."""
    (path, name, _), kind, leaves = leaf, leaf.name.kind, found.leaves
    targeted, factors = config.targets(module, kind), found.layers.get(module_of(weight))
    if not targeted and factors is None:
        return []
    if not targeted and config.target_modules is not None:
        return [f"{module!r} has factors, but target_modules does not name it: PEFT would ignore them"]
    factors = factors or {}
    keys = {part: f"{PREFIX}{module}.{suffix}" for part, suffix in layout.parts(kind).items()}
    if path not in leaves:
        return [f"{key!r} is missing" for part, key in keys.items() if part != "magnitude" and part not in factors]
    shape = tuple(leaves[path].shape)[int(name.stacked) :]
    if len(shape) != layout.NDIM[kind]:
        return [f"{path!r} has shape {shape} per layer; {kind!r} in the name table has {layout.NDIM[kind]} axes"]
    wrong, rank = [], config.rank(module)
    for part, expected in layout.shapes(kind, shape, rank).items():
        tensor = factors.get(part)
        if part == "magnitude" and not config.use_dora:
            wrong += [f"{keys[part]!r}: the config has no use_dora"] if tensor else []
        elif tensor is not None and tensor.shape != expected:
            axis = 0 if part == "a" else 1
            other_rank = part != "magnitude" and tensor.shape[axis : axis + 1] != (rank,)
            why = f": the config gives it rank {rank}" if other_rank else f": {path!r} has shape {shape}"
            wrong.append(f"{keys[part]!r} has shape {tensor.shape}, expected {expected}{why}")
        else:
            wrong += _wrong_tensor(keys[part], tensor, expected)
    here = [t for t in name.tensors if module_of(t) in found.layers]
    if config.use_dora and here[:1] == [weight] and here != list(name.tensors) and _is_shape(leaves[path]):
        wrong.append(f"{path!r}: only some of its layers have DoRA; pass params with values for the others")
    return wrong


def _wrong_tensor(key: str, tensor: Tensor | None, expected: tuple[int, ...]) -> list[str]:
    if tensor is None:
        return [f"{key!r} of shape {expected} is missing"]
    if tensor.shape != expected:
        return [f"{key!r} has shape {tensor.shape}, expected {expected}"]
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return [f"{key!r} is {tensor.dtype}, expected floating numbers"]
    return []


def wrong_whole(
    config: PeftConfig, found: AdapterTensors, theirs: Mapping[str, str], at: Mapping[str, LayerOfLeaf]
) -> list[str]:
    """Tensors stored whole that are missing, unexpected, or of another shape, dtype or value.

    The arguments are those of `wrong_factors`.
    """
    expected = config.whole(theirs.values(), {found.spelling.theirs(module) for module in found.layers})
    wrong = []
    for weight, their_weight in theirs.items():
        path, name, _ = at[weight]
        key, tensor = f"{PREFIX}{their_weight}", found.whole.get(weight)
        if tensor is None and their_weight not in expected:
            continue
        if path not in found.leaves:
            wrong.append(f"{key!r} is missing")
        elif faults := _wrong_tensor(key, tensor, torch_shape(tuple(found.leaves[path].shape), name)):
            wrong += faults
        elif tensor is not None and is_base(weight, found.layers):
            wrong += _wrong_base(tensor, path, found.leaves[path], name.kind)
        elif their_weight not in expected and not _is_embedding(their_weight, name.kind):
            wrong.append(f"{key!r} is stored, but neither bias nor modules_to_save names it")
        elif not all(t in found.whole for t in name.tensors) and _is_shape(found.leaves[path]):
            wrong.append(f"{path!r}: only some of its layers are stored; pass params with values for the others")
    return wrong


def is_base(weight: str, layers: Collection[str]) -> bool:
    """Whether a stored weight is the base of a module with factors: PEFT stores an embedding's next to its factors."""
    return module_of(weight) in layers and weight.endswith(".weight")


def _wrong_base(tensor: Tensor, path: str, leaf: Any, kind: ModuleKind) -> list[str]:
    """A base stored next to factors must equal ours: the factors were trained on it."""
    if _is_shape(leaf):
        return [f"{tensor.name!r} is stored next to factors: pass params with values to compare it with"]
    if np.array_equal(tensor.read(), to_torch(np.asarray(leaf), kind)):
        return []
    return [
        f"{tensor.name!r} differs from {path!r} in values, and the factors were trained on it: {_UNLOAD} writes the "
        "base with these values; load that"
    ]


def _is_embedding(weight: str, kind: ModuleKind) -> bool:
    """Whether ``save_embedding_layers`` stores it: a table, a patch embedding or an output projection."""
    looked_up = kind == "embedding" or ".patch_embeddings." in weight
    return looked_up or re.search(HEADS[0], weight.replace(".", "/")) is not None


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def is_tied(tensor: Tensor, tables: Collection[Tensor]) -> bool:
    """Whether a tensor unknown to us equals a stored table: a tied output projection."""
    return any(t.shape == tensor.shape and np.array_equal(t.read(), tensor.read()) for t in tables)


def unknown_key(key: str, weight: str, at: Mapping[str, Any]) -> str:
    """The line for a key that matches none of our tensors; ``weight`` is its tensor in our spelling."""
    if not key.startswith(PREFIX):
        return f"{key!r}: PEFT's names start with {PREFIX!r}"
    return f"{key!r}: the model has no such tensor{nearest(weight, at)}"
