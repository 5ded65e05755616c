"""`init`: fresh adapters, under which the model still equals its base."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.config import LoraConfig
from jlora._src.engine import compat
from jlora._src.engine.factors.factored import column_norm, to_factored
from jlora._src.engine.factors.split_inputs import split_inputs
from jlora._src.engine.factors.stored import array_like
from jlora._src.inits.fresh import fresh_factors
from jlora._src.paths import named_leaves, one_key, path_key
from jlora._src.quantized import as_array
from jlora._src.tree.plan import Plan
from jlora._src.tree.plan import plan as make_plan
from jlora._src.types import Array, LoraFactors, LoraWeight, Path, PyTree, Target, Uses
from jlora.messages import bullets, nearest


def init(
    key: Array, params: PyTree, plan: Plan | LoraConfig, uses: Uses | None = None
) -> dict[Path, LoraFactors | Array]:
    """Fresh adapters for ``params``, under which the model does not change yet.

    By default A is drawn from U(±1/sqrt(fan_in)), like torch's ``kaiming_uniform_(a=sqrt(5))``, and B is 0; see
    `LoraConfig.init` for the alternatives, and `decompose` for adapters that start from the weights themselves. For a
    lookup table the roles swap, as in PEFT: A = 0, B from N(0, 1). Each slice of a stacked weight has its own numbers.
    Leaves of ``train_also`` are copies of the params, never aliases.
    Each weight's key is folded from its path (`path_key`), so its initialization does not depend on which other weights
    are adapted. Works under `jax.eval_shape` and ``jax.jit(out_shardings=…)``.

    >>> plan = jlora.plan(params, jlora.LoraConfig(rank=8), uses)
    >>> adapters = jlora.init(jax.random.key(0), params, plan)

    Args:
      key: a PRNG key.
      params: the parameters. Only their shapes matter, except for ``train_also`` leaves and DoRA.
      plan: from `plan`; or a config, planned first.
      uses: with a config: from `trace`; needed by ``targets="all-linear"`` and for weights that are not 2-D.

    Returns:
      ``{path: LoraFactors | array}``: every array leaf of it is trainable, in ``config.dtype``.

    Raises:
      ValueError: if the plan was made for other params, listing each path; for a config, as `plan`.
      TypeError: if ``params`` are only shapes, outside of `jax.eval_shape`, where values are needed; if ``uses``
        are given together with a plan, which already includes them; or if an argument is of another kind, as when two
        are swapped.
    """
    key = one_key(key, "init", "key")
    leaves, _, plan = planned("init", params, plan, uses)
    copied = [path for path, target in plan.items() if target.axes is None or target.dora]
    check_values("init", leaves, copied, "copied, or measured for DoRA")
    dtype = plan.config.dtype
    return {
        path: copy_of(leaves[path], dtype)
        if target.axes is None
        else _factors(path_key(key, path), leaves[path], target, dtype)
        for path, target in plan.items()
    }


def planned(what: str, params: PyTree, plan: Plan | LoraConfig, uses: Uses | None) -> tuple[dict[Path, Any], Any, Plan]:
    """The named leaves of the params, their tree, and a plan for them; a config is planned first.

    Raises:
      ValueError, TypeError: as `init`.
    """
    leaves, treedef = named_leaves(params)
    if isinstance(plan, Plan):
        _check_plan(what, plan, leaves, uses)
    else:
        plan = make_plan(params, plan, uses)
    return leaves, treedef, plan


def check_values(what: str, leaves: dict[Path, Any], needed: list[Path], why: str) -> None:
    """Raises a TypeError if leaves whose values are ``needed`` are only shapes."""
    if shapes := [path for path in needed if isinstance(array_like(leaves[path]), jax.ShapeDtypeStruct)]:
        raise TypeError(
            f"{what}: the params are shapes, but these leaves are {why}:{bullets(shapes)}\n"
            f"Expected arrays. For the shapes of the adapters, call {what} under jax.eval_shape."
        )


def copy_of(leaf: Any, dtype: str) -> Array:
    """A leaf that is trained whole."""
    return jnp.array(compat.to_device(as_array(leaf)), dtype=dtype, copy=True)


def with_magnitude(factors: LoraFactors, weight: Any, path: Path, dtype: str) -> LoraFactors:
    """The factors with DoRA's magnitudes: the column norms of ``weight`` with its update."""
    attached = LoraWeight(weight, factors, path=path)
    norm = column_norm(to_factored(attached), factors.axes, split_inputs(attached))
    return dataclasses.replace(factors, magnitude=norm.astype(dtype))


def _check_plan(what: str, plan: Plan, leaves: dict[Path, Any], uses: Uses | None) -> None:
    if uses is not None:
        raise TypeError(f"{what}: got uses and a plan, which already includes them; leave out uses")
    wrong = [
        f"{path!r} has shape {tuple(leaves[path].shape)}, {target.shape} in the plan"
        if path in leaves
        else f"{path!r} is missing{nearest(path, leaves)}"
        for path, target in plan.items()
        if path not in leaves or tuple(leaves[path].shape) != target.shape
    ]
    if wrong:
        raise ValueError(
            f"{what}: the plan was made for other params:{bullets(wrong)}\nExpected the params given to jlora.plan, "
            "or params of the same shapes."
        )


def _factors(key: Array, weight: Array, target: Target, dtype: str) -> LoraFactors:
    assert target.axes is not None
    a, b = fresh_factors(key, target, dtype)
    factors = LoraFactors(a, b, None, scale=target.scale, axes=target.axes, dropout=target.dropout)
    return with_magnitude(factors, weight, target.path, dtype) if target.dora else factors
