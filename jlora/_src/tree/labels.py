"""What trains and what does not: split trees, labels and masks for optax, and `freeze`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jlora._src.paths import restored_hint
from jlora._src.types import FullWeight, LoraFactors, LoraWeight, PyTree, is_attached


def labels(tree: PyTree) -> PyTree:
    """A tree of the same structure with ``"A"``, ``"B"``, ``"magnitude"``, ``"full"`` or ``"frozen"`` for every array.

    For `optax.partition`, as for LoRA+ (Hayou et al. 2024), which gives B a larger learning rate:

    >>> rates = {"A": optax.adam(1e-4), "B": optax.adam(16e-4), "frozen": optax.set_to_zero()}
    >>> tx = optax.partition(rates, jlora.labels)

    Give optax the function ``jlora.labels`` and not the tree ``jlora.labels(module)`` where the tree is a module with
    a ``__call__`` (Equinox, NNX): optax calls whatever can be called.

    Args:
      tree: an attached tree; or adapters, as from `init`, in which nothing is frozen.

    Raises:
      ValueError: when the tree has no trainable leaf.
    """
    if isinstance(tree, _PLACEHOLDER):
        return tree
    if is_adapters(tree):
        return _labels_of_adapters(tree)
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_attached)
    if not any(map(is_attached, flat)):
        raise ValueError(
            f"labels: none of the {len(flat)} leaves is trainable. Expected a tree made by jlora.attach, or adapters "
            'with LoraFactors among them; adapters of whole leaves alone are all "full", and need no labels.'
            f"{restored_hint(tree) if isinstance(tree, Mapping) else ''}"
        )
    return treedef.unflatten([_leaf_labels(leaf) for leaf in flat])


def is_adapters(tree: PyTree) -> bool:
    """Whether ``tree`` is an adapters tree: a flat Mapping with `LoraFactors` among its values."""
    return isinstance(tree, Mapping) and any(isinstance(v, LoraFactors) for v in tree.values())


def _placeholder() -> type:
    """The type of what `optax.tree_utils.tree_map_params` gives an optimizer in the place of the parameters."""
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
    # A Mapping that JAX flattens to its last leaves (Haiku's FlatMap), or not at all (MappingProxyType).
    return type(adapters)({path: one(value) for path, value in adapters.items()})


def _factor_labels(f: LoraFactors) -> LoraFactors:
    names = LoraFactors("A", "B", "magnitude", f.scale, f.axes, f.dropout)  # pyright: ignore[reportArgumentType]
    return jax.tree.map(lambda name, _: name, names if f.magnitude is not None else _without_magnitude(names), f)


def _without_magnitude(f: LoraFactors) -> LoraFactors:
    return LoraFactors(f.a, f.b, None, f.scale, f.axes, f.dropout)


def _leaf_labels(leaf: Any) -> Any:
    match leaf:
        case LoraWeight(factors=f):
            frozen = jax.tree.map(lambda _: "frozen", leaf)
            return LoraWeight(frozen.base, _factor_labels(f), frozen.strength, frozen.dropout_key, leaf.path)
        case FullWeight():  # either part may be a None hole
            return FullWeight(
                jax.tree.map(lambda _: "frozen", leaf.base), jax.tree.map(lambda _: "full", leaf.value), leaf.path
            )
        case _:
            return "frozen"


def trainable_mask(tree: PyTree) -> PyTree:
    """True for what trains, False for the rest, in the structure of ``tree``; for `optax.masked`.

    `optax.masked` passes the gradients that it masks out through unchanged, as updates: chain it with
    ``optax.masked(optax.set_to_zero(), frozen)``, or use `freeze`.
    """
    return jax.tree.map(lambda label: label != "frozen", labels(tree))


def partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """``(trainable, frozen)``: two trees like ``tree``, each with None where the other has its leaves.

    >>> trainable, frozen = jlora.partition(tree)
    >>> grads = jax.grad(lambda t: loss(jlora.combine(t, frozen), batch))(trainable)

    Raises:
      ValueError: when the tree has no trainable leaf.
    """
    mask = trainable_mask(tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, mask),
        jax.tree.map(lambda x, keep: None if keep else x, tree, mask),
    )


def combine(trainable: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `partition`: every leaf from the tree that has it."""
    return jax.tree.map(lambda x, y: y if x is None else x, trainable, frozen, is_leaf=lambda x: x is None)


def freeze(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer over a whole attached tree that moves only its trainable leaves.

    The rest gets zero updates, whatever its gradient (None holes are accepted), and no optimizer state; weight
    decay and global norms see the trainable leaves alone. Training an attached tree with it, and training the
    adapters alone with ``tx``, give the same numbers.

    >>> tx = jlora.freeze(optax.adamw(1e-3))
    >>> state = tx.init(tree)

    The state holds trees like ``jlora.partition(tree)[0]``, and that is what functions take that read it beside the
    parameters: `optax.contrib.schedule_free_eval_params`, `optax.tree_utils.tree_map_params`.

    Extra arguments that are trees like the parameters or their gradients are reduced to the trainable leaves, and
    functions of the parameters are given whole trees, so that `optax.lbfgs` takes ``grad`` and ``value_fn`` of the
    whole tree.

    Give dropout keys to `attach` inside the loss: a tree to be updated holds no keys. Leaves that are no arrays, such
    as an Equinox module's functions, get None, which ``eqx.apply_updates`` expects.

    Raises:
      ValueError: in ``init`` and ``update``, when the tree has no trainable leaf.
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
        moving, state = inner.update(own(updates), state, None if params is None else own(params), **extra)
        return combine(moving, jax.tree.map(_zero, mask, whole)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _reduced(value: Any, own: Callable[[PyTree], PyTree], params: PyTree, alike: set[Any]) -> Any:
    """An extra argument of an update, for an optimizer that knows the trainable leaves alone.

    Args:
      value: a tree like the parameters, a function of them, or anything else, which stays as it is.
      own: takes the trainable leaves of a whole tree.
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
    """No update for a frozen leaf; None for a trainable one, and for what has no zero: PRNG keys, functions."""
    is_number = isinstance(x, jax.Array | np.ndarray | np.generic | int | float | complex)
    has_zero = is_number and not jnp.issubdtype(jnp.result_type(x), jax.dtypes.extended)
    return jnp.zeros_like(x) if has_zero and not keep else None
