"""`load`: reads adapters written by PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
from jlora.files.errors import PeftError
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jlora.files.tensor_names import TensorName, TensorNames, from_torch, module_of
from jlora.peft import layout, tied
from jlora.peft.config import PeftConfig, exact_alpha
from jlora.peft.config_file import read_config
from jlora.peft.keys import AdapterTensors, named_as
from jlora.peft.tensors import open_adapter, read_tensors, sort_tensors


def load(
    folder: str | Path, names: TensorNames, params: PyTree = None
) -> tuple[dict[LeafPath, LoraFactors | Array], LoraConfig]:
    """Load adapters written by PEFT (or `save`) for our parameters.

    >>> adapters, config = peft.load("my_adapter", models.tensor_names(model), params)

    An adapter of the bare network also fits the network with a head, and vice versa, if only the first part of the
    names differs. In a stacked leaf, layers of unequal ranks are padded with zeros and unequal scales are folded into
    B; layers without an adapter get zeros, which stay zero during training. Leaves trained whole by PEFT
    (``modules_to_save``, biases, stored embeddings) are returned as arrays.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; fetch an adapter from the hub first with
        ``huggingface_hub.snapshot_download(id)``.
      names: the tensor names of the leaves; see `jlora.files.tensor_names`.
      params: the parameters, or their shapes, to check the adapter's shapes against; without them `jlora.attach` does
        this check. Values are needed only for stacked leaves in which the adapter trains some layers, whole or with
        DoRA.

    Returns:
      ``(adapters, config)``: the adapters in their stored dtypes (a B with a folded scale is float32, unless
      its dtype holds the product), and a config for which `jlora.init` creates such adapters.

    Raises:
      TensorError: if a file is missing, damaged or pickled.
      PeftError: if PEFT's config needs a feature that jlora lacks; or if tensors are missing, unexpected, of another
        shape or rank, or hold NaN or infinity. Lists all; nothing is loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PeftError(
            f"{str(folder)!r} is not a folder. Expected one with {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}; fetch an "
            f"adapter from the hub first: `folder = huggingface_hub.snapshot_download({str(folder)!r})`."
        )
    config = read_config(folder / ADAPTER_CONFIG)
    leaves = None
    if params is not None:
        leaves, _ = named_leaves(params)
        check_paths(names, leaves, "peft.load")
    tensors = open_adapter(folder)
    names = named_as(names, tensors)
    config = config.tying(tied.projections(names, tensors))
    leaves = None if leaves is None else tied.split_leaves(leaves, names)
    every_name = tied.split_names(names)
    found = sort_tensors(folder, config, tensors, every_name, leaves)
    arrays = read_tensors(folder, found)
    adapters = {path: _adapter(path, name, found, arrays, config) for path, name in every_name.items()}
    adapters = tied.join({p: value for p, value in adapters.items() if value is not None}, names, config, folder)
    return adapters, _our_config(adapters, config)


def _adapter(
    path: LeafPath, name: TensorName, found: AdapterTensors, arrays: Mapping[str, np.ndarray], config: PeftConfig
) -> LoraFactors | Array | None:
    """The adapter of one leaf, from a file's arrays by name; None if it has none."""

    def layer(i: int, module: str) -> layout.Layer:
        if module not in found.layers:
            return _no_update(found.leaves[path], i, config.use_dora)
        parts = {part: arrays[tensor.name] for part, tensor in found.layers[module].items()}
        return layout.from_peft(parts, name.kind, config.scale(found.spelling.theirs(module)))

    modules = [module_of(tensor) for tensor in name.tensors]
    if name.kind in layout.NDIM and any(module in found.layers for module in modules):
        layers = [layer(i, module) for i, module in enumerate(modules)]
        return layout.join(layers, name.kind, name.stacked, config.lora_dropout)
    if not any(tensor in found.whole for tensor in name.tensors):
        return None
    whole = [
        from_torch(arrays[found.whole[t].name], name.kind) if t in found.whole else np.asarray(found.leaves[path][i])
        for i, t in enumerate(name.tensors)
    ]
    return jnp.asarray(np.stack(whole) if name.stacked else whole[0])


def _no_update(leaf: Any, layer: int, dora: bool) -> layout.Layer:
    """The update of a layer without an adapter in a stacked leaf: rank 0, and the DoRA magnitude of the base."""
    *inputs, out = leaf.shape[1:]
    norm = None
    if dora:
        weight = np.asarray(leaf[layer]).astype(np.float32)
        norm = np.sqrt(np.sum(np.square(weight), axis=tuple(range(len(inputs)))))
    return layout.Layer(np.zeros((*inputs, 0), np.float32), np.zeros((0, out), np.float32), norm, 1.0)


def _our_config(adapters: Adapters, config: PeftConfig) -> LoraConfig:
    """The config that creates such adapters."""
    made: dict[LeafPath, tuple[int, float]] = {}
    for path, value in adapters.items():
        if isinstance(value, LoraFactors):
            alpha = exact_alpha(value.scale, value.rank, config.use_rslora)
            made[path] = value.rank, float(value.scale * value.rank if alpha is None else alpha)
    common = list(made.values())
    rank, alpha = max(common, key=common.count) if common else (config.r, float(config.lora_alpha))
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
        dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        dtype=dtype.name,
    )


def _exactly(path: LeafPath) -> str:
    return f"^{re.escape(path)}$"
