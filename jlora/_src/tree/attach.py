"""Put adapters into a parameter tree, and take them out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.paths import named_leaves, one_key, path_key
from jlora._src.tree.checks import PathError, check_adapters, check_arguments
from jlora._src.types import (
    Adapters,
    Array,
    FullWeight,
    LoraFactors,
    LoraWeight,
    Path,
    PyTree,
    RowAdapters,
    RowWeight,
    is_attached,
)
from jlora.messages import bullets, nearest


def attach(
    params: PyTree,
    adapters: Adapters | Mapping[Path, RowAdapters],
    *,
    strength: Array | float | Mapping[Path, Array | float] | None = None,
    dropout_key: Array | None = None,
    split_inputs: Mapping[Path, str | Sequence[str]] | None = None,
) -> PyTree:
    """The parameter tree with adapters attached, for a `lora` function.

    Pure and cheap: no weight is copied or summed. Call it inside the loss, differentiate with respect to the adapters,
    and give them to the optimizer:

    >>> loss = lambda adapters: loss_fn(apply(jlora.attach(params, adapters), batch))
    >>> grads = jax.grad(loss)(adapters)

    A loop that needs one tree of parameters keeps the attached tree, and wraps its optimizer in `freeze`. Without
    `freeze`, the gradients of frozen leaves are zero (see `lora`), so plain SGD or Adam do not change them; an update
    without a gradient, such as AdamW's weight decay, still does.

    Args:
      params: any pytree of arrays.
      adapters: ``{path: LoraFactors | array}``, as from `init`; an array replaces its leaf. Or an adapter for each row
        of the batch, as from `select`.
      strength: scales the updates at run time, without recompiling: a scalar for all, or a mapping with a scalar
        for every path of a `LoraFactors`. Leaves trained whole ignore it. Each weight gets a copy, so that the tree
        can be donated.
      dropout_key: a PRNG key; if given, each adapter's input gets dropout at its recorded rate. The mask depends on
        the key, the path, the slice of a stacked weight, the number of the use in program order, the step of each loop
        around it and, inside ``shard_map``, the device where inputs differ by device (with ``check_vma``, the default).
        The same call with the same key drops the same entries, and so does rematerialization by `jax.checkpoint`.
        The mask depends on nothing outside the `lora` function: under `jax.vmap`, in a loop over calls, and under
        `jax.pmap`, fold the index into the key. With adapters for the rows of a batch (`select`), row or group i has
        the key ``jax.random.fold_in(dropout_key, i)``.
      split_inputs: for DoRA attached inside ``shard_map`` or ``pmap``, whose norm sums over all inputs: the mesh axes
        over which a weight's inputs are split, by path; a path that is not listed is not split. By default they are
        read from the types of the shards, and `lora` raises a ValueError where the types do not tell (``pmap``,
        ``check_vma=False``).

    Returns:
      A tree like ``params`` with `LoraWeight` and `FullWeight` leaves (or, from `select`, `RowWeight`).

    Raises:
      KeyError: if a path is not in ``params``, the paths of ``strength`` differ from the factors', or those of
        ``split_inputs`` have none.
      ValueError: if a shape does not fit, or the tree has adapters attached already; lists every offender.
      TypeError: if a value is neither factors nor an array, for example adapters that orbax restored without a target;
        or if an argument is of another kind, as when the two are swapped.
    """
    check_arguments(params, adapters, "attach")
    leaves, treedef = named_leaves(params)
    one = {path: _of_one_group(value) for path, value in adapters.items()}
    check_adapters(leaves, one, "attach")
    strengths = _strengths(strength, [path for path, v in one.items() if isinstance(v, LoraFactors)])
    if dropout_key is not None:
        dropout_key = one_key(dropout_key, "attach", "dropout_key")
    if unknown := [path for path in split_inputs or () if path not in strengths]:
        raise PathError(
            "attach: split_inputs has paths without factors:"
            + bullets(f"{path!r}{nearest(path, strengths)}" for path in unknown)
        )

    def split(path: Path) -> tuple[str, ...] | None:
        axes = None if split_inputs is None else split_inputs.get(path, ())
        return (axes,) if isinstance(axes, str) else None if axes is None else tuple(axes)

    def key_of(path: Path, groups: int | None = None) -> Array | None:
        key = dropout_key
        if key is None or getattr(one[path], "dropout", 0) == 0:
            return None
        if groups is None:
            return path_key(key, path)
        return jax.vmap(lambda i: path_key(jax.random.fold_in(key, i), path))(jnp.arange(groups))

    def put(path: Path, leaf: Any) -> Any:
        match adapters.get(path):
            case None:
                return leaf
            case LoraFactors() as f:
                return LoraWeight(leaf, f, strengths[path], key_of(path), path, split(path))
            case RowAdapters(adapted=adapted) as rows:
                key = key_of(path, adapted.shape[0])
                return RowWeight(leaf, rows, strengths.get(path), key, path, split(path))
            case value:
                return FullWeight(leaf, value, path)

    return treedef.unflatten([put(path, leaf) for path, leaf in leaves.items()])


def _of_one_group(value: Any) -> Any:
    """The shapes of one adapter of `RowAdapters`; any other value itself."""
    if not isinstance(value, RowAdapters):
        return value
    k = value.axis
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*x.shape[:k], *x.shape[k + 1 :]), x.dtype), value.value)


def _strengths(strength: Any, paths: list[Path]) -> dict[Path, Array | None]:
    """A strength for each path: separate arrays, so that the tree can be donated."""
    if isinstance(strength, Mapping) and set(strength) != set(paths):
        wrong = [f"{path!r} is no path of the factors{nearest(path, paths)}" for path in strength if path not in paths]
        wrong += [f"{path!r} is missing" for path in paths if path not in strength]
        raise PathError(
            f"attach: the strengths do not fit the factors:{bullets(wrong)}\nExpected a scalar for all, or one for "
            "each path of the factors: 1 for those that keep theirs."
        )
    given = strength if isinstance(strength, Mapping) else dict.fromkeys(paths, strength)
    found = {path: None if s is None else jnp.array(s, jnp.float32, copy=True) for path, s in given.items()}
    if shapes := {path: s.shape for path, s in found.items() if s is not None and s.ndim}:
        raise ValueError(f"attach: a strength is a scalar, got shapes {shapes}; for several, use jax.vmap")
    return found


def detach(tree: PyTree) -> tuple[PyTree, dict[Path, LoraFactors | Array]]:
    """``(params, adapters)``: the inverse of `attach`. The params are the arrays given to `attach`.

    Raises:
      ValueError: if nothing is attached.
    """
    leaves, treedef = named_leaves(tree)
    adapters: dict[Path, Any] = {}
    for leaf in leaves.values():
        match leaf:
            case LoraWeight(factors=value) | FullWeight(value=value) | RowWeight(adapters=value):
                adapters[leaf.path] = value
    if not adapters:
        raise ValueError(
            f"detach: none of the {len(leaves)} leaves carries an adapter. Expected the result of jlora.attach."
        )
    return treedef.unflatten([leaf.base if is_attached(leaf) else leaf for leaf in leaves.values()]), adapters
