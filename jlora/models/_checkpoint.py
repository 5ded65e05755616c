"""From a Hugging Face checkpoint to a network and its parameters, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora._paths import bullets, named_leaves, nearest
from jlora._tensors import Tensor, TensorError, is_finite, open_checkpoint, read_json, write_checkpoint, write_json
from jlora._types import Array, PyTree
from jlora._types import Path as LeafPath
from jlora.models._family import Family, ModelConfig, ModelError, Task, task_of
from jlora.models._registry import FAMILIES
from jlora.names import Name, Names, to_torch, torch_axes, torch_shape

Shardings: TypeAlias = Any
"""None, one sharding for all, a tree of them like the parameters, or ``(path, shape) -> sharding``."""

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
CHUNK_BYTES = 16 * 2**20
EXAMPLE = (1, 8)


def load(
    path: str | Path,
    *,
    task: Task | None = None,
    labels: int | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    shardings: Shardings = None,
    key: Array | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, PyTree]:
    """A network and its parameters, from a checkpoint as Hugging Face's transformers writes it.

    >>> model, params = load("../shared/models/minilm-l6", task="sequence-classification", key=jax.random.key(0))
    >>> logits = model.apply(params, input_ids, attention_mask)

    The tensors are read one by one, and of a sharded parameter only the parts that this process holds, so that the host
    never has much more than the parameters themselves.

    Args:
      path: a folder, or the id of a model on the hub, which is then fetched.
      task: what the network ends in; by default that of the checkpoint.
      labels: of a classifier, their names or how many; by default those of the checkpoint.
      dtype: in which the network computes; norms, attention weights and logits of losses stay in float32 inside.
      param_dtype: of the parameters; by default as they are stored.
      shardings: where the parameters go: one sharding, a tree like the parameters, or ``(path, shape) -> sharding``;
        by default JAX's default device.
      key: a PRNG key for a head that the checkpoint lacks or has for other labels: it starts anew from it.
      revision: of a model on the hub: branch, tag or commit.

    Returns:
      ``(model, params)`` such that ``model.apply(params, ...)`` computes what the class of transformers computes.

    Raises:
      ModelError: if the configuration is of no known network, or the tensors are not those of it; all are named.
      TensorError: if a file is damaged, pickled or names files elsewhere, or a tensor holds NaN or infinity.
    """
    folder = fetch(path, revision)
    hf = read_json(folder / "config.json")
    family, config, task = _family_of(hf, task, labels)
    model = _network(family, config, task, dtype, param_dtype or jnp.float32)
    shapes, treedef = named_leaves(abstract(model))
    names = family.names(config, task)
    found = _resolve(open_checkpoint(folder), names, shapes, family, may_start=key is not None, where=str(folder))
    place = _placement(shardings, shapes, treedef)
    params = {
        path: _fetch(found[path], names[path], shape.shape, param_dtype or found[path][0].dtype, place(path))
        for path, shape in shapes.items()
        if path in found
    }
    if new := [path for path in shapes if path not in found]:
        assert key is not None
        stored = next((t[0].dtype for t in found.values()), jnp.float32)
        params |= _start(model, new, key, param_dtype or stored, place)
    return model, treedef.unflatten([params[path] for path in shapes])


def build(
    config: str | Path | Mapping[str, Any],
    *,
    task: Task | None = None,
    labels: int | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    revision: str | None = None,
) -> nn.Module:
    """The network alone, from a folder, the id of a model on the hub, or the content of a config.json.

    The arguments are those of `load`. Its parameters' shapes are `abstract`'s; ``model.init`` draws new ones.
    """
    hf = config if isinstance(config, Mapping) else read_json(fetch(config, revision, FILES[:1]) / "config.json")
    return _network(*_family_of(hf, task, labels), dtype, param_dtype)


def names(model: nn.Module) -> Names:
    """Where each leaf of a network of `jlora.models` lies in a checkpoint; see `jlora.names`."""
    family, task = family_and_task(model)
    return family.names(model.config, task)  # pyright: ignore[reportAttributeAccessIssue]


def abstract(model: nn.Module) -> PyTree:
    """The shapes and dtypes of a network's parameters, as ``model.init`` would make them, from no computation."""
    return jax.eval_shape(lambda: _init(model, jax.random.key(0)))


