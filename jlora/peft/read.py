"""`load`: reads adapters written by PEFT."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import LoraConfig, Override
from jlora._src.engine.factors.named_axes import promoted_dtype
from jlora._src.inits.spectral import olora, pissa
from jlora._src.paths import named_leaves
from jlora._src.tree.checks import check_paths
from jlora._src.types import Adapters, Array, Axes, LoraFactors, PyTree, Target
from jlora._src.types import Path as LeafPath
from jlora.files.errors import PeftError
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jlora.files.tensor_names import ModuleKind, TensorName, TensorNames, from_torch, module_of
from jlora.peft import layout, tied
from jlora.peft.config import PeftConfig, exact_alpha
from jlora.peft.config_file import read_config, read_start
from jlora.peft.keys import AdapterTensors, named_as
from jlora.peft.options import REPEATED_INITS
from jlora.peft.tensors import open_adapter, read_tensors, sort_tensors


def load(
    folder: str | Path, names: TensorNames, params: PyTree = None, *, start: str | Path | None = None
) -> tuple[dict[LeafPath, LoraFactors | Array], LoraConfig]:
    """Load adapters written by PEFT (or `save`) for our parameters.

    >>> adapters, config = peft.load("my_adapter", models.tensor_names(model), params)

    An adapter of the bare network also fits the network with a head, and vice versa, if only the first part of the
    names differs. In a stacked leaf, layers of unequal ranks are padded with zeros and unequal scales are folded into
    B; layers without an adapter get zeros, which stay zero during training. Leaves trained whole by PEFT
    (``modules_to_save``, biases, stored embeddings) are returned as arrays.

    PEFT's PiSSA, OLoRA, CorDA and LoRA-GA adapters were trained on what their initialization left of the weights. They
    are returned as plain LoRA of the sum of both ranks for the original weights (as by `jlora.to_plain`): PiSSA and
    OLoRA, which are functions of the weights, from ``params``; the others, and PiSSA by a randomized SVD, from the
    adapter before its training, ``start``.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; fetch an adapter from the hub first with
        ``huggingface_hub.snapshot_download(id)``.
      names: the tensor names of the leaves; see `jlora.files.tensor_names`.
      params: the parameters, or their shapes, to check the adapter's shapes against; without them `jlora.attach` does
        this check. Values are needed only for stacked leaves in which the adapter trains some layers, whole or with
        DoRA, and for PiSSA and OLoRA.
      start: the folder of the adapter as PEFT saved it before the training, for an initialization that changed the base
        weights.

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
    leaves = None
    if params is not None:
        leaves, _ = named_leaves(params)
        check_paths(names, leaves, "peft.load")
    method = read_start(folder / ADAPTER_CONFIG)
    if start is not None and method is None:
        raise PeftError(
            f"{folder}: got start={str(start)!r}, but the config names no initialization that changed the base. "
            "Expected no start."
        )
    has_values = leaves is not None and not any(isinstance(leaves[path], jax.ShapeDtypeStruct) for path in names)
    known = method is not None and (start is not None or (method in REPEATED_INITS and has_values))
    config, names, file = _read(folder, names, leaves, base_known=known)
    before: Before | None = None
    if known and start is not None:
        their_start, _, file_of_start = _read(Path(start), names, leaves, base_known=True)
        before = _from_file(Path(start), their_start, file_of_start)
    elif known:
        before = _repeated(method)
    adapters = {path: _adapter(path, name, file, config, before) for path, name in tied.split_names(names).items()}
    adapters = tied.join({p: value for p, value in adapters.items() if value is not None}, names, config, folder)
    return adapters, _our_config(adapters, config)


class _File(NamedTuple):
    """The tensors of an adapter by their place in our model, and their arrays by name."""

    found: AdapterTensors
    arrays: Mapping[str, np.ndarray]

    def layer(self, module: str, kind: ModuleKind, config: PeftConfig) -> layout.Layer:
        """The update of a module that has factors."""
        parts = {part: self.arrays[tensor.name] for part, tensor in self.found.layers[module].items()}
        return layout.from_peft(parts, kind, config.scale(self.found.spelling.theirs(module)))


def _read(
    folder: Path, names: TensorNames, leaves: Mapping[LeafPath, Any] | None, *, base_known: bool
) -> tuple[PeftConfig, TensorNames, _File]:
    """The config, the names and the tensors of an adapter."""
    config = read_config(folder / ADAPTER_CONFIG, base_known=base_known)
    tensors = open_adapter(folder)
    names = named_as(names, tensors)
    config = config.tying(tied.projections(names, tensors))
    leaves = None if leaves is None else tied.split_leaves(leaves, names)
    found = sort_tensors(folder, config, tensors, tied.split_names(names), leaves)
    return config, names, _File(found, read_tensors(folder, found))


def _adapter(
    path: LeafPath, name: TensorName, file: _File, config: PeftConfig, before: Before | None
) -> LoraFactors | Array | None:
    """The adapter of one leaf; None if it has none. ``before`` gives a layer's update before the training."""
    found, arrays = file

    def layer(i: int, module: str) -> layout.Layer:
        if module not in found.layers:
            return _no_update(found.leaves[path], i, config.use_dora)
        trained = file.layer(module, name.kind, config)
        if before is None:
            return trained
        leaf = found.leaves[path]
        return trained.minus(before(trained, leaf[i] if name.stacked else leaf, module, name.kind))

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


Before: TypeAlias = Callable[[layout.Layer, Any, str, ModuleKind], layout.Layer]
"""The update of a layer before its training, from the trained one, the original weight, the module and its kind."""


def _from_file(folder: Path, config: PeftConfig, file: _File) -> Before:
    """The layers of an adapter saved before the training."""

    def before(trained: layout.Layer, leaf: Any, module: str, kind: ModuleKind) -> layout.Layer:
        if module not in file.found.layers:
            raise PeftError(f"{folder}: {module!r} has no factors; expected the adapter as it was before the training")
        return file.layer(module, kind, config)

    return before


def _repeated(method: str | None) -> Before:
    """What PiSSA or OLoRA gives for the original weight, as PEFT computes it again when it loads the adapter."""

    def before(trained: layout.Layer, leaf: Any, module: str, kind: ModuleKind) -> layout.Layer:
        if kind not in ("linear", "conv1d") or (method == "olora" and kind == "conv1d"):
            raise PeftError(f"{module!r} is of kind {kind!r}, which PEFT does not initialize by {method}")
        target = Target("", tuple(leaf.shape), leaf.dtype, Axes(), trained.rank, trained.scale, 0.0, False, 0, "")
        with jax.default_matmul_precision("highest"):
            made = (pissa if method == "pissa" else olora)(jnp.asarray(leaf), target, "float32")
        return layout.Layer(np.asarray(made.a), np.asarray(made.b), None, trained.scale)

    return before


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
