"""What a model of the zoo is: its function and parameters, and what a person says of its weights."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import Axes


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that knows nothing of jlora, and how a person reads it.

    Attributes:
      fn: ``fn(params, *args)``; its result is any pytree.
      params: its parameters; they may hold state and non-arrays too.
      args: the rest of its arguments.
      axes: for every weight that a matmul, convolution or expert matmul consumes first, its axes.
      tables: for every weight that is looked up first, its axes.
      materialized: ``{path: regular expression}``: adapted weights that have no factored form, and why.
      differentiable: whether it has a reverse mode.
    """

    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    axes: Mapping[str, Axes]
    tables: Mapping[str, Axes] = dataclasses.field(default_factory=dict)
    materialized: Mapping[str, str] = dataclasses.field(default_factory=dict)
    differentiable: bool = True


MODELS: dict[str, Callable[[], Model]] = {}
"""Every model by ``library.name``; each is made once, when it is first asked for."""


def model(make: Callable[[], Model]) -> Callable[[], Model]:
    """Enter a function that makes a `Model` into the zoo."""
    made = functools.cache(make)
    MODELS[f"{make.__module__.rpartition('.')[2]}.{make.__name__}"] = made
    return made


def dense(inputs: Any = 0, outputs: Any = 1, batch: Any = ()) -> Axes:
    """`Axes` from an axis or several for each role."""
    return Axes(*(x if isinstance(x, tuple) else (x,) for x in (batch, inputs, outputs)))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers: activations."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(shapes: Any) -> Any:
    """A tree of shapes, such as `jax.eval_shape` of an initializer gives, filled with numbers; no two weights alike.

    Matrices are normal; vectors (biases, gains, variances) are positive; keys are keys, integers zero.
    """
    rng = np.random.default_rng(1)

    def fill(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(2), leaf.shape) if leaf.shape else jax.random.key(2)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        draw = rng.normal(0, 0.5, leaf.shape) if leaf.ndim > 1 else rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(draw, leaf.dtype)

    return jax.tree.map(fill, shapes)


def weights(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Weights of these shapes, `filled`."""
    return filled({name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
