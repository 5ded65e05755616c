"""The protocol of an update rule: trained values of any kind, expanded to adapters."""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jlora._src.tree.init import init
from jlora._src.tree.plan import Plan
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree, Target


@runtime_checkable
class UpdateRule(Protocol):
    """One's own parametrization of the updates: trained values, and the adapters that they stand for.

    A rule is a pytree. Its leaves are frozen arrays that all weights share, such as VeRA's random matrices: pass it to
    the compiled step as an argument, like the parameters. They are drawn from a key, so no checkpoint needs them.

    >>> rule = jlora.vera(jax.random.key(0), plan)
    >>> trained = rule.init(jax.random.key(1), params)
    >>> loss = lambda trained: loss_fn(apply(jlora.attach(params, rule.adapters(trained)), batch))
    >>> grads = jax.grad(loss)(trained)

    Everything else takes ``rule.adapters(trained)``: `merge`, `save`, `jlora.peft.save`, `stack`.
    """

    def init(self, key: Array, params: PyTree) -> dict[str, Array]:
        """Fresh trained values, under which the model still equals its base: ``{name: array}``, which `save` and `load`
        take. Every array trains."""
        ...

    def adapters(self, trained: dict[str, Array]) -> Adapters:
        """The adapters that the trained values stand for: differentiable, and cheap enough for every step."""
        ...


def whole_and_magnitudes(key: Array, params: PyTree, plan: Plan) -> dict[str, Array]:
    """Fresh values that no rule changes: copies of leaves trained whole, by path, and DoRA's magnitudes."""
    fresh = init(key, params, plan)
    whole = {path: value for path, value in fresh.items() if not isinstance(value, LoraFactors)}
    factors = {path: value for path, value in fresh.items() if isinstance(value, LoraFactors)}
    return whole | {f"{p}/magnitude": f.magnitude for p, f in factors.items() if f.magnitude is not None}


def expanded(target: Target, a: Array, b: Array, trained: dict[Path, Array], **options: float) -> LoraFactors:
    """The factors of one weight with rows of a shared ``a`` and columns of a shared ``b``, and vectors of its own.

    The update is ``A · diag(u) · B · diag(v)``. Both vectors are multiplied into B, so that a frozen A needs no
    gradient, and the backward pass no activations for one.

    Args:
      target: from the plan; its input and output axes are flattened to take the first rows and columns.
      a: ``[inputs or more, rank]``.
      b: ``[rank, outputs or more]``.
      trained: has ``path/u`` of shape ``batch + (rank,)`` and ``path/v`` of shape ``batch + outputs``.
      options: further fields of `LoraFactors`.
    """
    assert target.axes is not None
    batch, inputs, outputs = target.axes.sizes(target.shape)
    a = a[: math.prod(inputs)].reshape(*inputs, target.rank)
    b = b[:, : math.prod(outputs)].reshape(target.rank, *outputs)
    u, v = trained[f"{target.path}/u"], trained[f"{target.path}/v"]
    u = u.reshape(*u.shape, *(1 for _ in outputs))
    return LoraFactors(
        a=jnp.broadcast_to(a, (*batch, *a.shape)),
        b=u * b * jnp.expand_dims(v, len(batch)),
        magnitude=trained.get(f"{target.path}/magnitude"),
        axes=target.axes,
        dropout=target.dropout,
        **options,
    )


def vectors(target: Target, u: float, dtype: str) -> dict[str, Array]:
    """Fresh vectors of one weight: ``u`` everywhere along the rank, 0 along the outputs."""
    assert target.axes is not None
    batch, _, outputs = target.axes.sizes(target.shape)
    return {
        f"{target.path}/u": jnp.full((*batch, target.rank), u, dtype),
        f"{target.path}/v": jnp.zeros((*batch, *outputs), dtype),
    }


def kaiming(key: Array, shape: tuple[int, int], fan_in: int, dtype: str) -> Array:
    """U(±sqrt(6 / fan_in)), like torch's ``kaiming_uniform_``."""
    bound = math.sqrt(6 / fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def factored(plan: Plan) -> tuple[Target, ...]:
    """The targets with factors, which a rule expands.

    Raises:
      ValueError: if there are none.
    """
    found = tuple(target for target in plan.values() if target.axes is not None)
    if not found:
        raise ValueError("the plan has no weights with factors, only leaves trained whole")
    return found
