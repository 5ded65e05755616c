"""`init`: fresh adapters, under which the model still equals its base."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.config import LoraConfig
from jlora._src.engine import compat
from jlora._src.engine.factored import column_norm, to_factored
from jlora._src.engine.stored import array_like
from jlora._src.paths import named_leaves, one_key, path_key
from jlora._src.quantized import as_array
from jlora._src.tree.plan import Plan
from jlora._src.tree.plan import plan as make_plan
from jlora._src.types import Array, LoraFactors, LoraWeight, Path, PyTree, Target, Uses
from jlora.messages import bullets, nearest


def init(
    key: Array, params: PyTree, plan: Plan | LoraConfig, uses: Uses | None = None
) -> dict[Path, LoraFactors | Array]:
    """Fresh adapters for ``params``: A random, B zero, so the model does not change yet.

    A is drawn from U(±1/sqrt(fan_in)), like torch's ``kaiming_uniform_(a=sqrt(5))``, and B is 0. For a lookup table the
    roles swap, as in PEFT: A = 0, B from N(0, 1). Leaves of ``train_also`` are copies of the params, never aliases.
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
    leaves, _ = named_leaves(params)
    if isinstance(plan, Plan):
        _check_plan(plan, leaves, uses)
    else:
        plan = make_plan(params, plan, uses)
    copied = [path for path, target in plan.items() if target.axes is None or target.dora]
    if shapes := [path for path in copied if isinstance(array_like(leaves[path]), jax.ShapeDtypeStruct)]:
        raise TypeError(
            f"init: the params are shapes, but these leaves are copied, or measured for DoRA:{bullets(shapes)}\n"
            "Expected arrays. For the shapes of the adapters, call init under jax.eval_shape."
        )
    dtype = plan.config.dtype
    return {
        path: jnp.array(compat.to_device(as_array(leaves[path])), dtype=dtype, copy=True)
        if target.axes is None
        else _factors(path_key(key, path), leaves[path], target, dtype)
        for path, target in plan.items()
    }


def _check_plan(plan: Plan, leaves: dict[Path, Any], uses: Uses | None) -> None:
    if uses is not None:
        raise TypeError("init: got uses and a plan, which already includes them; leave out uses")
    wrong = [
        f"{path!r} has shape {tuple(leaves[path].shape)}, {target.shape} in the plan"
        if path in leaves
        else f"{path!r} is missing{nearest(path, leaves)}"
        for path, target in plan.items()
        if path not in leaves or tuple(leaves[path].shape) != target.shape
    ]
    if wrong:
        raise ValueError(
            f"init: the plan was made for other params:{bullets(wrong)}\nExpected the params given to jlora.plan, "
            "or params of the same shapes."
        )


def _factors(key: Array, weight: Array, target: Target, dtype: str) -> LoraFactors:
    assert target.axes is not None
    batch, inputs, outputs = target.axes.sizes(target.shape)
    a_shape, b_shape = (*batch, *inputs, target.rank), (*batch, target.rank, *outputs)
    if target.lookup:
        a, b = jnp.zeros(a_shape, dtype), jax.random.normal(key, b_shape, dtype)
    else:
        bound = 1 / math.sqrt(max(math.prod(inputs), 1))
        a, b = jax.random.uniform(key, a_shape, dtype, -bound, bound), jnp.zeros(b_shape, dtype)
    factors = LoraFactors(a, b, None, scale=target.scale, axes=target.axes, dropout=target.dropout)
    if target.dora:
        norm = column_norm(to_factored(LoraWeight(weight, factors)), target.axes)
        factors = dataclasses.replace(factors, magnitude=norm.astype(dtype))
    return factors
