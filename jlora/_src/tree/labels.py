"""Which leaves train: labels and masks for optax, `partition` and `combine`, and `freeze`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._src.tree.checks import restored_hint
from jlora._src.types import FullWeight, LoraFactors, LoraWeight, PyTree, is_attached


def labels(tree: PyTree) -> PyTree:
    """A tree of the same structure, with ``"A"``, ``"B"``, ``"magnitude"``, ``"full"`` or ``"frozen"`` for every array.

    For `optax.partition`. LoRA+ (Hayou et al. 2024), for example, gives B a larger learning rate:

    >>> rates = {"A": optax.adam(1e-4), "B": optax.adam(16e-4), "frozen": optax.set_to_zero()}
    >>> tx = optax.partition(rates, jlora.labels)

    For a module with a ``__call__`` (Equinox, NNX), pass optax the function ``jlora.labels``, not the tree
    ``jlora.labels(module)``: optax calls labels that are callable.

    Args:
      tree: an attached tree; or adapters, as from `init`, where nothing is frozen.

    Raises:
      ValueError: if the tree has no trainable leaf.
    """
    if isinstance(tree, _PLACEHOLDER):
        return tree
    if _is_adapters(tree):
        return _labels_of_adapters(tree)
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_attached)
    if not any(map(is_attached, flat)):
        raise ValueError(
            f"labels: none of the {len(flat)} leaves is trainable. Expected the result of jlora.attach, or adapters "
            'with LoraFactors among them; adapters without factors are all "full", and need no labels.'
            f"{restored_hint(tree) if isinstance(tree, Mapping) else ''}"
        )
    return treedef.unflatten([_leaf_labels(leaf) for leaf in flat])


def _is_adapters(tree: PyTree) -> bool:
    """Whether ``tree`` is an adapters tree: a flat Mapping with `LoraFactors` among its values."""
    return isinstance(tree, Mapping) and any(isinstance(v, LoraFactors) for v in tree.values())


def _placeholder() -> type:
    """The type that `optax.tree_utils.tree_map_params` passes to an optimizer in place of the parameters."""
    given: list[Any] = []

    def init(params: Any) -> Any:
        given.append(params)
        return ()

    optax.tree_utils.tree_map_params(init, lambda x: x, ())
    return type(given[0])


_PLACEHOLDER = _placeholder()


def _labels_of_adapters(adapters: Any) -> Any:
    def one(value: Any) -> Any:
        return _factor_labels(value) if is_factors(value) else "full"

    def is_factors(value: Any) -> bool:
        return isinstance(value, LoraFactors)

    if any(map(is_factors, jax.tree.leaves(adapters, is_leaf=is_factors))):
        return jax.tree.map(one, adapters, is_leaf=is_factors)
    # JAX flattens some Mappings completely (Haiku's FlatMap), and some not at all (MappingProxyType).
    return type(adapters)({path: one(value) for path, value in adapters.items()})


def _factor_labels(f: LoraFactors) -> LoraFactors:
    names: Any = {"a": "A", "b": "B", "magnitude": None if f.magnitude is None else "magnitude"}
    return dataclasses.replace(f, **names)


def _leaf_labels(leaf: Any) -> Any:
    match leaf:
        case LoraWeight(factors=f):
            frozen = jax.tree.map(lambda _: "frozen", leaf)
            return dataclasses.replace(frozen, factors=_factor_labels(f))
        case FullWeight():  # either part may be None, in a partitioned tree
            return FullWeight(
                jax.tree.map(lambda _: "frozen", leaf.base), jax.tree.map(lambda _: "full", leaf.value), leaf.path
            )
        case _:
            return "frozen"


def trainable_mask(tree: PyTree) -> PyTree:
    """A tree of the same structure: True for trainable leaves, False for frozen ones; for `optax.masked`.

    `optax.masked` passes masked-out gradients through unchanged, as updates: chain it with
    ``optax.masked(optax.set_to_zero(), frozen)``, or use `freeze`.
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """``(trainable, frozen)``: two trees like ``tree``, each with None in place of the other's leaves.

    >>> trainable, frozen = jlora.partition(tree)
    >>> grads = jax.grad(lambda t: loss(jlora.combine(t, frozen), batch))(trainable)

    Raises:
      ValueError: if the tree has no trainable leaf.
    """
    mask = trainable_mask(tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, mask),
        jax.tree.map(lambda x, keep: None if keep else x, tree, mask),
    )


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `partition`: the leaves of both trees in one."""
    return jax.tree.map(lambda x, y: y if x is None else x, trainable, frozen, is_leaf=lambda x: x is None)


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer for a whole attached tree that updates only its trainable leaves.

    Frozen leaves get zero updates whatever their gradient (even None), and have no optimizer state. Weight
    decay and global norms see the trainable leaves only. Training an attached tree with ``freeze(tx)`` gives the same
    numbers as training the adapters with ``tx``.

    >>> tx = jlora.freeze(optax.adamw(1e-3))
    >>> state = tx.init(tree)

    The state holds trees like ``jlora.partition(tree)[0]``: pass that, not ``tree``, to functions that take the state
    and the parameters, such as `optax.contrib.schedule_free_eval_params` and `optax.tree_utils.tree_map_params`.

    Extra arguments that are trees like the parameters or their gradients are reduced to the trainable leaves.
    Functions of the parameters are called with whole trees, so `optax.lbfgs` takes ``grad`` and ``value_fn`` of the
    whole tree.

    Pass dropout keys to `attach` inside the loss: PRNG keys cannot be updated. Leaves that are not arrays, such as an
    Equinox module's functions, get None, as ``eqx.apply_updates`` expects.

    Raises:
      ValueError: in ``init`` and ``update``, if the tree has no trainable leaf.
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> Any:
        return inner.init(partition(params)[0])

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        whole = updates if params is None else params
        mask = trainable_mask(whole)

        def own(tree: PyTree) -> PyTree:
            return jax.tree.map(_only, mask, tree, is_leaf=_is_none)

        if params is not None:
            alike = {jax.tree.structure(updates), jax.tree.structure(params)}
            extra = {name: _reduced(value, own, params, alike) for name, value in extra.items()}
        moved, state = inner.update(own(updates), state, None if params is None else own(params), **extra)
        return combine(moved, jax.tree.map(_zero, mask, whole)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reduced(value: Any, own: Callable[[PyTree], PyTree], params: PyTree, alike: set[Any]) -> Any:
    """An extra argument of an update, for an optimizer of the trainable leaves.

    Args:
      value: a tree like the parameters, a function of them, or anything else, which is returned unchanged.
      own: reduces a whole tree to its trainable leaves.
      params: the whole tree.
      alike: the structures of whole trees.
    """
    if jax.tree.structure(value) in alike:
        return own(value)
    if not callable(value):
        return value
    trainable, frozen = partition(params)
    structure = jax.tree.structure(trainable)

    @functools.wraps(value)  # optax reads the names of its arguments
    def of_trainable(*args: Any, **kwargs: Any) -> Any:
        full = (combine(x, frozen) if jax.tree.structure(x) == structure else x for x in args)
        result = value(*full, **kwargs)
        return own(result) if jax.tree.structure(result) in alike else result

    return of_trainable


def _is_none(x: Any) -> bool:
    return x is None


def _only(keep: bool, x: Any) -> Any:
    return x if keep else None


def _zero(keep: bool, x: Any) -> Any:
    """A zero update for a frozen array; None for trainable leaves, PRNG keys and functions."""
    is_number = isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex)
    has_zero = is_number and not jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)
    return jnp.zeros_like(x) if has_zero and not keep else None
