"""What trains and what does not: split trees, labels and masks for optax, and `freeze`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jlora._types import FullWeight, LoraFactors, LoraWeight, PyTree, is_attached


def labels(tree: PyTree) -> PyTree:
    """A tree of the same structure with ``"A"``, ``"B"``, ``"magnitude"``, ``"full"`` or ``"frozen"`` for every array.

    For `optax.partition`, as for LoRA+ (Hayou et al. 2024), which gives B a larger learning rate:

    >>> tx = optax.partition({"A": optax.adam(1e-4), "B": optax.adam(16e-4)}, jlora.labels)

    Args:
      tree: an attached tree; or adapters, as from `init`, in which nothing is frozen.

    Raises:
      ValueError: when the tree has no trainable leaf.
    """
    if is_adapters(tree):
        return {path: _factor_labels(v) if isinstance(v, LoraFactors) else "full" for path, v in tree.items()}
    flat, treedef = jax.tree.flatten(tree, is_leaf=is_attached)
    if not any(map(is_attached, flat)):
        raise ValueError(
            f"labels: none of the {len(flat)} leaves is trainable. Expected a tree made by jlora.attach, or adapters "
            'with LoraFactors among them; adapters of whole leaves alone are all "full", and need no labels.'
        )
    return treedef.unflatten([_leaf_labels(leaf) for leaf in flat])


def is_adapters(tree: PyTree) -> bool:
    """Whether ``tree`` is an adapters tree: a flat dict with `LoraFactors` among its values."""
    return isinstance(tree, dict) and any(isinstance(v, LoraFactors) for v in tree.values())


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

    Give dropout keys to `attach` inside the loss: a tree to be updated holds no keys.

    >>> tx = jlora.freeze(optax.adamw(1e-3))
    >>> state = tx.init(tree)
    """
    inner = optax.with_extra_args_support(tx)

    def init_fn(params: PyTree) -> Any:
        return inner.init(partition(params)[0])

    def update_fn(updates: PyTree, state: Any, params: PyTree | None = None, **extra: Any) -> tuple[PyTree, Any]:
        shapes = updates if params is None else params
        own = None if params is None else partition(params)[0]
        mask = trainable_mask(shapes)
        moving, state = inner.update(jax.tree.map(_only, mask, updates, is_leaf=_is_none), state, own, **extra)
        return combine(moving, jax.tree.map(_zero, mask, shapes)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_none(x: Any) -> bool:
    return x is None


def _only(keep: bool, x: Any) -> Any:
    return x if keep else None


def _zero(keep: bool, x: Any) -> Any:
    """No update for a frozen leaf; None for a trainable one, and for a PRNG key, which has no zero."""
    is_key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.extended)
    return None if keep or is_key else jnp.zeros_like(x)