def example_inputs(model: nn.Module, shape: tuple[int, int] = EXAMPLE) -> Array:
    """The smallest input of a network, of zeros: tokens of ``shape`` [batch, length], or as many images."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(config, "image_size"):
        return jnp.zeros((shape[0], config.image_size, config.image_size, config.num_channels))
    return jnp.zeros(shape, jnp.int32)


def save(folder: str | Path, model: nn.Module, params: PyTree, *, max_shard_bytes: int = 5 * 10**9) -> list[Path]:
    """Write a network and its parameters as transformers does: ``config.json`` and safetensors.

    Args:
      folder: made if it is not there; a checkpoint that is there is replaced.
      params: plain parameters of ``model``, as `load` or `jlora.merge` return them; stored in the dtype that they have.
      max_shard_bytes: the size above which the tensors are divided into several files with an index.

    Returns:
      The files that were written.

    Raises:
      ModelError: if ``params`` are not the parameters of ``model``, naming every leaf, or hold NaN or infinity.
    """
    leaves, _ = named_leaves(params)
    check_leaves(leaves, model)
    return write(Path(folder), model, leaves, leaves.__getitem__, max_shard_bytes)


def check_leaves(leaves: Mapping[LeafPath, Any], model: nn.Module) -> None:
    """Raises a ModelError that names every leaf which is not as ``model`` has it, or holds NaN or infinity."""
    expected = named_leaves(abstract(model))[0]
    wrong = [f"{path!r} is missing" for path in expected if path not in leaves]
    wrong += [f"{path!r} is no parameter of it{nearest(path, expected)}" for path in leaves if path not in expected]
    wrong += [
        f"{path!r} has shape {tuple(leaves[path].shape)}, expected {shape.shape}"
        for path, shape in expected.items()
        if path in leaves and tuple(leaves[path].shape) != shape.shape
    ]
    wrong += [f"{path!r} holds NaN or infinity" for path, leaf in leaves.items() if not jnp.all(jnp.isfinite(leaf))]
    if wrong:
        raise ModelError(
            f"save: these are not the parameters of {type(model).__name__}:{bullets(wrong)}\nExpected plain, finite "
            "parameters as load returns them; adapters are merged first: jlora.merge(params, adapters)."
        )


def write(
    folder: Path,
    model: nn.Module,
    shapes: Mapping[LeafPath, Any],
    fetch_leaf: Callable[[LeafPath], Any],
    max_shard_bytes: int,
) -> list[Path]:
    """As `save`, of leaves that are fetched when their turn comes; ``shapes`` has the shape and dtype of each."""
    family, task = family_and_task(model)
    config: ModelConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
    folder.mkdir(parents=True, exist_ok=True)

    def tensor(path: LeafPath, layer: int, name: Name) -> np.ndarray:
        leaf = fetch_leaf(path)
        return to_torch(np.asarray(leaf[layer] if name.stacked else leaf), name.kind)

    tensors = (
        (
            one,
            partial(tensor, path, layer, name),
            math.prod(shapes[path].shape) * np.dtype(shapes[path].dtype).itemsize // len(name.tensors),
        )
        for path, name in names(model).items()
        for layer, one in enumerate(name.tensors)
    )
    before = {*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")}
    written = write_checkpoint(folder, tensors, max_shard_bytes)
    for stale in before - set(written):
        stale.unlink()
    dtype = np.dtype(next(iter(shapes.values())).dtype).name
    write_json(folder / "config.json", {**config.to_hf(), "architectures": [_class(family, task)], "dtype": dtype})
    return [*written, folder / "config.json"]


def fetch(path: str | Path, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder of a checkpoint: ``path`` itself, or where the files of that id on the hub were put.

    Raises:
      ModelError: if it is neither.
    """
    if (folder := Path(path)).is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{str(path)!r} is no folder here, and as a model on the hub it could not be had: "
            f"{str(error).splitlines()[0]} Expected a folder with config.json and model.safetensors, or an id such as "
            "`FacebookAI/roberta-base`; without a network, fetch it elsewhere and give its folder."
        ) from error


