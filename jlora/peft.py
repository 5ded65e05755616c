"""Adapters as Hugging Face's PEFT stores them, in both directions: PyTorch, vLLM and the hub read and write these.

>>> names = models.names(model)
>>> peft.save("my_adapter", names, params, adapters, config, base_model="FacebookAI/roberta-base")
>>> adapters, config = peft.load("my_adapter", names, params)

A folder has an ``adapter_config.json`` and an ``adapter_model.safetensors``. The name table (`jlora.names`, or
`jlora.models.names` of a network from there) says which PyTorch module each leaf is; nothing is ever unpickled.
Neither torch nor peft is needed.

An embedding that is also the output projection is one leaf here, and one adapter acts in both of its uses. PEFT has two
modules: `save` writes both, and `load` reads what trains both alike. For one of them alone, give the network a
projection of its own: ``models.load(path, untie=True)``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _peft_layout as layout
from jlora import _peft_tied as tied
from jlora._factored import column_norm, factored
from jlora._named import promoted
from jlora._paths import bullets, check_paths, named_leaves, nearest
from jlora._peft_config import (
    CONFIG,
    TASK_HEADS,
    PeftConfig,
    PeftError,
    config_json,
    exact_alpha,
    is_saved,
    make_config,
    modules_above,
    read_config,
    whole_modules,
)
from jlora._peft_read import PREFIX, TENSORS, module_of, named_as, open_adapter, read_tensors, sort_tensors
from jlora._tensors import write_json, write_tensors
from jlora._types import Adapters, Array, LoraFactors, LoraWeight, PyTree
from jlora._types import Path as LeafPath
from jlora.attach import check_adapters
from jlora.config import LoraConfig, Rule
from jlora.merge import check_finite, merge
from jlora.names import Kind, Names, from_torch, to_torch

__all__ = ["PeftError", "load", "save"]

_NO_VALUE = "goes into what PEFT stores beside the adapters, and the params are shapes; expected arrays"


def save(
    folder: str | Path,
    names: Names,
    params: PyTree,
    adapters: Adapters,
    config: LoraConfig,
    *,
    uniform_rank: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
) -> list[Path]:
    """Write adapters as PEFT does, for ``peft.PeftModel.from_pretrained(model, folder)``.

    The same adapters give the same bytes, and the factors decide: ranks, scales and dropout are theirs, not those of
    ``config``. PEFT's ``alpha`` is chosen so that it computes each factor's scale exactly; a scale that no alpha
    gives is folded into B, in float32 unless its dtype holds the product. PEFT knows one dropout rate: the most common
    one is written.

    Leaves trained whole become ``bias="all"`` or ``"lora_only"`` where they are those biases, and ``modules_to_save``
    otherwise. PEFT stores whole modules, and the heads of ``task_type``; what of them was not trained is taken from
    ``params``. So are, beside DoRA, the magnitudes of plain factors: PEFT has DoRA everywhere or nowhere. Factors in
    such a head are folded into its weight, summed in float32 and rounded once to the base's dtype, because PEFT would
    ignore them; `load` returns the weight.

    Args:
      folder: made if it is not there; an adapter that is there is replaced, once the new one is written out.
      names: of the leaves; see `jlora.names`.
      params: the base parameters.
      adapters: as from `jlora.init`.
      config: decides ``use_rslora``, which the factors do not record.
      uniform_rank: scales folded into B, factors padded with zeros to one rank, ``alpha = rank`` and no patterns: what
        vLLM reads (give it a ``--max-lora-rank`` of at least that). It knows factors alone: DoRA, convolutions and
        what was trained whole are refused.
      base_model: the id or folder of the base model.
      task_type: PEFT's, such as ``"SEQ_CLS"``, for ``AutoPeftModelForSequenceClassification``. Without one,
        ``AutoPeftModel`` makes the class that `jlora.models.names` knows.

    Returns:
      The files that were written.

    Raises:
      KeyError, ValueError: when an adapter does not fit the params, or holds NaN or infinity; all are named.
      PeftError: naming every adapter that PEFT has no form for.
    """
    leaves, _ = named_leaves(params)
    check_paths({**adapters, **names}, leaves, "peft.save")
    check_adapters(leaves, adapters, "peft.save")
    check_finite(adapters, "peft.save")
    heads = TASK_HEADS.get(task_type or "", ())
    adapters = _with_whole_heads(adapters, leaves, names, heads)
    _check_writable(adapters, leaves, names, task_type)
    if uniform_rank:
        _check_plain(adapters, names, heads)
    use_rslora = config.use_rslora and not uniform_rank
    adapters = {path: _with_written_scale(value, use_rslora, uniform_rank) for path, value in adapters.items()}
    leaves, adapters = tied.split_leaves(leaves, names), tied.split_adapters(adapters, names)
    own, names = names, tied.split_names(names)

    factors = {path: value for path in names if isinstance(value := adapters.get(path), LoraFactors)}
    layers = _as_layers(factors, leaves, names)
    if uniform_rank:
        largest = max(layer.rank for layer in layers.values())
        layers = {module: layer.padded(largest) for module, layer in layers.items()}

    at = {tensor: (path, i) for path, name in names.items() for i, tensor in enumerate(name.tensors)}
    kinds: dict[str, Kind] = {module_of(t): names[path].kind for t, (path, _) in at.items() if path in factors}
    trained = {tensor for tensor, (path, _) in at.items() if path in adapters and path not in factors}
    bias, saved = whole_modules(trained, layers, at, heads)
    dropouts = [f.dropout for f in factors.values()]
    theirs = make_config(
        {module: layer.rank for module, layer in layers.items()},
        {module: exact_alpha(layer.scale, layer.rank, use_rslora) for module, layer in layers.items()},
        {above for tensor in at for above in modules_above(module_of(tensor))},
        lora_dropout=max(dropouts, key=dropouts.count),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        modules_to_save=saved,
    )
    whole = theirs.whole(at, layers)
    lacking = dict.fromkeys(at[tensor][0] for tensor in at if tensor in whole - trained)
    _raise(
        [f"{t!r} was trained whole, but lies in no module that PEFT could store" for t in at if t in trained - whole]
        + [f"{m!r} has factors and lies in a module that is trained whole: {saved}" for m in layers if theirs.saves(m)]
        + [f"{path!r} {_NO_VALUE}" for path in lacking if isinstance(leaves[path], jax.ShapeDtypeStruct)]
    )

    tensors: dict[str, np.ndarray] = {}
    for module, layer in layers.items():
        suffixes = layout.parts(kinds[module])
        for part, array in layout.to_peft(layer, kinds[module]).items():
            tensors[f"{PREFIX}{module}.{suffixes[part]}"] = array
    for tensor in whole:
        path, i = at[tensor]
        leaf = np.asarray(adapters[path] if tensor in trained else leaves[path])
        module = module_of(tensor)
        key = f"{module}.base_layer.bias" if module in layers else tensor
        tensors[PREFIX + key] = to_torch(leaf[i] if names[path].stacked else leaf, names[path].kind)
    content = config_json(
        theirs,
        own,
        fan_in_fan_out=any(kinds[module] == "conv1d" for module in layers),
        base_model=base_model,
        task_type=task_type,
    )
    return _write(Path(folder), content, tensors)


def load(
    folder: str | Path, names: Names, params: PyTree = None
) -> tuple[dict[LeafPath, LoraFactors | Array], LoraConfig]:
    """Adapters that PEFT (or `save`) wrote, for our parameters.

    An adapter of the bare network fits one with a head and the other way round, where only the names' first part
    differs. In a stacked leaf, layers of unequal ranks are padded with zeros and unequal scales are folded into B;
    layers without an adapter get zeros, which stay zero under training too. Leaves that PEFT trained whole
    (``modules_to_save``, biases, stored embeddings) come back as arrays.

    Args:
      folder: with ``adapter_config.json`` and ``adapter_model.safetensors``; from the hub, fetch it first:
        ``huggingface_hub.snapshot_download(id)``.
      names: of the leaves; see `jlora.names`.
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


