"""`init`: fresh adapters, with which the adapted model equals its base."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jlora._src import paths
from jlora._src.config import LoraConfig
from jlora._src.engine import compat
from jlora._src.engine.factored import column_norm, to_factored
from jlora._src.tree.attach import path_key
from jlora._src.tree.plan import plan
from jlora._src.types import Array, LoraFactors, LoraWeight, Path, PyTree, Target, Uses


def init(key: Array, params: PyTree, config: LoraConfig, uses: Uses | None = None) -> dict[Path, LoraFactors | Array]:
    """Fresh adapters for ``params``: A random, B zero, so that nothing changes yet.

    A is drawn as torch's ``kaiming_uniform_(a=sqrt(5))``, that is from U(±1/sqrt(fan_in)), and B is 0. For a
    lookup table it is the other way round, as in PEFT: A = 0, B from N(0, 1). Leaves of ``train_also`` are
    copies of the params, never aliases. Each weight's key is folded from its path, so that its init does
    not depend on which others are adapted. Works under `jax.eval_shape` and ``jax.jit(out_shardings=…)``.

    >>> adapters = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=8), uses)

    Args:
      key: a PRNG key.
      params: the parameters. Only their shapes matter, except for ``train_also`` leaves and DoRA.
      config: what to adapt.
      uses: from `trace`; needed by ``targets="all-linear"`` and for weights that are not 2-D.

    Returns:
      ``{path: LoraFactors | array}``: every array leaf of it is trainable, in ``config.dtype``.

    Raises:
      ValueError: as `plan`.
      TypeError: when ``params`` are only shapes, outside of `jax.eval_shape`, where values are needed.
    """
    if not isinstance(key, jax.Array):
        raise TypeError(f"init: got key={key!r}; expected a PRNG key, such as jax.random.key(0)")
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    leaves, _ = paths.named_leaves(params)
    targets = plan(params, config, uses)
    copied = [path for path, target in targets.items() if target.axes is None or target.dora]
    if shapes := [path for path in copied if isinstance(leaves[path], jax.ShapeDtypeStruct)]:
        raise TypeError(
            f"init: the params are shapes, but these are copied, or measured for DoRA:{paths.bullets(shapes)}\n"
            "Expected arrays; to get shapes, call init under jax.eval_shape."
        )
    return {
        path: jnp.array(compat.to_device(leaves[path]), dtype=config.dtype, copy=True)
        if target.axes is None
        else _factors(path_key(key, path), leaves[path], target, config.dtype)
        for path, target in targets.items()
    }


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
