"""Put adapters into a parameter tree, and take them out again."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src import paths
from jlora._src.engine.factored import check_fit
from jlora._src.types import Adapters, Array, FullWeight, LoraFactors, LoraWeight, Path, PyTree, is_attached


def attach(
    params: PyTree,
    adapters: Adapters,
    *,
    strength: Array | float | Mapping[Path, Array | float] | None = None,
    dropout_key: Array | None = None,
) -> PyTree:
    """The tree with adapted leaves in the place of the weights: what a `lora` function takes.

    Pure and cheap: nothing is copied or summed, so it is called inside the loss, and the adapters are what is
    differentiated and given to the optimizer:

    >>> loss = lambda adapters: loss_fn(apply(jlora.attach(params, adapters), batch))
    >>> grads = jax.grad(loss)(adapters)

    A loop that keeps one tree of parameters keeps the attached one, and gives its optimizer to `freeze`. Without
    `freeze`, the gradients of frozen leaves are zero (see `lora`), so that plain SGD or Adam leave them as they are;
    what does not come from a gradient, such as the weight decay of AdamW, moves them all the same.

    Args:
      params: any pytree of arrays.
      adapters: ``{path: LoraFactors | array}``, as from `init`; an array replaces its leaf.
      strength: multiplies the updates at run time, without recompiling: a scalar for all, or a mapping
        with a scalar for every path of a `LoraFactors`. It does not act on leaves trained whole. Each weight gets a
        copy, so that the tree may be donated.
      dropout_key: a PRNG key; with one, the input of each adapter is dropped at its recorded rate. The mask is a
        function of the key, the path, the slice of a stacked weight, which use of the weight it is in the order of the
        program, the step of each loop around that use, and inside ``shard_map`` the device, where inputs differ by
        device (with ``check_vma``, the default). The same call with the same key drops the same entries, and so
        does what `jax.checkpoint` computes again. What lies outside the `lora` function is not seen: under
        `jax.vmap`, in a loop over calls, and under `jax.pmap`, fold the index into the key.

    Returns:
      A tree like ``params`` with `LoraWeight` and `FullWeight` leaves.

    Raises:
      KeyError: when a path is not in ``params``, or in ``strength`` but not in ``adapters``.
      ValueError: when a shape does not fit, or something is attached already; all offenders are named.
      TypeError: when a value is neither factors nor an array, as adapters are that orbax restored without a target.
    """
    leaves, treedef = paths.named_leaves(params)
    paths.check_paths(adapters, leaves, "attach")
    check_adapters(leaves, adapters, "attach")
    factors = [path for path, v in adapters.items() if isinstance(v, LoraFactors)]
    if isinstance(strength, Mapping):
        if set(strength) != set(factors):
            wrong = sorted(set(strength) ^ set(factors))
            raise KeyError(
                f"attach: strength has a value for each path of the factors or is a scalar; these are missing or "
                f"unknown: {wrong}"
            )
        given = dict(strength)
    else:
        given = dict.fromkeys(factors, strength)
    # An array for each weight, so that the tree can be donated.
    strengths = {path: None if s is None else jnp.array(s, jnp.float32, copy=True) for path, s in given.items()}
    if shapes := {path: s.shape for path, s in strengths.items() if s is not None and s.ndim}:
        raise ValueError(f"attach: a strength is a scalar, got shapes {shapes}; map over several with jax.vmap")
    if dropout_key is not None and not jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key):
        dropout_key = jax.random.wrap_key_data(dropout_key)

    def put(path: Path, leaf: Any) -> Any:
        match adapters.get(path):
            case None:
                return leaf
            case LoraFactors() as f:
                key = None if dropout_key is None or f.dropout == 0 else path_key(dropout_key, path)
                return LoraWeight(leaf, f, strengths[path], key, path)
            case value:
                return FullWeight(leaf, value, path)

    return treedef.unflatten([put(path, leaf) for path, leaf in leaves.items()])


def detach(tree: PyTree) -> tuple[PyTree, dict[Path, LoraFactors | Array]]:
    """``(params, adapters)``: the inverse of `attach`. The params are the very leaves that were given to it.

    Raises:
      ValueError: when nothing is attached.
    """
    leaves, treedef = paths.named_leaves(tree)
    adapters: dict[Path, LoraFactors | Array] = {}
    for leaf in leaves.values():
        if isinstance(leaf, LoraWeight | FullWeight):
            adapters[leaf.path] = leaf.factors if isinstance(leaf, LoraWeight) else leaf.value
    if not adapters:
        raise ValueError(
            f"detach: none of the {len(leaves)} leaves carries an adapter. Expected a tree made by jlora.attach."
        )
    return treedef.unflatten([leaf.base if is_attached(leaf) else leaf for leaf in leaves.values()]), adapters


def check_adapters(leaves: Mapping[Path, Any], adapters: Adapters, what: str) -> None:
    """Raises a ValueError that lists every adapter that does not fit its leaf, a TypeError for what is none."""
    paths.check_kinds(adapters, what)
    wrong = []
    for path, value in adapters.items():
        leaf = leaves[path]
        if is_attached(leaf):
            wrong.append(f"{path!r}: something is attached already; call jlora.detach or jlora.merge first")
        elif isinstance(value, LoraFactors):
            if problem := check_fit(tuple(leaf.shape), value):
                wrong.append(f"{path!r}: {problem}")
        elif tuple(value.shape) != tuple(leaf.shape):
            wrong.append(f"{path!r}: the trained leaf has shape {tuple(value.shape)}, expected {tuple(leaf.shape)}")
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} of {len(adapters)} adapters do not fit the params:{paths.bullets(wrong)}\n"
            "Expected the adapters that jlora.init made for these params; a stacked axis too many or too few "
            "usually means another model, or adapters stacked for jax.vmap that were not mapped."
        )


def path_key(key: Array, path: Path) -> Array:
    """The key of one weight: it depends on its path alone, not on which others are adapted."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))