def _with_whole_heads(
    adapters: Adapters, leaves: Mapping[LeafPath, Any], names: Names, heads: Collection[str]
) -> Adapters:
    """The adapters with those factors folded into their weights that lie in a head which PEFT trains whole."""
    inside = {
        path
        for path, value in adapters.items()
        if isinstance(value, LoraFactors) and path in names and is_saved(names[path].tensors[0], heads)
    }
    _raise([f"{path!r} {_NO_VALUE}" for path in sorted(inside) if isinstance(leaves[path], jax.ShapeDtypeStruct)])
    merged = merge({p: leaves[p] for p in inside}, {p: adapters[p] for p in inside})
    return {path: merged.get(path, value) for path, value in adapters.items()}


def _check_writable(adapters: Adapters, leaves: Mapping[LeafPath, Any], names: Names, task_type: str | None) -> None:
    """Raises a PeftError that names every adapter of which PEFT has no form."""
    wrong = []
    dora = any(isinstance(value, LoraFactors) and value.magnitude is not None for value in adapters.values())
    for path, value in adapters.items():
        if (name := names.get(path)) is None:
            wrong.append(f"{path!r} is not in the name table{nearest(path, names)}")
        elif isinstance(value, LoraFactors):
            if name.kind not in layout.NDIM:
                wrong.append(f"{path!r} is of kind {name.kind!r}; PEFT adapts {', '.join(layout.NDIM)}")
            elif value.axes != (expected := layout.axes(name.kind, name.stacked)):
                wrong.append(f"{path!r} has {value.axes}; PEFT adapts {name.kind!r} along {expected}")
            if name.tied and value.magnitude is not None:
                wrong.append(f"{path!r} has DoRA and is also {name.tied[0]!r}, whose magnitude in PEFT is by rows")
            if not math.isfinite(value.scale) or value.rank == 0:
                wrong.append(f"{path!r} has scale {value.scale} and rank {value.rank}; expected finite, and above 0")
            if dora and value.magnitude is None and isinstance(leaves[path], jax.ShapeDtypeStruct):
                wrong.append(f"{path!r} {_NO_VALUE}")
    if not any(isinstance(value, LoraFactors) for value in adapters.values()):
        wrong.append(
            "there are no low-rank factors (those of heads that PEFT trains whole aside); PEFT has no adapter without, "
            "save the merged model instead"
        )
    if task_type is not None and task_type not in TASK_HEADS:
        wrong.append(
            f"task_type = {task_type!r}{nearest(task_type, TASK_HEADS)}; expected one of {', '.join(TASK_HEADS)}"
        )
    _raise(wrong)


