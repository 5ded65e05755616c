"""From our adapters to PEFT's."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import LoraConfig
from jlora._src.engine.factored import column_norm, to_factored
from jlora._src.paths import named_leaves
from jlora._src.tree.checks import check_adapters, check_finite, check_paths
from jlora._src.tree.merge import merge
from jlora._src.types import Adapters, Array, LoraFactors, LoraWeight, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files.safetensors import write_json, write_tensors
from jlora.files.tensor_names import Kind, TensorNames, to_torch
from jlora.messages import nearest
from jlora.peft import layout, tied
from jlora.peft.config import (
    CONFIG,
    TASK_HEADS,
    config_json,
    exact_alpha,
    is_saved,
    make_config,
    modules_above,
    refuse,
    whole_modules,
)
from jlora.peft.tensors import PREFIX, TENSORS, module_of

_NO_VALUE = "goes into what PEFT stores beside the adapters, and the params are shapes; expected arrays"


def save(
    folder: str | Path,
    names: TensorNames,
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
      names: of the leaves; see `jlora.files.tensor_names`.
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
    refuse(
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


def _with_whole_heads(
    adapters: Adapters, leaves: Mapping[LeafPath, Any], names: TensorNames, heads: Collection[str]
) -> Adapters:
    """The adapters with those factors folded into their weights that lie in a head which PEFT trains whole."""
    inside = {
        path
        for path, value in adapters.items()
        if isinstance(value, LoraFactors) and path in names and is_saved(names[path].tensors[0], heads)
    }
    refuse([f"{path!r} {_NO_VALUE}" for path in sorted(inside) if isinstance(leaves[path], jax.ShapeDtypeStruct)])
    merged = merge({p: leaves[p] for p in inside}, {p: adapters[p] for p in inside})
    return {path: merged.get(path, value) for path, value in adapters.items()}


def _check_writable(
    adapters: Adapters, leaves: Mapping[LeafPath, Any], names: TensorNames, task_type: str | None
) -> None:
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
    refuse(wrong)


def _check_plain(adapters: Adapters, names: TensorNames, heads: Collection[str]) -> None:
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
    refuse(wrong + [f"{path!r} is stored whole for this task_type" for path in stored], "vLLM")


def _with_written_scale(value: LoraFactors | Array, use_rslora: bool, uniform: bool) -> LoraFactors | Array:
    """The same adapter, with the scale of alpha = rank where it is asked for, or no alpha gives its own."""
    if not isinstance(value, LoraFactors) or not (uniform or exact_alpha(value.scale, value.rank, use_rslora) is None):
        return value
    scale = value.rank / math.sqrt(value.rank) if use_rslora else 1.0
    b = value.b if scale == value.scale else jnp.asarray(layout.scaled(np.asarray(value.b), value.scale / scale))
    return dataclasses.replace(value, b=b, scale=scale)


def _as_layers(
    factors: Mapping[LeafPath, LoraFactors], leaves: Mapping[LeafPath, Any], names: TensorNames
) -> dict[str, layout.Layer]:
    """The updates by PyTorch's module; missing magnitudes are filled in."""
    found: dict[str, layout.Layer] = {}
    dora = any(f.magnitude is not None for f in factors.values())
    for path, f in factors.items():
        if dora and f.magnitude is None:
            norm = column_norm(to_factored(LoraWeight(jnp.asarray(leaves[path]), f)), f.axes)
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
