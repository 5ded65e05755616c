"""Rows with adapters of their own: the adapted model mapped over the rows of a batch, or over groups of them.

`jax.vmap` follows the axis of rows through any program. The base is not mapped: its products stay single large ones,
and a factor has one more named axis (see `product`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import keystr, tree_flatten_with_path

from jlora._src.engine.factors.factored import column_norm, to_factored
from jlora._src.engine.factors.named_axes import promote_arrays
from jlora._src.engine.factors.split_inputs import split_inputs
from jlora._src.engine.staging import is_array, replace_leaves
from jlora._src.quantized import QuantizedArray, is_one_leaf
from jlora._src.types import Array, FullWeight, LoraFactors, LoraWeight, PyTree, RowAdapters, RowWeight
from jlora.messages import bullets

_NO_VMAP = (
    "jlora maps the function over the rows by jax.vmap, which JAX does not define for one of its operations (such as "
    "jax.lax.ragged_dot with a shared weight). Run the rows of each adapter by themselves: "
    "`apply(jlora.attach(params, adapters), rows)`."
)

F = TypeVar("F", bound=Callable[..., Any])


def per_row(apply: F, in_axes: Any = 0, out_axes: Any = 0) -> F:
    """A version of an adapted function for a tree with an adapter for each row (`select`), whose rows are along other
    axes than the first.

    A `lora` function takes such a tree by itself if every array among its other arguments and results has the rows on
    its first axis. Here the axes are stated, as for `jax.vmap`:

    >>> apply = jlora.per_row(jlora.lora(model.apply), in_axes=(None, 0, None))
    >>> logits = apply(jlora.attach(params, jlora.select(stacked, ids)), tokens, positions)

    The function is mapped by `jax.vmap`, and sees each row as a batch of one (or each group of rows, see `select`):
    what it computes over a batch, such as a mean, is of that row alone. Products with frozen weights stay single ones
    over all rows. A tree without adapters for rows is passed to ``apply`` unchanged.

    Args:
      apply: from `lora`.
      in_axes: where the rows are in each positional argument: an axis, None for an argument that is the same for all
        rows, or a tree of these that is a prefix of the argument; a tuple has an entry for each argument. The entry of
        an argument with attached weights has no effect. Scalars are the same for all rows, and keyword arguments have
        the rows on their first axis.
      out_axes: where the rows are in the results, likewise; None for a result that depends on no row.

    Raises:
      ValueError: listing every argument that does not have as many rows as there are ids, every result without an axis
        of rows, and results that are attached weights.
      NotImplementedError: if the function has an operation that `jax.vmap` does not take, such as
        ``jax.lax.ragged_dot`` with a weight that all rows share.
    """

    @functools.wraps(apply)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_one_leaf)
        weights = [i for i, leaf in enumerate(leaves) if isinstance(leaf, RowWeight)]
        if not weights:
            return apply(*args, **kwargs)
        groups: RowAdapters = leaves[weights[0]].adapters
        axes = {i: axis for i, axis in enumerate(_argument_axes(args, kwargs, in_axes)) if axis is not None}
        _check_arguments((args, kwargs), axes, groups.row_count)
        found: list[_Results] = []

        def one_group(adapters: Sequence[tuple[Any, Array, Array | None]], arrays: Sequence[Array]) -> Any:
            own = [_weight(leaves[i], *given) for i, given in zip(weights, adapters, strict=True)]
            own += [jnp.moveaxis(x, 0, axis) for x, axis in zip(arrays, axes.values(), strict=True)]
            inner_args, inner_kwargs = treedef.unflatten(replace_leaves(leaves, [*weights, *axes], own))
            found[:] = [_results_of(apply(*inner_args, **inner_kwargs), out_axes, _size(groups))]
            return found[0].arrays

        adapters = [(leaves[i].adapters.value, leaves[i].adapters.adapted, leaves[i].dropout_key) for i in weights]
        adapter_axes = [(leaves[i].adapters.axis, 0, 0) for i in weights]
        arrays = [_grouped(jnp.moveaxis(jnp.asarray(leaves[i]), axis, 0), groups) for i, axis in axes.items()]
        try:
            by_row, shared = jax.vmap(one_group, (adapter_axes, 0), (0, None))(adapters, arrays)
        except NotImplementedError as error:
            error.add_note(_NO_VMAP)
            raise
        return found[0].joined([_ungrouped(x, groups) for x in by_row], shared)

    return wrapped  # pyright: ignore[reportReturnType]


@dataclasses.dataclass(frozen=True)
class _Results:
    """What a function returns for one group of rows, flat.

    Attributes:
      leaves: every leaf.
      axes: of each leaf, where its rows are; None if it is the same for all rows, or no array.
      treedef: the structure of the result.
    """

    leaves: list[Any]
    axes: list[int | None]
    treedef: Any

    @property
    def arrays(self) -> tuple[list[Array], list[Array]]:
        """Those with rows, on their first axis, and those that are the same for all rows."""
        pairs = list(zip(self.leaves, self.axes, strict=True))
        by_row = [jnp.moveaxis(x, axis, 0) for x, axis in pairs if axis is not None]
        return by_row, [x for x, axis in pairs if axis is None and is_array(x)]

    def joined(self, by_row: Sequence[Array], shared: Sequence[Array]) -> PyTree:
        """The result with these in the place of its `arrays`."""
        rows, rest = iter(by_row), iter(shared)
        return self.treedef.unflatten(
            next(rest) if axis is None and is_array(x) else x if axis is None else jnp.moveaxis(next(rows), 0, axis)
            for x, axis in zip(self.leaves, self.axes, strict=True)
        )


def _results_of(result: PyTree, out_axes: Any, size: int) -> _Results:
    """Raises a ValueError listing every leaf without an axis of ``size`` rows, and those that are attached weights."""
    named, treedef = tree_flatten_with_path(result, is_leaf=is_one_leaf)
    axes = [axis if is_array(x) else None for (_, x), axis in zip(named, _flat_axes(out_axes, result), strict=True)]
    wrong = [
        f"result{keystr(path)} has shape {x.shape}, expected {size} at axis {axis}"
        for (path, x), axis in zip(named, axes, strict=True)
        if axis is not None and not _has_axis(x.shape, axis, size)
    ]
    wrong += [f"result{keystr(path)} is an attached or quantized weight" for path, x in named if is_one_leaf(x)]
    if wrong:
        raise ValueError(
            f"per_row: of a batch of {size} row(s), these results have no rows:{bullets(wrong)}\nEvery result must "
            "have the rows of the batch along its first axis. State another axis, or None for what depends on no row, "
            "as out_axes of jlora.per_row; return no weights, and no sums over rows."
        )
    return _Results([x for _, x in named], axes, treedef)


def _argument_axes(args: tuple[Any, ...], kwargs: dict[str, Any], in_axes: Any) -> list[int | None]:
    """For each leaf of ``(args, kwargs)``, the axis of its rows, or None."""
    each = list(in_axes) if isinstance(in_axes, tuple | list) else [in_axes] * len(args)
    if len(each) != len(args):
        raise ValueError(f"per_row: in_axes has {len(each)} entries for {len(args)} arguments; expected one for each")
    found: list[int | None] = []
    for argument, prefix in [*zip(args, each, strict=True), (kwargs, 0)]:
        leaves = jax.tree.leaves(argument, is_leaf=is_one_leaf)
        weights = any(isinstance(x, RowWeight) for x in leaves)
        axes = [None] * len(leaves) if weights else _flat_axes(prefix, argument)
        plain = [is_array(x) and not isinstance(x, QuantizedArray) and np.ndim(x) > 0 for x in leaves]
        found += [axis if rows else None for axis, rows in zip(axes, plain, strict=True)]
    return found


def _flat_axes(prefix: Any, tree: PyTree) -> list[int | None]:
    """The axis of each leaf of ``tree``, of which ``prefix`` is a prefix with an axis or None at its leaves."""
    found: list[int | None] = []

    def extend(axis: int | None, part: PyTree) -> None:
        found.extend([axis] * len(jax.tree.leaves(part, is_leaf=is_one_leaf)))

    jax.tree.map(extend, prefix, tree, is_leaf=lambda x: x is None)
    return found


def _check_arguments(arguments: PyTree, axes: Mapping[int, int], rows: int) -> None:
    """Raises a ValueError listing every argument that has not ``rows`` rows along its axis."""
    named, _ = tree_flatten_with_path(arguments, is_leaf=is_one_leaf)
    wrong = [
        f"argument {keystr(path[1:])} has shape {x.shape}, expected {rows} at axis {axes[i]}"
        for i, (path, x) in enumerate(named)
        if i in axes and not _has_axis(x.shape, axes[i], rows)
    ]
    if wrong:
        raise ValueError(
            f"per_row: the adapters are for {rows} rows, and these arguments have others:{bullets(wrong)}\nExpected as "
            "many rows as there are ids in jlora.select, on the first axis. State another axis, or None for what is "
            "the same for all rows, as in_axes of jlora.per_row."
        )


def _has_axis(shape: tuple[int, ...], axis: int, size: int) -> bool:
    return -len(shape) <= axis < len(shape) and shape[axis] == size


def _size(groups: RowAdapters) -> int:
    """The number of rows in a group."""
    return 1 if groups.rows is None else groups.rows.shape[1]


def _grouped(x: Array, groups: RowAdapters) -> Array:
    """``[rows, ...]`` as ``[groups, size, ...]``."""
    return x[:, None] if groups.rows is None else x.at[groups.rows].get(mode="promise_in_bounds")


def _ungrouped(x: Array, groups: RowAdapters) -> Array:
    """``[groups, size, ...]`` as ``[rows, ...]``."""
    x = x.reshape(-1, *x.shape[2:])
    return x if groups.places is None else x.at[groups.places].get(mode="promise_in_bounds", unique_indices=True)


def _weight(leaf: RowWeight, value: Any, adapted: Array, key: Array | None) -> LoraWeight | FullWeight:
    """The attached weight of one group. A group without an adapter has its base."""
    if not isinstance(value, LoraFactors):
        base = leaf.base.dequantize() if isinstance(leaf.base, QuantizedArray) else leaf.base
        kept, value = promote_arrays(lax.stop_gradient(base), value)
        return FullWeight(leaf.base, jnp.where(adapted, value, kept), leaf.path)
    weight = LoraWeight(leaf.base, value, leaf.strength, key, leaf.path, leaf.split_inputs)
    if value.magnitude is None:
        return weight
    # The magnitude that changes nothing is the norm that the engine divides by; its factors are zero.
    plain = dataclasses.replace(weight, factors=dataclasses.replace(value, magnitude=None))
    norm = lax.stop_gradient(column_norm(to_factored(plain), value.axes, split_inputs(weight)))
    norm, magnitude = promote_arrays(norm, value.magnitude)
    factors = dataclasses.replace(value, magnitude=jnp.where(adapted, magnitude, norm))
    return dataclasses.replace(weight, factors=factors)
