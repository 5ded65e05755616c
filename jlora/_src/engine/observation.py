"""What flows into each adapted weight, as a gradient: the derivative of a carrier is made to be a moment of the inputs.

A weight W with inputs x gets a carrier ``a`` as its first factor, and ``h = x·a``. `observe` passes the product's value
on, and in the backward pass gives ``h`` a cotangent that does not depend on the loss. Then the gradient of ``a``,
routed by JAX through scans, checkpoints, joins and every other thing that the model does with W, is ``xᵀh`` (with
``a`` the identity, the inputs' second moment), or ``xᵀ1``, their sum.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jlora._src.types import Array

Mode = Literal["square", "total", "count"]


def observed_input(x: Array, mode: Mode) -> Array:
    """The inputs as ``observe`` needs them: constants, in float32; ones in order to count them."""
    x = lax.stop_gradient(x).astype(jnp.float32)
    return jnp.ones_like(x) if mode == "count" else x


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def observe(y: Array, hidden: Array, mode: Mode) -> Array:
    """``y``; the cotangent of ``hidden`` is ``hidden`` itself for squares, and one for totals and counts."""
    return y


def _forward(y: Array, hidden: Array, mode: Mode) -> tuple[Array, Array]:
    return y, hidden


def _backward(mode: Mode, hidden: Array, ct: Any) -> tuple[Any, Array]:
    return ct, hidden if mode == "square" else jnp.ones_like(hidden)


observe.defvjp(_forward, _backward)