def _check_plain(adapters: Adapters, names: Names, heads: Collection[str]) -> None:
    """Raises a PeftError that names everything but plain factors of linear layers and embeddings."""
    wrong = []
    for path, value in adapters.items():
        if not isinstance(value, LoraFactors):
            wrong.append(f"{path!r} is trained whole")
        elif value.magnitude is not None:
            wrong.append(f"{path!r} has DoRA")
        elif names[path].kind == "conv2d":
            wrong.append(f"{path!r} is a convolution")
    stored = [path for path, name in names.items() if is_saved(name.tensors[0], heads) and path not in adapters]
    _raise(wrong + [f"{path!r} is stored whole for this task_type" for path in stored], "vLLM")


def _raise(wrong: Collection[str], reader: str = "PEFT") -> None:
    if wrong:
        raise PeftError(
            f"peft.save: {len(wrong)} thing(s) that {reader} has no form for:{bullets(wrong)}\nNothing was written. "
            "Any adapters can be merged: jlora.merge, then save the model."
        )


def _with_written_scale(value: LoraFactors | Array, use_rslora: bool, uniform: bool) -> LoraFactors | Array:
    """The same adapter, with the scale of alpha = rank where it is asked for, or no alpha gives its own."""
    if not isinstance(value, LoraFactors) or not (uniform or exact_alpha(value.scale, value.rank, use_rslora) is None):
        return value
    scale = value.rank / math.sqrt(value.rank) if use_rslora else 1.0
    b = value.b if scale == value.scale else jnp.asarray(layout.scaled(np.asarray(value.b), value.scale / scale))
    return dataclasses.replace(value, b=b, scale=scale)


def _as_layers(
    factors: Mapping[LeafPath, LoraFactors], leaves: Mapping[LeafPath, Any], names: Names
) -> dict[str, layout.Layer]:
    """The updates by PyTorch's module; missing magnitudes are filled in."""
    found: dict[str, layout.Layer] = {}
    dora = any(f.magnitude is not None for f in factors.values())
    for path, f in factors.items():
        if dora and f.magnitude is None:
            norm = column_norm(factored(LoraWeight(jnp.asarray(leaves[path]), f)), f.axes)
            f = dataclasses.replace(f, magnitude=norm.astype(f.b.dtype))
        for tensor, layer in zip(names[path].tensors, layout.layers_of(f, names[path].stacked), strict=True):
            found[module_of(tensor)] = layer
    return found


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> list[Path]:
    """Write both files; until both are whole the folder keeps what it had, and it never holds two that do not match."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as draft:
        write_tensors(Path(draft) / TENSORS, tensors)
        write_json(Path(draft) / CONFIG, config)
        (folder / CONFIG).unlink(missing_ok=True)
        for name in (TENSORS, CONFIG):
            os.replace(Path(draft) / name, folder / name)
    return [folder / CONFIG, folder / TENSORS]


# ---- of load


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
    dtype = promoted(*(x.dtype for x in jax.tree.leaves(adapters)))
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(_exactly(path) for path in made),
        exclude=(),
        rules=tuple(Rule(_exactly(p), rank=r, alpha=a) for p, (r, a) in made.items() if (r, a) != (rank, alpha)),
        train_also=tuple(_exactly(path) for path in adapters if path not in made),
        dropout=theirs.lora_dropout,
        use_rslora=theirs.use_rslora,
        use_dora=theirs.use_dora,
        dtype=dtype.name,
    )


def _exactly(path: LeafPath) -> str:
    return f"^{re.escape(path)}$"
