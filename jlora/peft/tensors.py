"""Opens an adapter's tensors, matches them with our model, checks and reads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora._src.types import Path as LeafPath
from jlora.files.errors import MAX_LISTED, PeftError, TensorError, first_bullets
from jlora.files.hub_files import ADAPTER_WEIGHTS, pickled_files
from jlora.files.safetensors import Tensor, open_tensors
from jlora.files.tensor_names import (
    LayerOfLeaf,
    TensorNames,
    by_tensor,
    module_of,
    torch_axes,
)
from jlora.messages import bullets
from jlora.peft import faults, layout
from jlora.peft.config import PeftConfig
from jlora.peft.keys import PREFIX, AdapterTensors, Key, find_spelling, parse_keys
from jlora.peft.layout import Part


def open_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's folder.

    Raises:
      TensorError: if there are none, or only pickled ones, or the file is damaged.
    """
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file() and (pickled := pickled_files(folder)):
        raise TensorError(
            f"{folder} has no {ADAPTER_WEIGHTS}; it has {', '.join(pickled)}, which is pickled: reading it could run "
            "any code, so it is not read. Convert it where you trust it: `model = PeftModel.from_pretrained(base, "
            "folder)`, then `model.save_pretrained(new_folder)`, which writes safetensors."
        )
    return open_tensors(file)


def sort_tensors(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    names: TensorNames,
    leaves: Mapping[LeafPath, Any] | None,
) -> AdapterTensors:
    """The tensors of an adapter by their place in our model. Without ``leaves``, the file determines the shapes.

    Raises:
      PeftError: listing every tensor that is missing, unexpected, or of another shape, rank or dtype.
    """
    at = by_tensor(names)
    keys = parse_keys(tensors, config)
    spelling = find_spelling((key.weight for key in keys.values()), at)
    keys = {key: parsed._replace(weight=spelling.ours(parsed.weight)) for key, parsed in keys.items()}
    known = {key: parsed for key, parsed in keys.items() if parsed.weight in at and key.startswith(PREFIX)}
    layers, whole, wrong = _sort(known, tensors, at)
    wrong += [] if tensors else [f"{ADAPTER_WEIGHTS} has no tensors"]
    wrong += faults.mixed_leaves(layers, whole, names)
    leaves = _shapes_in(layers, whole, names) if leaves is None else leaves
    found = AdapterTensors(layers, whole, spelling, leaves)
    faults.check_vocabulary(folder, found, at)

    theirs = {weight: spelling.theirs(weight) for weight in at if weight.startswith(spelling.put)}
    wrong += faults.wrong_factors(config, found, theirs, at)
    wrong += faults.wrong_whole(config, found, theirs, at)
    whole = {weight: tensor for weight, tensor in whole.items() if not faults.is_base(weight, layers)}
    tables = [tensor for weight, tensor in whole.items() if at[weight].name.kind == "embedding"]
    unknown = sorted(key for key in keys if key not in known and not faults.is_tied(tensors[key], tables))
    # The nearest names are searched only for the lines that are shown.
    wrong += [faults.unknown_key(key, keys[key].weight, at) if i < MAX_LISTED else key for i, key in enumerate(unknown)]
    if wrong:
        raise PeftError(
            f"{folder}: {len(wrong)} tensor(s) do not fit the model or the adapter's config:{first_bullets(wrong)}\n"
            "Expected a complete adapter of this model, written by PEFT; nothing was loaded."
        )
    return found._replace(whole=whole)


def _sort(
    keys: Mapping[str, Key], tensors: Mapping[str, Tensor], at: Mapping[str, LayerOfLeaf]
) -> tuple[dict[str, dict[Part, Tensor]], dict[str, Tensor], list[str]]:
    """The factors of each module, the tensors stored whole, and one line per unmatched key."""
    layers: dict[str, dict[Part, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    wrong: list[str] = []
    for key, (weight, suffix) in keys.items():
        here, part = whole, weight
        if suffix is not None:
            path, name, _ = at[weight]
            suffixes = layout.parts(name.kind) if name.kind in layout.NDIM else {}
            if suffix not in suffixes.values():
                wrong.append(f"{key!r}: {path!r} is of kind {name.kind!r}, which has no {suffix!r}")
                continue
            here = layers.setdefault(module_of(weight), {})
            part = next(part for part, one in suffixes.items() if one == suffix)
        if part in here:
            wrong.append(f"{key!r} and {here[part].name!r} are one tensor of the model")
        here[part] = tensors[key]
    return layers, whole, wrong


def _shapes_in(
    layers: Mapping[str, dict[Part, Tensor]], whole: Mapping[str, Tensor], names: TensorNames
) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """The shapes of the leaves that have a tensor in the file, by the first of their tensors."""
    found = {}
    for path, name in names.items():
        for tensor in name.tensors:
            parts = layers.get(module_of(tensor), {}) if name.kind in layout.NDIM else {}
            if "a" in parts and "b" in parts:
                one = layout.leaf_shape(name.kind, parts["a"].shape, parts["b"].shape)
            elif tensor in whole:
                one = tuple(whole[tensor].shape[i] for i in torch_axes(name.kind, len(whole[tensor].shape)))
            else:
                continue
            shape = (len(name.tensors), *one) if name.stacked else one
            found.setdefault(path, jax.ShapeDtypeStruct(shape, np.float32))
    return found


def read_tensors(folder: Path, found: AdapterTensors) -> dict[str, np.ndarray]:
    """The arrays of all matched tensors, by name in the file.

    Raises:
      PeftError: listing every tensor that holds NaN or infinity.
    """
    arrays, wrong = {}, []
    for tensor in (*(tensor for parts in found.layers.values() for tensor in parts.values()), *found.whole.values()):
        try:
            arrays[tensor.name] = tensor.read()
        except TensorError:
            wrong.append(repr(tensor.name))
    if wrong:
        raise PeftError(
            f"{folder}: {len(wrong)} tensor(s) hold NaN or infinity:{bullets(wrong)}\nExpected finite values; the file "
            "is damaged, or the training that wrote it diverged. Nothing was loaded."
        )
    return arrays
