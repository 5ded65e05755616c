"""`load` and `save`: convert Hugging Face checkpoints to a network and its parameters, and back."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.paths import named_leaves
from jlora._src.quantization.scheme import Scheme
from jlora._src.quantized import QuantizedArray
from jlora._src.types import Array, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files.buckets import is_in_bucket, located
from jlora.files.errors import ModelError
from jlora.files.hub_files import CONFIG, GENERATION_CONFIG, WEIGHTS_INDEX, WEIGHTS_PATTERN
from jlora.files.json_files import read_json, write_json
from jlora.files.quantized_tensors import DTYPES, QuantizedTensor, stored_weights
from jlora.files.safetensors import PendingTensor, Tensor, open_checkpoint, write_checkpoint
from jlora.files.tensor_names import to_tensor
from jlora.messages import bullets, nearest
from jlora.models._family import TaskName
from jlora.models._layers import Remat
from jlora.models._matching import match_tensors
from jlora.models._network import Architecture, Labels, abstract, architecture, draw, fetch, read_architecture
from jlora.models._quantized import axes_to_quantize, quantize_tensors, read_quantized
from jlora.models._reading import read_leaf
from jlora.models.attention.mask import AttentionForm

Shardings: TypeAlias = Any
"""None, one sharding for all parameters, a tree of them like the parameters, or ``(path, shape) -> sharding``."""


def load(
    path: str | Path,
    *,
    task: TaskName | None = None,
    labels: Labels = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    remat: Remat = "none",
    attention: AttentionForm = "auto",
    shardings: Shardings = None,
    key: Array | None = None,
    revision: str | None = None,
    untie: bool = False,
    quantize: str | Scheme | None = None,
) -> tuple[nn.Module, PyTree]:
    """Load a network and its parameters from a checkpoint of Hugging Face's transformers.

    >>> model, params = load("../shared/models/minilm-l6", task="sequence-classification", key=jax.random.key(0))
    >>> logits = model.apply(params, input_ids, attention_mask)

    Reads tensors one by one, and for a sharded parameter only the parts of this process's devices, so that the host's
    memory never holds much more than the parameters.

    A quantized checkpoint gives `jlora.QuantizedArray` leaves with the stored values: NF4 and int8 of bitsandbytes, and
    float8 with scales (of a tensor, of rows, or of blocks, as in DeepSeek's and Qwen's). Products take the dequantized
    weights: transformers also rounds the activations for int8 (all but outliers) and float8, so its outputs differ.

    Args:
      path: a folder; or a URL as ``gs://bucket/folder``, or the id of a model on the hub, to download.
      task: the kind of output; by default the checkpoint's.
      labels: of a classifier: their names or number; by default the checkpoint's.
      dtype: of the computation; norms, attention weights and logits for losses are float32.
      param_dtype: of the parameters; by default their stored dtypes.
      remat: what the backward pass recomputes to save memory: "full", everything inside a layer; "dots", all but its
        products with weights; ``model.clone(remat=...)`` changes it later.
      attention: "plain" holds all attention scores of a layer at once; "flash" never does, by the kernels of TPUs
        and GPUs, elsewhere in chunks of queries; "auto" is "plain" below 1024 tokens (on a TPU 512), and "flash" from
        there on. ``model.clone(attention=...)`` changes it later.
      shardings: of the parameters: one sharding, a tree like the parameters (from `sharding_rules`), or
        ``(path, shape) -> sharding``; by default JAX's default device.
      key: a PRNG key for a new head, if the checkpoint lacks it or has one for other labels.
      revision: of a model on the hub: branch, tag or commit.
      untie: give a language model a separate output projection although config.json ties it to the embedding
        (``tie_word_embeddings``). It starts as the file's ``lm_head.weight``, or else as the embedding. `save` writes
        both, and an adapter acts only on the one it adapts.
      quantize: a scheme, such as ``"nf4"``: weights of linear layers become `jlora.QuantizedArray` leaves as by
        `jlora.quantize`, tensor by tensor, so that the whole model never lies in memory in full precision.

    Returns:
      ``(model, params)`` such that ``model.apply(params, ...)`` computes the same as the class in transformers.

    Raises:
      ModelError: if config.json describes an unknown network, or the tensors do not match the network, listing all;
        or if config.json ties an output projection whose values differ from the embedding's; or if only some layers
        of a stack are quantized; or, with ``quantize``, if the checkpoint is quantized already.
      TensorError: if a file is damaged, pickled or outside of the folder, or a tensor holds NaN or infinity.
      ValueError: if there is no such scheme.
    """
    scheme = None if quantize is None else Scheme.parse(quantize)
    folder = fetch(path, revision)
    found = read_architecture(folder, task, labels, untie=untie)
    model = found.network(dtype, param_dtype or jnp.float32, remat, attention)
    tree = abstract(model)
    shapes, treedef = named_leaves(tree)
    names = found.tensor_names()
    tied_names = read_architecture(folder, task, labels).tensor_names() if untie else names
    ties = {head: name.files[0] for name in tied_names.values() for head in name.tied}
    tensors = match_tensors(
        folder, stored_tensors(folder, scheme), names, shapes, found.family, ties, may_start=key is not None
    )
    place = _placement(shardings, shapes, treedef)
    axes = {} if scheme is None else axes_to_quantize(model, tree)

    def read(path: LeafPath) -> Any:
        stored, dtype = tensors[path], param_dtype or tensors[path][0].dtype
        where = (names[path], shapes[path].shape, dtype, place(path))
        if any(isinstance(tensor, QuantizedTensor) for tensor in stored):
            return read_quantized(stored, path, *where)
        if scheme is None or path not in axes:
            return read_leaf(stored, *where)
        return quantize_tensors(stored, *where, scheme, axes[path])

    params = {path: read(path) for path in shapes if path in tensors}
    if new := [path for path in shapes if path not in tensors]:
        assert key is not None
        stored = next((leaf[0].dtype for leaf in tensors.values()), jnp.float32)
        params |= _start(model, new, key, param_dtype or stored, place)
    return model, treedef.unflatten([params[path] for path in shapes])


def stored_tensors(folder: Path, scheme: Scheme | None) -> dict[str, Tensor | QuantizedTensor]:
    """The tensors of a checkpoint by name."""
    config = read_json(folder / CONFIG)
    quantization = config.get("quantization_config")
    if quantization is not None and scheme is not None:
        raise ModelError(
            f"{folder}: got quantize={str(scheme)!r}, and the checkpoint is quantized already "
            f"({quantization.get('quant_method')!r}). Leave out quantize, or load the original checkpoint."
        )
    dtype = config.get("dtype") or config.get("torch_dtype")
    tensors = open_checkpoint(folder, float8=quantization is not None)
    return stored_weights(tensors, quantization, dtype if dtype in DTYPES else "bfloat16")


def save(folder: str | Path, model: nn.Module, params: PyTree, *, max_shard_bytes: int = 5 * 10**9) -> list[Path]:
    """Write a network and its parameters in transformers' format: ``config.json`` and safetensors.

    >>> save("out/merged", model, jlora.merge(params, adapters))

    For a language model, also writes the ``generation_config.json`` from the folder that it was loaded from.

    Args:
      folder: a path, or a URL as ``gs://bucket/folder``; created if it does not exist; a checkpoint in it is replaced.
      model: from `load` or `build`.
      params: plain parameters of ``model``, as from `load` or `jlora.merge`; stored in their dtypes.
      max_shard_bytes: the size above which the tensors are divided into several files with an index.

    Returns:
      The written files.

    Raises:
      ModelError: if ``params`` do not match ``model`` or hold NaN or infinity, listing every leaf.
    """
    leaves, _ = named_leaves(params)
    check_leaves(leaves, model)
    return write(located(folder), model, leaves, leaves.__getitem__, max_shard_bytes)


def check_leaves(leaves: Mapping[LeafPath, Any], model: nn.Module) -> None:
    """Raises a ModelError listing every leaf that is missing, unexpected, of another shape, or not finite."""
    expected = named_leaves(abstract(model))[0]
    wrong = [f"{path!r} is missing" for path in expected if path not in leaves]
    wrong += [f"{path!r} is not a parameter{nearest(path, expected)}" for path in leaves if path not in expected]
    wrong += [
        f"{path!r} has shape {tuple(leaves[path].shape)}, expected {shape.shape}"
        for path, shape in expected.items()
        if path in leaves and tuple(leaves[path].shape) != shape.shape
    ]
    quantized = [path for path, leaf in leaves.items() if isinstance(leaf, QuantizedArray)]
    wrong += [f"{path!r} is quantized; write jlora.dequantize(params)" for path in quantized]
    wrong += [
        f"{path!r} holds NaN or infinity"
        for path, leaf in leaves.items()
        if path not in quantized and not jnp.all(jnp.isfinite(leaf))
    ]
    if wrong:
        raise ModelError(
            f"save: these are not the parameters of {type(model).__name__}:{bullets(wrong)}\nExpected plain, finite "
            "parameters as from load; merge adapters first: jlora.merge(params, adapters)."
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
    """As `save`, fetching the leaves one at a time.

    Args:
      shapes: the shape and dtype of each leaf.
      fetch_leaf: returns a leaf by its path.
      extra: more attributes of config.json.
      generation: the content of generation_config.json; by default the network's.
    """
    found = architecture(model)
    if not is_in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)
    stale = {*folder.glob(WEIGHTS_PATTERN.format(suffix="*")), *folder.glob(WEIGHTS_INDEX)}
    written = write_checkpoint(folder, _pending(found, shapes, fetch_leaf), max_shard_bytes)
    for file in stale - set(written):
        file.unlink()
    hf = {name: value for name, value in found.config.to_hf().items() if name != "torch_dtype"}  # now called dtype
    hf |= {"architectures": [found.class_name], "dtype": _most_common_dtype(shapes), **(extra or {})}
    if generation is None and found.config.generation and found.task == "causal-lm":
        generation = json.loads(found.config.generation)
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    for name, content in ((CONFIG, hf), (GENERATION_CONFIG, generation)):
        if content is not None:
            write_json(folder / name, content)
            written.append(folder / name)
    return written


def _pending(
    found: Architecture, shapes: Mapping[LeafPath, Any], fetch_leaf: Callable[[LeafPath], Any]
) -> dict[str, PendingTensor]:
    """The tensors of a checkpoint by their names in files."""

    def fetch_tensor(path: LeafPath, layer: int) -> np.ndarray:
        return to_tensor(fetch_leaf(path), names[path], layer)

    names = found.tensor_names()
    sizes = {
        path: math.prod(shape.shape) * np.dtype(shape.dtype).itemsize // len(names[path].files)
        for path, shape in shapes.items()
    }
    return {
        file: PendingTensor(partial(fetch_tensor, path, layer), sizes[path])
        for path, name in names.items()
        for layer, file in enumerate(name.files)
    }


def _most_common_dtype(shapes: Mapping[LeafPath, Any]) -> str:
    """The most common dtype of the parameters."""
    sizes: Counter[str] = Counter()
    for shape in shapes.values():
        sizes[np.dtype(shape.dtype).name] += math.prod(shape.shape)
    return max(sizes, key=sizes.__getitem__)


def _start(
    model: nn.Module, paths: Sequence[LeafPath], key: Array, dtype: Any, place: Callable[[LeafPath], Any]
) -> dict[LeafPath, Array]:
    """New values for the leaves ``paths`` alone."""

    def start(key: Array) -> dict[LeafPath, Array]:
        drawn, _ = named_leaves(draw(model, key))
        return {path: drawn[path].astype(dtype) for path in paths}

    drawn = jax.jit(start)(key)
    return {path: value if (s := place(path)) is None else jax.device_put(value, s) for path, value in drawn.items()}


def _placement(shardings: Shardings, shapes: Mapping[LeafPath, Any], treedef: Any) -> Callable[[LeafPath], Any]:
    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    if callable(shardings):
        return lambda path: shardings(path, shapes[path].shape)
    given = dict(zip(shapes, treedef.flatten_up_to(shardings), strict=True))
    return given.__getitem__
