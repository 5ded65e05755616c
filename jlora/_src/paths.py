"""Paths name leaves: ``params/layer_0/kernel``, whichever library built the tree."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jlora._src.quantized import is_one_leaf
from jlora._src.types import Array, Path, PyTree
from jlora.messages import shown


def named_leaves(tree: PyTree) -> tuple[dict[Path, Any], Any]:
    """``({path: leaf}, treedef)`` in the tree's order: the paths that `plan`, adapters and sharding rules use.

    A path joins the keys of a leaf by ``/``. Boxes (NNX variables, ``nn.Partitioned``) add nothing to it. An attached
    weight (`attach`) is one leaf, and so is a quantized one (`QuantizedArray`).

    >>> leaves, treedef = jlora.named_leaves(params)
    >>> params = treedef.unflatten(leaves.values())

    Raises:
      ValueError: if two leaves have the same path; all such paths are listed.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one_leaf)
    paths = [path_of(keys) for keys, _ in flat]
    if len(set(paths)) != len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(
            f"these paths name more than one leaf: {twice}. Expected one leaf per path: rename the parameters, or, if "
            "the tree holds them twice, pass a tree that holds them once."
        )
    return {path: leaf for path, (_, leaf) in zip(paths, flat, strict=True)}, treedef


def path_key(key: Array, path: str) -> Array:
    """The random key of one leaf: ``key`` folded with a hash of its path.

    Each leaf gets its own key, independent of the other leaves.

    >>> noise = {path: jax.random.normal(jlora.path_key(key, path), x.shape) for path, x in leaves.items()}
    """
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def one_key(key: Any, what: str, name: str) -> Array:
    """The typed key of a PRNG key in either form.

    Raises:
      TypeError: if it is anything else, or several keys; ``what`` and ``name`` are of the function and argument.
    """
    if isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32 and key.ndim:
        key = jax.random.wrap_key_data(jnp.asarray(key))
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise TypeError(f"{what}: got {name}={shown(key)}; expected a PRNG key, such as jax.random.key(0)")
    if key.ndim:
        raise TypeError(f"{what}: got keys of shape {key.shape} as {name}; expected one: use jax.vmap for several")
    return key


def path_of(keys: tuple[Any, ...]) -> Path:
    """The path of a leaf from its key path.

    Drops a trailing ``value`` attribute (an NNX variable, ``nn.Partitioned``), so that boxing a parameter does
    not change its path.
    """
    boxed = len(keys) > 1 and isinstance(keys[-1], GetAttrKey) and keys[-1].name == "value"
    return "/".join(_key_name(k) for k in (keys[:-1] if boxed else keys))


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case _:
            return str(key)
