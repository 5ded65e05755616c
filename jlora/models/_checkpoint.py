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

from jlora._src.paths import named_leaves
from jlora._src.types import Array, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files.safetensors import Tensor, open_checkpoint, write_checkpoint, write_json
from jlora.files.tensor_names import TensorName, TensorNames, to_torch, torch_shape
from jlora.messages import bullets, nearest
from jlora.models._family import Family, ModelConfig, ModelError, Task
from jlora.models._layers import Remat
from jlora.models._network import (
    GENERATION,
    abstract,
    class_of,
    described,
    draw,
    family_and_task,
    fetch,
    names,
    network_of,
)
from jlora.models._reading import are_equal, read_leaf

Shardings: TypeAlias = Any
"""None, one sharding for all, a tree of them like the parameters, or ``(path, shape) -> sharding``."""


def load(
    path: str | Path,
    *,
    task: Task | None = None,
    labels: int | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: Remat = "none",
    shardings: Shardings = None,
    key: Array | None = None,
    revision: str | None = None,
    untie: bool = False,
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
      remat: what the backward pass computes again instead of keeping it, for memory: "full" everything inside of a
        layer, "dots" everything but its products with weights; ``model.clone(remat=...)`` changes it later.
      shardings: where the parameters go: one sharding, a tree like the parameters (see `rules`), or
        ``(path, shape) -> sharding``; by default JAX's default device.
      key: a PRNG key for a head that the checkpoint lacks or has for other labels: it starts anew from it.
      revision: of a model on the hub: branch, tag or commit.
      untie: give a language model an output projection of its own also where config.json ties it to the embedding
        (``tie_word_embeddings``). It starts as the file's ``lm_head.weight``, or else as the embedding. `save` writes
        both, and an adapter of either acts there alone.

    Returns:
      ``(model, params)`` such that ``model.apply(params, ...)`` computes what the class of transformers computes.

    Raises:
      ModelError: if the configuration is of no known network, or the tensors are not those of it; all are named. So
        is an output projection that is tied by config.json, and has other values than the embedding in the file.
      TensorError: if a file is damaged, pickled or names files elsewhere, or a tensor holds NaN or infinity.
    """
    folder = fetch(path, revision)
    family, config, task = described(folder, task, labels, untie=untie)
    model = network_of(family, config, task, dtype, param_dtype or jnp.float32, remat)
    shapes, treedef = named_leaves(abstract(model))
    names = family.names(config, task)
    stored = family.names(described(folder, task, labels)[1], task) if untie else names
    ties = {head: name.files[0] for name in stored.values() for head in name.tied}
    tensors = open_checkpoint(folder)
    found = _resolve(tensors, names, shapes, family, ties, may_start=key is not None, where=str(folder))
    place = _placement(shardings, shapes, treedef)
    params = {
        path: read_leaf(found[path], names[path], shape.shape, param_dtype or found[path][0].dtype, place(path))
        for path, shape in shapes.items()
        if path in found
    }
    if new := [path for path in shapes if path not in found]:
        assert key is not None
        stored = next((t[0].dtype for t in found.values()), jnp.float32)
        params |= _start(model, new, key, param_dtype or stored, place)
    return model, treedef.unflatten([params[path] for path in shapes])


def save(folder: str | Path, model: nn.Module, params: PyTree, *, max_shard_bytes: int = 5 * 10**9) -> list[Path]:
    """Write a network and its parameters as transformers does: ``config.json`` and safetensors.

    A language model that `load` or `build` made from a folder with a ``generation_config.json`` keeps that too.

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
    extra: Mapping[str, Any] | None = None,
    generation: Mapping[str, Any] | None = None,
) -> list[Path]:
    """As `save`, of leaves that are fetched when their turn comes; ``shapes`` has the shape and dtype of each.

    ``extra`` goes into config.json; ``generation`` is the content of generation_config.json, by default the network's.
    """
    family, task = family_and_task(model)
    config: ModelConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
    folder.mkdir(parents=True, exist_ok=True)

    def tensor(path: LeafPath, layer: int, name: TensorName) -> np.ndarray:
        leaf = fetch_leaf(path)
        return to_torch(np.asarray(leaf[layer] if name.stacked else leaf), name.kind)

    tensors = (
        (
            one,
            partial(tensor, path, layer, name),
            math.prod(shapes[path].shape) * np.dtype(shapes[path].dtype).itemsize // len(name.files),
        )
        for path, name in names(model).items()
        for layer, one in enumerate(name.files)
    )
    before = {*folder.glob("model*.safetensors"), *folder.glob("model*.safetensors.index.json")}
    written: list[Path] = write_checkpoint(folder, tensors, max_shard_bytes)
    for stale in before - set(written):
        stale.unlink()
    sizes: dict[str, int] = {}
    for shape in shapes.values():
        kind = np.dtype(shape.dtype).name
        sizes[kind] = sizes.get(kind, 0) + math.prod(shape.shape)
    hf = {name: value for name, value in config.to_hf().items() if name != "torch_dtype"}  # of old, beside dtype
    hf |= {"architectures": [class_of(family, task)], "dtype": max(sizes, key=sizes.__getitem__), **(extra or {})}
    write_json(folder / "config.json", hf)
    written.append(folder / "config.json")
    if generation is None and config.generation and task == "causal-lm":
        generation = json.loads(config.generation)
    (folder / GENERATION).unlink(missing_ok=True)
    if generation is not None:
        write_json(folder / GENERATION, generation)
        written.append(folder / GENERATION)
    return written


