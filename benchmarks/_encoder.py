"""The encoder of the benchmarks: plain JAX functions without LoRA, and hand-written adapters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = jax.Array
Tree: TypeAlias = dict[str, Any]
Product: TypeAlias = Callable[[Tree, Array], Array]

SCALE = 2.0
LINEARS = ("query", "key", "value", "attention_out", "up", "down")
LEARNING_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the encoder and of its batch; a head is 64 wide, the MLP four times the width.

    ``bias``: whether the linear layers have one (the norms always do).
    """

    layers: int = 4
    width: int = 768
    batch: int = 8
    tokens: int = 128
    bias: bool = False
    rank: int = 8

    def linear(self, name: str) -> tuple[int, int]:
        """``(inputs, outputs)`` of the linear layer ``name``."""
        sizes = {"up": (self.width, 4 * self.width), "down": (4 * self.width, self.width)}
        return sizes.get(name, (self.width, self.width))


def bare(weights: Tree, x: Array) -> Array:
    """The product of a linear layer without LoRA."""
    return x @ weights["kernel"]


def encode(params: Tree, x: Array, product: Product = bare) -> Array:
    """A pre-norm transformer encoder: ``[batch, tokens, width]`` to the same shape."""

    def dense(weights: Tree, x: Array) -> Array:
        y = product(weights, x)
        return y + weights["bias"] if "bias" in weights else y

    for layer in params.values():
        h = _norm(layer["norm_0"], x)
        q, k, v = (dense(layer[name], h).reshape(*h.shape[:2], -1, 64) for name in ("query", "key", "value"))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8
        context = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        x = x + dense(layer["attention_out"], context.reshape(x.shape))
        h = dense(layer["up"], _norm(layer["norm_1"], x))
        x = x + dense(layer["down"], jax.nn.gelu(h, approximate=True))
    return x


def _norm(weights: Tree, x: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * weights["scale"] + weights["bias"]


def loss(y: Array, target: Array) -> Array:
    """Mean squared error, in float32."""
    return jnp.square(y.astype(jnp.float32) - target.astype(jnp.float32)).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_params(shape: Shape, dtype: Any) -> Tree:
    """``{layer_i: {linear: {kernel, bias?}, norm_j: {scale, bias}}}``."""

    def layer(key: Array) -> Tree:
        def linear(name: str, key: Array) -> Tree:
            inputs, outputs = shape.linear(name)
            bias = {"bias": jnp.zeros(outputs, dtype)} if shape.bias else {}
            return {"kernel": jax.random.normal(key, (inputs, outputs), dtype) / inputs**0.5, **bias}

        keys = jax.random.split(key, len(LINEARS))
        linears = {name: linear(name, k) for name, k in zip(LINEARS, keys, strict=True)}
        norms = {
            f"norm_{i}": {"scale": jnp.ones(shape.width, dtype), "bias": jnp.zeros(shape.width, dtype)}
            for i in range(2)
        }
        return linears | norms

    keys = jax.random.split(jax.random.key(0), shape.layers)
    return {f"layer_{i}": layer(key) for i, key in enumerate(keys)}


@functools.partial(jax.jit, static_argnums=0)
def make_factors(shape: Shape) -> Tree:
    """``{layer_i: {linear: {a, b}}}`` in float32; b is nonzero, so that no gradient vanishes."""

    def pair(key: Array, name: str) -> Tree:
        inputs, outputs = shape.linear(name)
        a, b = jax.random.split(key)
        return {
            "a": jax.random.uniform(a, (inputs, shape.rank), minval=-1, maxval=1) / inputs**0.5,
            "b": jax.random.normal(b, (shape.rank, outputs)) / 100,
        }

    keys = jax.random.split(jax.random.key(1), (shape.layers, len(LINEARS)))
    return {f"layer_{i}": {name: pair(keys[i, j], name) for j, name in enumerate(LINEARS)} for i in range(shape.layers)}


def rank(factors: Tree) -> int:
    """Of all the factors."""
    return jax.tree.leaves(factors)[0].shape[-1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_batch(shape: Shape, dtype: Any) -> tuple[Array, Array]:
    """``(x, target)``, both ``[batch, tokens, width]``."""
    x, target = jax.random.normal(jax.random.key(2), (2, shape.batch, shape.tokens, shape.width), dtype)
    return x, target


def with_factors(params: Tree, factors: Tree) -> Tree:
    """The parameters with a and b next to each kernel, for a hand-written LoRA product."""
    return {
        layer: {name: w | factors[layer].get(name, {}) for name, w in weights.items()}
        for layer, weights in params.items()
    }


def summed(params: Tree, factors: Tree) -> Tree:
    """The parameters with the updates summed into the kernels."""

    def add(w: Tree, a: Array, b: Array) -> Tree:
        return w | {"kernel": (w["kernel"] + SCALE * (a @ b)).astype(w["kernel"].dtype)}

    return {
        layer: {name: add(w, **factors[layer][name]) if name in factors[layer] else w for name, w in weights.items()}
        for layer, weights in params.items()
    }


def factored(weights: Tree, x: Array) -> Array:
    """The usual LoRA product, with autodiff's gradient."""
    a, b = (weights[name].astype(x.dtype) for name in "ab")
    return bare(weights, x) + SCALE * ((x @ a) @ b)


def oriented(weights: Tree, x: Array) -> Array:
    """The same product with jlora's gradient written out by hand."""
    return bare(weights, x) + SCALE * _oriented(x, weights["a"], weights["b"])


@jax.custom_vjp
def _oriented(x: Array, a: Array, b: Array) -> Array:
    return _oriented_forward(x, a, b)[0]


def _oriented_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    h = x @ a.astype(x.dtype)
    return h @ b.astype(x.dtype), (x, h, a, b)


def _oriented_backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array]:
    x, h, a, b = saved
    dh = g @ b.astype(x.dtype).T
    da = jnp.einsum("...r,...i->ri", dh, x, preferred_element_type=a.dtype)
    db = jnp.einsum("...r,...o->ro", h, g, preferred_element_type=b.dtype)
    # Without the barrier, XLA folds the transpose into the product and transposes x instead.
    return dh @ a.astype(x.dtype).T, jax.lax.optimization_barrier(da).T, db


_oriented.defvjp(_oriented_forward, _oriented_backward)
