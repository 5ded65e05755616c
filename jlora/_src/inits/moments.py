"""`input_moments`: the second moments of what flows into each weight, for CorDA and EVA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jlora._src.engine.lora import observed_call
from jlora._src.engine.observation import Mode
from jlora._src.engine.staging import check_callable
from jlora._src.tree.init import planned
from jlora._src.tree.plan import Plan
from jlora._src.types import Array, LoraFactors, LoraWeight, Path, PyTree, Target
from jlora.messages import bullets


class InputMoments(NamedTuple):
    """Sums over the inputs of one weight, float32; those of several batches add up: ``jax.tree.map(jnp.add, x, y)``.

    Attributes:
      count: the number of inputs, of shape ``batch``.
      total: their sum, ``[*batch, inputs]``, with all input axes of the weight flattened.
      square: the sum of their outer products, ``[*batch, inputs, inputs]``.
    """

    count: Array
    total: Array
    square: Array


def input_moments(
    fn: Callable[..., Any], params: PyTree, plan: Plan, *args: Any, **kwargs: Any
) -> dict[Path, InputMoments]:
    """The sum, the sum of outer products and the number of the inputs of each weight in ``plan``, over one call of
    ``fn``.

    An input is what a product contracts with the weight: a token's features, the patch under a kernel, the rows of an
    expert. It may pass through scans, checkpoints and vmap; ``fn`` is differentiated once in reverse mode
    for each of the three sums. Padding counts too: pass batches without it. A matrix of ``fan_in²`` numbers is kept
    for each slice of each weight.

    >>> moments = jlora.input_moments(model.apply, params, plan, batches[0])
    >>> for batch in batches[1:]:
    ...     more = jlora.input_moments(model.apply, params, plan, batch)
    ...     moments = jax.tree.map(jnp.add, moments, more)
    >>> params, adapters = jlora.decompose(params, plan, method="eva", moments=moments)

    Args:
      fn: the function that `trace` saw, which takes the parameters first and returns floating arrays.
      params: its parameters.
      plan: from `plan`. Leaves of ``train_also`` are left out.
      args, kwargs: the other arguments: a batch.

    Raises:
      ValueError: listing every weight with a slice that no input reached, or that only results without a gradient
        depend on. Not checked under ``jit``.
    """
    check_callable(fn, "input_moments")
    leaves, treedef, plan = planned("input_moments", params, plan, None)
    targets = {path: target for path, target in plan.items() if target.axes is not None}

    def gradients(mode: Mode) -> dict[Path, Array]:
        carriers = {path: _carrier(target, mode) for path, target in targets.items()}

        def run(carriers: dict[Path, Array]) -> list[Array]:
            tree = dict(leaves)
            for path, a in carriers.items():
                tree[path] = _observed(leaves[path], a, targets[path])
            result = observed_call(mode, fn, (treedef.unflatten(tree.values()), *args), kwargs)
            return [x for x in jax.tree.leaves(result) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]

        results, vjp = jax.vjp(run, carriers)
        return vjp([jnp.zeros_like(x) for x in results])[0]

    squares, totals, counts = (gradients(mode) for mode in ("square", "total", "count"))
    moments = {}
    for path, target in targets.items():
        assert target.axes is not None
        batch, inputs, _ = target.axes.sizes(target.shape)
        size = math.prod(inputs)
        count = counts[path].reshape(*batch, size).max(-1)
        square = squares[path].reshape(*batch, size, size)
        moments[path] = InputMoments(count, totals[path].reshape(*batch, size), square)
    _check_counts(moments)
    return moments


def _carrier(target: Target, mode: Mode) -> Array:
    """The identity, or a column of zeros, in the layout of A."""
    assert target.axes is not None
    batch, inputs, _ = target.axes.sizes(target.shape)
    size = math.prod(inputs)
    matrix = jnp.eye(size) if mode == "square" else jnp.zeros((size, 1))
    return jnp.broadcast_to(matrix, (*batch, *matrix.shape)).reshape(*batch, *inputs, matrix.shape[-1])


def _observed(leaf: Any, a: Array, target: Target) -> LoraWeight:
    assert target.axes is not None
    batch, _, outputs = target.axes.sizes(target.shape)
    b = jnp.zeros((*batch, a.shape[-1], *outputs), jnp.bfloat16)  # only its shape matters
    return LoraWeight(leaf, LoraFactors(a, b, axes=target.axes), path=target.path)


def _check_counts(moments: dict[Path, InputMoments]) -> None:
    if any(isinstance(m.count, Tracer) for m in moments.values()):
        return
    if missing := [repr(path) for path, m in moments.items() if not bool(jnp.all(m.count > 0))]:
        raise ValueError(
            f"input_moments: {len(missing)} weight(s) have no inputs, or a slice without any:{bullets(missing)}\n"
            "Expected weights in products that the results of the function depend on, and for experts a batch in which "
            "each has a token. Exclude these weights from the targets, or pass a larger batch."
        )
