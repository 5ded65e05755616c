"""From PEFT's adapters to ours."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import LoraConfig, Override
from jlora._src.engine.named_axes import promoted_dtype
from jlora._src.paths import named_leaves
from jlora._src.tree.checks import check_paths
from jlora._src.types import Adapters, Array, LoraFactors, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files.tensor_names import TensorNames, from_torch
from jlora.peft import layout, tied
from jlora.peft.config import (
    CONFIG,
    PeftConfig,
    PeftError,
    exact_alpha,
    read_config,
)
from jlora.peft.tensors import TENSORS, module_of, named_as, open_adapter, read_tensors, sort_tensors


def load(
    folder: str | Path, names: TensorNames, params: PyTree = None
) -> tuple[dict[LeafPath, LoraFactors | Array], LoraConfig]:
    """Adapters that PEFT (or `save`) wrote, for our parameters.

    An adapter of the bare network fits one with a head and the other way round, where only the names' first part
    differs. In a stacked leaf, layers of unequal ranks are padded with zeros and unequal scales are folded into B;
    layers without an adapter get zeros, which stay zero under training too. Leaves that PEFT trained whole
    (``modules_to_save``, biases, stored embeddings) come back as arrays.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; from the hub, fetch it first:
        ``huggingface_hub.snapshot_download(id)``.
      names: of the leaves; see `jlora.files.tensor_names`.
      params: the parameters, or their shapes, against which those of the adapter are checked; without them it is
        `jlora.attach` that finds out whether they fit. Values are needed only of stacked leaves that the adapter
        trains whole, or with DoRA, in some of their layers.

    Returns:
      ``(adapters, config)``: the adapters in the dtypes in which they are stored (a B that a scale was folded into in
      float32, unless its dtype holds the product), and a config with which `jlora.init` would make such ones.

    Raises:
      TensorError: if a file is missing, damaged or pickled.
      PeftError: if PEFT's config asks for what we lack; if tensors are missing, superfluous, of another shape or rank,
        or hold NaN or infinity. All are named, and nothing is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PeftError(
            f"{str(folder)!r} is no folder. Expected one with {CONFIG} and {TENSORS}; an adapter on the hub is fetched "
            f"first: `folder = huggingface_hub.snapshot_download({str(folder)!r})`."
        )
    theirs = read_config(folder / CONFIG)
    leaves = None
    if params is not None:
        leaves, _ = named_leaves(params)
        check_paths(names, leaves, "peft.load")
    tensors = open_adapter(folder)
    own = named_as(names, tensors)
    theirs = theirs.tying(tied.projections(own, tensors))
    names = tied.split_names(own)
    leaves = None if leaves is None else tied.split_leaves(leaves, own)
    found = sort_tensors(folder, theirs, tensors, names, leaves)
    leaves = found.leaves
    read = read_tensors(folder, found)

    def layer(module: str, i: int, path: LeafPath) -> layout.Layer:
        if module not in found.layers:
            return _no_update(leaves[path], i, theirs.use_dora)
        arrays = {part: read[tensor.name] for part, tensor in found.layers[module].items()}
        return layout.from_peft(arrays, names[path].kind, theirs.scale(found.spelling.theirs(module)))

    adapters: dict[LeafPath, LoraFactors | Array] = {}
    for path, name in names.items():
        modules = [module_of(tensor) for tensor in name.tensors]
        if name.kind in layout.NDIM and any(module in found.layers for module in modules):
            layers = [layer(module, i, path) for i, module in enumerate(modules)]
            adapters[path] = layout.join(layers, name.kind, name.stacked, theirs.lora_dropout)
        elif any(tensor in found.whole for tensor in name.tensors):
            arrays = [
                from_torch(read[found.whole[tensor].name], name.kind)
                if tensor in found.whole
                else np.asarray(leaves[path][i])
                for i, tensor in enumerate(name.tensors)
            ]
            adapters[path] = jnp.asarray(np.stack(arrays) if name.stacked else arrays[0])
    adapters = tied.join(adapters, own, theirs, folder)
    return adapters, _our_config(adapters, theirs)


# ---- of save


def _no_update(leaf: Any, layer: int, dora: bool) -> layout.Layer:
    """Of a layer that a stacked leaf's adapter leaves out: no rank, and DoRA's magnitude that changes nothing."""
    *inputs, out = leaf.shape[1:]
    norm = None
    if dora:
        weight = np.asarray(leaf[layer]).astype(np.float32)
        norm = np.sqrt(np.sum(np.square(weight), axis=tuple(range(len(inputs)))))
    return layout.Layer(np.zeros((*inputs, 0), np.float32), np.zeros((0, out), np.float32), norm, 1.0)


def _our_config(adapters: Adapters, theirs: PeftConfig) -> LoraConfig:
    """The config that makes such adapters."""
    made: dict[LeafPath, tuple[int, float]] = {}
    for path, value in adapters.items():
        if isinstance(value, LoraFactors):
            alpha = exact_alpha(value.scale, value.rank, theirs.use_rslora)
            made[path] = value.rank, float(value.scale * value.rank if alpha is None else alpha)
    common = list(made.values())
    rank, alpha = max(common, key=common.count) if common else (theirs.r, float(theirs.lora_alpha))
    dtype = promoted_dtype(*(x.dtype for x in jax.tree.leaves(adapters)))
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(_exactly(path) for path in made),
        exclude=(),
        overrides=tuple(
            Override(_exactly(p), rank=r, alpha=a) for p, (r, a) in made.items() if (r, a) != (rank, alpha)
        ),
        train_also=tuple(_exactly(path) for path in adapters if path not in made),
        dropout=theirs.lora_dropout,
        use_rslora=theirs.use_rslora,
        use_dora=theirs.use_dora,
        dtype=dtype.name,
    )


def _exactly(path: LeafPath) -> str:
    return f"^{re.escape(path)}$"
