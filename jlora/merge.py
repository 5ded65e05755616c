"""Fold adapters into the weights, for the unmodified model, and take them out again."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora import _paths
from jlora._factored import dense, factored
from jlora._types import Adapters, LoraFactors, LoraWeight, Path, PyTree
from jlora.attach import check_adapters


def merge(params: PyTree, adapters: Adapters) -> PyTree:
    """Plain parameters with the updates folded in: summed in float32, rounded once to each weight's dtype.

    >>> logits = model.apply(jlora.merge(params, adapters), batch)

    Args:
      params: the base parameters.
      adapters: as from `init`.

    Returns:
      A tree like ``params``; leaves without an adapter are the very same arrays.

    Raises:
      KeyError, ValueError: when an adapter does not fit the params, or holds NaN or infinity (found only
        outside ``jit``); all offenders are named.
    """
    return _mapped("merge", params, adapters, _merged)


def unmerge(merged: PyTree, adapters: Adapters) -> PyTree:
    """The base parameters: the inverse of `merge`, up to the rounding to each weight's dtype. Plain LoRA only.

    Raises:
      KeyError, ValueError: as `merge`; and for adapters that cannot be undone, all of them named: leaves
        trained whole, whose base is gone, and DoRA, whose norms are.
    """
    undoable = [
        f"{path!r}: " + ("DoRA scales the base by norms that are not stored" if isinstance(v, LoraFactors)
                         else "it was trained whole, and the base's value is gone")
        for path, v in adapters.items()
        if not isinstance(v, LoraFactors) or v.magnitude is not None
    ]  # fmt: skip
    if undoable:
        raise ValueError(
            f"unmerge: {len(undoable)} of {len(adapters)} adapters cannot be undone:{_paths.bullets(undoable)}\n"
            "Expected plain LoRA factors. Keep the base parameters, or use jlora.attach and jlora.detach, which "
            "lose nothing."
        )
    return _mapped("unmerge", merged, adapters, _unmerged)


def check_finite(adapters: Adapters, what: str) -> None:
    """Raises a ValueError that names every adapter with NaN or infinity in it. Does nothing while tracing."""
    leaves = jax.tree.leaves(adapters)
    if any(isinstance(x, Tracer) for x in leaves):
        return
    with jax.ensure_compile_time_eval():  # adapters that a jitted function closes over are checked as well
        finite = jax.device_get({path: _all_finite(value) for path, value in adapters.items()})
    if bad := [path for path, ok in finite.items() if not ok]:
        raise ValueError(
            f"{what}: NaN or infinity in the adapters of {len(bad)} of {len(adapters)} weights:"
            f"{_paths.bullets(map(repr, bad))}\nExpected finite values. The training that made them diverged: go "
            "back to an earlier checkpoint, or lower the learning rate."
        )


def _all_finite(value: Any) -> Any:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(value)]))


def _mapped(what: str, params: PyTree, adapters: Adapters, fold: Any) -> PyTree:
    leaves, treedef = _paths.named_leaves(params)
    _paths.check_paths(adapters, leaves, what)
    check_adapters(leaves, adapters, what)
    check_finite(adapters, what)

    def one(path: Path, leaf: Any) -> Any:
        return fold(leaf, adapters[path], path) if path in adapters else leaf

    return treedef.unflatten([one(path, leaf) for path, leaf in leaves.items()])


def _merged(base: Any, value: Any, path: Path) -> Any:
    if isinstance(value, LoraFactors):
        return dense(factored(LoraWeight(base, value, path=path)))
    return value.astype(base.dtype)


def _unmerged(merged: Any, f: LoraFactors, path: Path) -> Any:
    value = factored(LoraWeight(merged, f, path=path))
    return dense(value.with_b(-value.b.array))
