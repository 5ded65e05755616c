"""Reads quantized leaves: weights that a checkpoint stores in few bits, and others that are quantized one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jlora._src.config import HEADS
from jlora._src.engine.trace import trace
from jlora._src.paths import named_leaves
from jlora._src.quantization.scheme import Scheme
from jlora._src.quantization.tree import Chooser, quantized_leaf
from jlora._src.quantized import QuantizedArray
from jlora._src.tree.sharding import quantized_shardings
from jlora._src.types import Axes, Path, PyTree
from jlora.files.errors import ModelError
from jlora.files.quantized_tensors import QuantizedTensor
from jlora.files.safetensors import Tensor
from jlora.files.tensor_names import TensorName, from_torch
from jlora.models._network import example_inputs
from jlora.models._reading import read_leaf


def axes_to_quantize(model: nn.Module, shapes: PyTree) -> dict[Path, Axes]:
    """The weights of a network that `jlora.quantize` takes by default, with the roles of their axes."""
    leaves = named_leaves(shapes)[0]
    choose = Chooser("all-linear", HEADS, trace(model.apply, shapes, example_inputs(model)), {}, linen=True)
    return {path: choose.axes(path, leaves[path]) for path in choose.all(leaves)}


def quantize_tensors(
    tensors: Sequence[Tensor],
    name: TensorName,
    shape: tuple[int, ...],
    dtype: Any,
    place: Any,
    scheme: Scheme,
    axes: Axes,
) -> QuantizedArray:
    """One leaf, quantized tensor by tensor: at most one of them lies in memory in full precision."""
    one = name._replace(stacked=False)
    if name.stacked:
        axes = Axes(*(tuple(axis - 1 for axis in group if axis) for group in axes))

    def layer(i: int, shape: tuple[int, ...], place: Any) -> QuantizedArray:
        array = read_leaf([tensors[i]], one, shape, tensors[i].dtype, place)
        return quantized_leaf(array, scheme, axes)[0].astype(dtype)

    return _stacked(layer, len(tensors), shape, place) if name.stacked else layer(0, shape, place)


def read_quantized(
    tensors: Sequence[Tensor | QuantizedTensor],
    path: Path,
    name: TensorName,
    shape: tuple[int, ...],
    dtype: Any,
    place: Any,
) -> QuantizedArray:
    """One leaf with the stored codes and scales, in our order of axes.

    Raises:
      ModelError: if only some layers are quantized, or the layer is not a linear one.
    """
    plain = [tensor.name for tensor in tensors if isinstance(tensor, Tensor)]
    if plain or name.kind not in ("linear", "embedding"):
        mixed = f"{len(plain)} of {len(tensors)} layers are not quantized, such as {plain[:1]}"
        why = mixed if plain else f"it is the weight of a {name.kind}"
        raise ModelError(f"{path!r}: {why}. Expected quantized linear layers: load the original checkpoint.")

    def layer(i: int, shape: tuple[int, ...], place: Any) -> QuantizedArray:
        tensor = tensors[i]
        assert isinstance(tensor, QuantizedTensor)
        found = jax.tree.map(lambda x: np.ascontiguousarray(from_torch(x, name.kind)), tensor.read_parts())
        places = _places(found, place)
        return jax.tree.map(_put, found.astype(dtype), places)

    return _stacked(layer, len(tensors), shape, place) if name.stacked else layer(0, shape, place)


def _put(array: np.ndarray, place: Any) -> Any:
    if not isinstance(place, NamedSharding):
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, place, array.__getitem__)


def _places(array: QuantizedArray, place: Any) -> Any:
    """The place of each array."""
    if isinstance(place, NamedSharding):
        return quantized_shardings(array, place)
    return jax.tree.map(lambda _: "default", array)


def _stacked(
    layer: Callable[[int, tuple[int, ...], Any], QuantizedArray], count: int, shape: tuple[int, ...], place: Any
) -> QuantizedArray:
    """A stack of layers, each written to its place as soon as it is there."""
    own = place
    if isinstance(place, NamedSharding):
        own = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]), memory_kind=place.memory_kind)
    first = layer(0, shape[1:], own)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), first)
    places = quantized_shardings(shapes, place) if isinstance(place, NamedSharding) else None
    found = jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), out_shardings=places)()
    write = jax.jit(_write, donate_argnums=0, out_shardings=places)
    for i in range(count):
        found = write(found, first if i == 0 else layer(i, shape[1:], own), i)
    return found


def _write(stack: QuantizedArray, layer: QuantizedArray, i: Any) -> QuantizedArray:
    return jax.tree.map(partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0), stack, layer)
