"""`save`: writes adapters in PEFT's format."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import LoraConfig
from jlora._src.engine.factors.factored import column_norm, to_factored
from jlora._src.paths import named_leaves
from jlora._src.tree.checks import check_adapters, check_arguments, check_finite, check_paths
from jlora._src.tree.merge import merge
from jlora._src.types import Adapters, Array, LoraFactors, LoraWeight, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files.drafts import drafts
from jlora.files.hub_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from jlora.files.json_files import write_json
from jlora.files.safetensors import write_tensors
from jlora.files.tensor_names import LayerOfLeaf, TensorNames, by_tensor, module_of, to_tensor
from jlora.messages import nearest
from jlora.peft import layout, tied
from jlora.peft.config import TASK_HEADS, PeftConfig, exact_alpha, is_saved, modules_above, refuse
from jlora.peft.config_file import config_json
from jlora.peft.describe import describe, whole_modules
from jlora.peft.keys import PREFIX

_NO_VALUE = "is stored by PEFT with the adapters, and the params are shapes; expected arrays"


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
    """Write adapters in PEFT's format, for ``peft.PeftModel.from_pretrained(model, folder)``.

    >>> names = models.tensor_names(model)
    >>> peft.save("my_adapter", names, params, adapters, config, base_model="FacebookAI/roberta-base")

    The same adapters give the same bytes. Ranks, scales and dropout come from the factors, not from ``config``. PEFT's
    ``alpha`` is chosen to give each factor's scale exactly; a scale that no alpha can give is folded into B, in float32
    unless its dtype holds the product. PEFT has a single dropout rate: the most common one.

    Leaves trained whole become ``bias="all"`` or ``"lora_only"`` if they are those biases, and ``modules_to_save``
    otherwise. PEFT stores whole modules, and the heads of ``task_type``: their untrained leaves are taken from
    ``params``. If any adapter uses DoRA, the magnitudes of plain factors are computed from ``params`` too, because PEFT
    has DoRA everywhere or nowhere. Factors in a head of ``task_type`` are merged into its weight (summed in float32,
    rounded once to the base's dtype), because PEFT would ignore them; `load` returns the weight.

    Args:
      folder: created if it does not exist; an adapter in it is replaced after the new one is written.
      names: the tensor names of the leaves; see `jlora.files.tensor_names`.
      params: the base parameters.
      adapters: as from `jlora.init`.
      config: determines ``use_rslora``, which the factors do not record.
      uniform_rank: fold scales into B, pad factors with zeros to one rank, and set ``alpha = rank`` without patterns,
        as vLLM requires (with a ``--max-lora-rank`` of at least that rank). vLLM reads factors alone: DoRA,
        convolutions and leaves trained whole raise an error.
      base_model: the id or folder of the base model.
      task_type: PEFT's, such as ``"SEQ_CLS"``, for ``AutoPeftModelForSequenceClassification``. Without one,
        ``AutoPeftModel`` instantiates the class recorded by `jlora.models.tensor_names`.

    Returns:
      The written files.

    Raises:
      KeyError, ValueError: if an adapter does not fit the params, or holds NaN or infinity, listing all.
      PeftError: listing every adapter that PEFT cannot represent.
    """
    check_arguments(params, adapters, "peft.save")
    leaves, _ = named_leaves(params)
    check_adapters(leaves, adapters, "peft.save")
    check_paths(names, leaves, "peft.save")
    check_finite(adapters, "peft.save")
    heads = TASK_HEADS.get(task_type or "", ())
    adapters = _with_whole_heads(adapters, leaves, names, heads)
    _check_writable(adapters, leaves, names, task_type)
    if uniform_rank:
        _check_plain(adapters, names, heads)
    use_rslora = config.use_rslora and not uniform_rank
    adapters = {path: _with_written_scale(value, use_rslora, uniform_rank) for path, value in adapters.items()}
    model = _Adapted(tied.split_leaves(leaves, names), tied.split_names(names), tied.split_adapters(adapters, names))
    layers = _as_layers(model)
    if uniform_rank:
        largest = max(layer.rank for layer in layers.values())
        layers = {module: layer.padded(largest) for module, layer in layers.items()}
    theirs = _their_config(model, layers, heads, use_rslora)
    whole = theirs.whole(model.at, layers)
    _check_whole(model, layers, theirs, whole)
    content = config_json(theirs, names, fan_in_fan_out=model.transposed, base_model=base_model, task_type=task_type)
    return _write(Path(folder), content, _factor_tensors(model, layers) | _whole_tensors(model, layers, whole))


@dataclasses.dataclass(frozen=True)
class _Adapted:
    """A model and its adapters, with a leaf for each tied projection."""

    leaves: Mapping[LeafPath, Any]
    names: TensorNames
    adapters: Mapping[LeafPath, LoraFactors | Array]

    @functools.cached_property
    def at(self) -> dict[str, LayerOfLeaf]:
        """Each PyTorch tensor's place in our tree."""
        return by_tensor(self.names)

    @functools.cached_property
    def factors(self) -> dict[LeafPath, LoraFactors]:
        """The leaves with low-rank factors, in the order of the table."""
        return {p: value for p in self.names if isinstance(value := self.adapters.get(p), LoraFactors)}

    @functools.cached_property
    def trained(self) -> set[str]:
        """The tensors trained whole."""
        return {t for t, leaf in self.at.items() if leaf.path in self.adapters and leaf.path not in self.factors}

    @property
    def transposed(self) -> bool:
        """PEFT's ``fan_in_fan_out``: whether an adapted weight is [in, out] in PyTorch too."""
        return any(self.names[path].kind == "conv1d" for path in self.factors)


def _their_config(
    model: _Adapted, layers: Mapping[str, layout.Layer], heads: Collection[str], use_rslora: bool
) -> PeftConfig:
    """The config for which PEFT computes these layers, and trains the same tensors whole."""
    bias, saved = whole_modules(model.trained, layers, model.at, heads)
    dropouts = [f.dropout for f in model.factors.values()]
    return describe(
        {module: layer.rank for module, layer in layers.items()},
        {module: exact_alpha(layer.scale, layer.rank, use_rslora) for module, layer in layers.items()},
        {above for tensor in model.at for above in modules_above(module_of(tensor))},
        lora_dropout=max(dropouts, key=dropouts.count),
        bias=bias,
        use_rslora=use_rslora,
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        modules_to_save=saved,
    )


def _check_whole(
    model: _Adapted, layers: Mapping[str, layout.Layer], config: PeftConfig, whole: Collection[str]
) -> None:
    """Raises a PeftError unless ``whole``, PEFT's tensors trained whole under ``config``, matches the adapters'."""
    saved = config.modules_to_save
    untrained = dict.fromkeys(leaf.path for t, leaf in model.at.items() if t in whole and t not in model.trained)
    refuse(
        [
            f"{t!r} was trained whole, but is in no module that PEFT could store"
            for t in model.at
            if t in model.trained and t not in whole
        ]
        + [f"{m!r} has factors and is in a module trained whole: {saved}" for m in layers if config.saves(m)]
        + [f"{path!r} {_NO_VALUE}" for path in untrained if _is_shape(model.leaves[path])]
    )


def _factor_tensors(model: _Adapted, layers: Mapping[str, layout.Layer]) -> dict[str, np.ndarray]:
    """The arrays of all factors by PEFT's keys."""
    tensors = {}
    for path in model.factors:
        kind = model.names[path].kind
        for module in map(module_of, model.names[path].tensors):
            arrays = layout.to_peft(layers[module], kind)
            tensors |= {f"{PREFIX}{module}.{layout.parts(kind)[part]}": array for part, array in arrays.items()}
    return tensors


def _whole_tensors(model: _Adapted, layers: Collection[str], whole: Collection[str]) -> dict[str, np.ndarray]:
    """The tensors that PEFT stores whole, trained or not, by its keys."""
    tensors = {}
    for tensor in whole:
        path, name, layer = model.at[tensor]
        module = module_of(tensor)
        key = f"{module}.base_layer.bias" if module in layers else tensor
        leaf = model.adapters[path] if tensor in model.trained else model.leaves[path]
        tensors[PREFIX + key] = to_tensor(leaf, name, layer)
    return tensors


def _with_whole_heads(
    adapters: Adapters, leaves: Mapping[LeafPath, Any], names: TensorNames, heads: Collection[str]
) -> Adapters:
    """The adapters, with factors in a head that PEFT trains whole merged into its weight."""
    inside = {
        path
        for path, value in adapters.items()
        if isinstance(value, LoraFactors) and path in names and is_saved(names[path].tensors[0], heads)
    }
    refuse([f"{path!r} {_NO_VALUE}" for path in sorted(inside) if _is_shape(leaves[path])])
    merged = merge({p: leaves[p] for p in inside}, {p: adapters[p] for p in inside})
    return {path: merged.get(path, value) for path, value in adapters.items()}


def _check_writable(
    adapters: Adapters, leaves: Mapping[LeafPath, Any], names: TensorNames, task_type: str | None
) -> None:
    """Raises a PeftError listing every adapter that PEFT cannot represent."""
    wrong = []
    factors = {path: value for path, value in adapters.items() if isinstance(value, LoraFactors)}
    dora = any(value.magnitude is not None for value in factors.values())
    for path in adapters:
        if path not in names:
            wrong.append(f"{path!r} is not in the name table{nearest(path, names)}")
        elif path in factors:
            wrong += _unwritable(path, factors[path], names)
            if dora and factors[path].magnitude is None and _is_shape(leaves[path]):
                wrong.append(f"{path!r} {_NO_VALUE}")
    if not factors:
        wrong.append(
            "there are no low-rank factors (apart from heads that PEFT trains whole), and PEFT requires some; "
            "save the merged model instead"
        )
    if task_type is not None and task_type not in TASK_HEADS:
        wrong.append(
            f"task_type = {task_type!r}{nearest(task_type, TASK_HEADS)}; expected one of {', '.join(TASK_HEADS)}"
        )
    refuse(wrong)


def _unwritable(path: LeafPath, value: LoraFactors, names: TensorNames) -> list[str]:
    """The reasons why PEFT cannot represent one leaf's factors."""
    name, wrong = names[path], []
    if name.kind not in layout.NDIM:
        wrong.append(f"{path!r} is of kind {name.kind!r}; PEFT adapts {', '.join(layout.NDIM)}")
    elif value.axes != (expected := layout.axes(name.kind, name.stacked)):
        wrong.append(f"{path!r} has {value.axes}; PEFT adapts {name.kind!r} along {expected}")
    if name.tied and value.magnitude is not None:
        wrong.append(f"{path!r} has DoRA and is also {name.tied[0]!r}, whose magnitude in PEFT is by rows")
    if not math.isfinite(value.scale) or value.rank == 0:
        wrong.append(
            f"{path!r} has scale {value.scale} and rank {value.rank}; expected a finite scale and a rank above 0"
        )
    return wrong


def _check_plain(adapters: Adapters, names: TensorNames, heads: Collection[str]) -> None:
    """Raises a PeftError listing everything other than plain factors of linear layers and embeddings."""
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
    """The same adapter, at the scale of ``alpha = rank`` if ``uniform`` or if no alpha gives its own."""
    if not isinstance(value, LoraFactors) or not (uniform or exact_alpha(value.scale, value.rank, use_rslora) is None):
        return value
    scale = value.rank / math.sqrt(value.rank) if use_rslora else 1.0
    b = value.b if scale == value.scale else jnp.asarray(layout.scaled(np.asarray(value.b), value.scale / scale))
    return dataclasses.replace(value, b=b, scale=scale)


def _as_layers(model: _Adapted) -> dict[str, layout.Layer]:
    """The updates by PyTorch module; if any has a magnitude, all get one."""
    found: dict[str, layout.Layer] = {}
    dora = any(f.magnitude is not None for f in model.factors.values())
    for path, f in model.factors.items():
        if dora and f.magnitude is None:
            norm = column_norm(to_factored(LoraWeight(jnp.asarray(model.leaves[path]), f)), f.axes)
            f = dataclasses.replace(f, magnitude=norm.astype(f.b.dtype))
        name = model.names[path]
        for tensor, layer in zip(name.tensors, layout.layers_of(f, name.stacked), strict=True):
            found[module_of(tensor)] = layer
    return found


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _write(folder: Path, config: dict[str, Any], tensors: Mapping[str, np.ndarray]) -> list[Path]:
    """Write both files. The folder keeps its old ones until both are complete, and never holds a mismatched pair."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG]
    with drafts(*files) as (weights_draft, config_draft):
        write_tensors(weights_draft, tensors)
        write_json(config_draft, config)
        (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
    return files[::-1]