def _start(
    model: nn.Module, paths: Sequence[LeafPath], key: Array, dtype: Any, place: Callable[[LeafPath], Any]
) -> dict[LeafPath, Array]:
    """New values of the leaves ``paths``; those of the others are never computed."""

    def start(key: Array) -> dict[LeafPath, Array]:
        drawn, _ = named_leaves(draw(model, key))
        return {path: drawn[path].astype(dtype) for path in paths}

    drawn = jax.jit(start)(key)
    return {path: value if (s := place(path)) is None else jax.device_put(value, s) for path, value in drawn.items()}


def _resolve(
    tensors: Mapping[str, Tensor],
    names: TensorNames,
    shapes: Mapping[LeafPath, Any],
    family: Family,
    ties: Mapping[str, str],
    *,
    may_start: bool,
    where: str,
) -> dict[LeafPath, list[Tensor]]:
    """The tensors of each leaf. Leaves of a head that may start anew are left out when the checkpoint lacks them.

    Of output projections and the embeddings that they are tied to (``ties``), one stands for both where a file lacks
    the other.

    Raises:
      ModelError: naming every tensor that is missing, that the network does not have, that has another shape, or that
        is tied to one of other values.
    """
    own = {tensor for name in names.values() for tensor in name.files}
    wanted = own | set(ties)
    have: dict[str, Tensor] = {}
    unexpected, twice = [], []
    for given, tensor in tensors.items():
        modern = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", given))
        spellings = (modern, family.prefix + modern, modern.removeprefix(family.prefix))
        match = next((s for s in spellings if s in wanted), None)
        if match in have:
            twice.append(f"{given!r} and {have[match].name!r} are one tensor of the network")
        elif match is not None:
            have[match] = tensor
        elif not re.search(family.unread, modern):
            unexpected.append(f"{given!r} of shape {tensor.shape}: the network has no such tensor")

    loose = [
        f"{head!r} and {table!r} have different values, and config.json ties them (tie_word_embeddings): transformers "
        "computes with both; pass untie=True"
        for head, table in ties.items()
        if head not in own and head in have and table in have and not are_equal(have[head], have[table])
    ]
    for pair in ties.items():
        for lacking, there in (pair, pair[::-1]):
            if lacking not in have and there in have:
                have[lacking] = have[there]
    found: dict[LeafPath, list[Tensor]] = {}
    missing, misshapen = [], []
    for path, shape in shapes.items():
        name = names[path]
        expected = torch_shape(shape.shape, name)
        startable = may_start and re.search(family.heads, path)
        absent = [t for t in name.files if t not in have]
        other = [t for t in name.files if t in have and have[t].shape != expected]
        if startable and (absent or other):
            continue
        advice = "; pass key=jax.random.key(0) to start a new head" if re.search(family.heads, path) else ""
        missing += [f"{t!r} of shape {expected} is missing{advice}" for t in absent]
        misshapen += [f"{t!r} has shape {have[t].shape}, expected {expected}{advice}" for t in other]
        if not absent and not other:
            found[path] = [have[t] for t in name.files]
    if wrong := missing + misshapen + unexpected + twice + loose:
        raise ModelError(
            f"{where}: {len(wrong)} tensor(s) are not those of the network that its config.json describes:"
            f"{bullets(wrong[:40])}"
            + (f"\n  - and {len(wrong) - 40} more" if len(wrong) > 40 else "")
            + "\nExpected a checkpoint of that network, whole; nothing was loaded."
        )
    return found


def _placement(shardings: Shardings, shapes: Mapping[LeafPath, Any], treedef: Any) -> Callable[[LeafPath], Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    if callable(shardings):
        return lambda path: shardings(path, shapes[path].shape)
    given = dict(zip(shapes, treedef.flatten_up_to(shardings), strict=True))
    return given.__getitem__