def family_and_task(model: nn.Module) -> tuple[Family, Task]:
    """The family of a network of `jlora.models`, and what it ends in.

    Raises:
      ModelError: if it is of none.
    """
    model_type = json.loads(getattr(getattr(model, "config", None), "hf", "{}")).get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"{type(model).__name__} is no network of jlora.models; expected one that load or build made")
    family = FAMILIES[model_type]
    return family, next(task for task, network in family.networks.items() if type(model) is network)


def _family_of(
    hf: Mapping[str, Any], task: Task | None, labels: int | Sequence[str] | None
) -> tuple[Family, ModelConfig, Task]:
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type = {kind!r} is no network that jlora.models has{nearest(kind, FAMILIES)}; expected one of "
            f"{', '.join(sorted(FAMILIES))}. jlora.lora adapts any other network in JAX that you have."
        )
    family = FAMILIES[kind]
    if (quantized := hf.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ModelError(
            f"quantization_config: the checkpoint is quantized ({method!r}). Expected plain weights: load the "
            "checkpoint that it was made from."
        )
    hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    if labels is not None:
        words = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        if not words or len(set(words)) != len(words):
            raise ModelError(f"labels = {labels!r}; expected how many there are, or their names, each once")
        ids = {
            "id2label": {str(i): word for i, word in enumerate(words)},
            "label2id": {w: i for i, w in enumerate(words)},
        }
        hf = {**{n: v for n, v in hf.items() if n != "num_labels"}, **ids}
    task = task or task_of(hf)
    if task not in family.networks:
        raise ModelError(
            f"{kind} has no network for the task {task!r}; expected one of {', '.join(family.networks)}: pass task=..."
        )
    return family, family.config(hf), task


def _network(family: Family, config: ModelConfig, task: Task, dtype: Any, param_dtype: Any) -> nn.Module:
    return family.networks[task](config, dtype=dtype, param_dtype=param_dtype)


def _class(family: Family, task: Task) -> str:
    """The class of transformers that a config.json names."""
    if task == "causal-lm" and family.architecture == "GPT2":
        return "GPT2LMHeadModel"
    endings = {
        "features": "Model",
        "sequence-classification": "ForSequenceClassification",
        "causal-lm": "ForCausalLM",
        "image-classification": "ForImageClassification",
    }
    return family.architecture + endings[task]


def _init(model: nn.Module, key: Array) -> PyTree:
    return {"params": model.init(key, example_inputs(model))["params"]}


def _start(
    model: nn.Module, paths: Sequence[LeafPath], key: Array, dtype: Any, place: Callable[[LeafPath], Any]
) -> dict[LeafPath, Array]:
    """New values of the leaves ``paths``; those of the others are never computed."""

    def start(key: Array) -> dict[LeafPath, Array]:
        drawn, _ = named_leaves(_init(model, key))
        return {path: drawn[path].astype(dtype) for path in paths}

    drawn = jax.jit(start)(key)
    return {path: value if (s := place(path)) is None else jax.device_put(value, s) for path, value in drawn.items()}


def _resolve(
    tensors: Mapping[str, Tensor],
    names: Names,
    shapes: Mapping[LeafPath, Any],
    family: Family,
    *,
    may_start: bool,
    where: str,
) -> dict[LeafPath, list[Tensor]]:
    """The tensors of each leaf. Leaves of a head that may start anew are left out when the checkpoint lacks them.

    Raises:
      ModelError: naming every tensor that is missing, that the network does not have, or that has another shape.
    """
    wanted = {tensor for name in names.values() for tensor in name.tensors}
    have: dict[str, Tensor] = {}
    unexpected = []
    for given, tensor in tensors.items():
        modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", given))
        spellings = (modern, family.prefix + modern, modern.removeprefix(family.prefix))
        match = next((s for s in spellings if s in wanted), None)
        if match is not None:
            have[match] = tensor
        elif not re.search(family.unread, modern):
            unexpected.append(f"{given!r} of shape {tensor.shape}: the network has no such tensor")

    found: dict[LeafPath, list[Tensor]] = {}
    missing, misshapen = [], []
    for path, shape in shapes.items():
        name = names[path]
        expected = torch_shape(shape.shape, name)
        startable = may_start and re.search(family.heads, path)
        absent = [t for t in name.tensors if t not in have]
        other = [t for t in name.tensors if t in have and have[t].shape != expected]
        if startable and (absent or other):
            continue
        advice = "; pass key=jax.random.key(0) to start a new head" if re.search(family.heads, path) else ""
        missing += [f"{t!r} of shape {expected} is missing{advice}" for t in absent]
        misshapen += [f"{t!r} has shape {have[t].shape}, expected {expected}{advice}" for t in other]
        if not absent and not other:
            found[path] = [have[t] for t in name.tensors]
    if wrong := missing + misshapen + unexpected:
        raise ModelError(
            f"{where}: {len(wrong)} tensor(s) are not those of the network that its config.json describes:"
            f"{bullets(wrong[:40])}"
            + (f"\n  - and {len(wrong) - 40} more" if len(wrong) > 40 else "")
            + "\nExpected a checkpoint of that network, whole; nothing was loaded."
        )
    return found


def _fetch(tensors: Sequence[Tensor], name: Name, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Array:
    """One leaf on its devices; only the slices that this process's devices hold are read."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)
    parts: dict[tuple[range, ...], np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        ranges = tuple(range(size)[s] for s, size in zip(index, shape, strict=True))
        if ranges in parts:  # devices that hold the same part
            return parts[ranges]
        out = _aligned_empty(tuple(map(len, ranges)), dtype)
        one = index[1:] if name.stacked else index
        axes = torch_axes(name.kind, len(one))
        for i, layer in enumerate(ranges[0] if name.stacked else (0,)):
            _read_into(out[i] if name.stacked else out, tensors[layer], name, [one[j] for j in np.argsort(axes)])
        parts[ranges] = out
        return out

    whole = tuple(slice(0, size) for size in shape)
    if sharding is None:
        return jax.device_put(part(whole), may_alias=True)
    return jax.make_array_from_callback(shape, sharding, part)


def _read_into(out: np.ndarray, tensor: Tensor, name: Name, index: Sequence[slice]) -> None:
    """Fill ``out`` with ``tensor[index]`` in our layout, a few rows of PyTorch's at a time."""
    if not tensor.shape:
        _cast_into(out, tensor.read(), tensor)
        return
    target = to_torch(out, name.kind)
    rows = range(tensor.shape[0])[index[0]]
    count = max(1, CHUNK_BYTES // max(1, tensor.dtype.itemsize * math.prod(tensor.shape[1:])))
    for start in range(0, len(rows), count):
        stop = min(start + count, len(rows))
        part = tensor.read((slice(rows[start], rows[stop - 1] + 1), *index[1:]))
        _cast_into(target[start:stop], part, tensor)


def _cast_into(out: np.ndarray, array: np.ndarray, tensor: Tensor) -> None:
    with np.errstate(over="ignore"):
        out[...] = array
    if out.dtype != array.dtype and not is_finite(out):
        raise TensorError(
            f"{tensor.file}: the tensor {tensor.name!r} of dtype {array.dtype} leaves the range of {out.dtype}. Pass a "
            "param_dtype of a larger range, such as float32 or bfloat16."
        )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype, alignment: int = 64) -> np.ndarray:
    """An empty array that starts where JAX's CPU backend can take it over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    return buffer[start : start + size].view(dtype).reshape(shape)


def _placement(shardings: Shardings, shapes: Mapping[LeafPath, Any], treedef: Any) -> Callable[[LeafPath], Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    if callable(shardings):
        return lambda path: shardings(path, shapes[path].shape)
    given = dict(zip(shapes, treedef.flatten_up_to(shardings), strict=True))
    return given.__getitem__
