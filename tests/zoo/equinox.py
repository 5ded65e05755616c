"""Equinox modules: pytrees that hold functions and numbers beside their arrays, used under `jax.vmap`."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from ._model import Model, dense, filled, model, normal

FLIPPED = dense(1, 0)
STACK = dense(2, 1, batch=0)
KEY = jax.random.key(0)


def _made(make: Any, *args: Any, axes: Any, fn: Any = None, **options: Any) -> Model:
    """``fn(module, *args)``, by default the module over a batch of examples."""
    module = filled(eqx.filter_eval_shape(make, KEY))
    return Model(fn or (lambda m, x: jax.vmap(m)(x)), module, args, axes, **options)


@model
def mlp() -> Model:
    """Its activation functions are leaves of the tree."""
    axes = {f"layers/{i}/weight": FLIPPED for i in range(3)}
    return _made(lambda key: eqx.nn.MLP(5, 3, 7, 2, activation=jax.nn.relu, key=key), normal(4, 5), axes=axes)


class Transformer(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    scale: float

    def __init__(self, key: Any):
        keys = jax.random.split(key, 3)
        self.embed = eqx.nn.Embedding(9, 6, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(2, 6, key=keys[1])
        self.norm = eqx.nn.LayerNorm(6)
        self.mlp = eqx.nn.MLP(6, 6, 8, 1, activation=jax.nn.relu, key=keys[2])
        self.scale = 0.5

    def __call__(self, ids: Any) -> Any:
        x = jax.vmap(self.embed)(ids)
        h = jax.vmap(self.norm)(x)
        x = x + self.attention(h, h, h)
        x = x + self.scale * jax.vmap(self.mlp)(x)
        return x @ self.embed.weight.T


@model
def transformer() -> Model:
    """Attention, and an embedding that is tied to the logits."""
    axes = {f"attention/{name}_proj/weight": FLIPPED for name in ("query", "key", "value", "output")}
    axes |= {f"mlp/layers/{i}/weight": FLIPPED for i in range(2)}
    return _made(Transformer, jnp.array([[1, 2, 8]]), axes=axes, tables={"embed/weight": dense()})


class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    linear: eqx.nn.Linear

    def __init__(self, key: Any):
        self.norm = eqx.nn.LayerNorm(6)
        self.linear = eqx.nn.Linear(6, 6, key=key)

    def __call__(self, x: Any) -> Any:
        return x + jax.nn.relu(self.linear(self.norm(x)))


def _stacked(make: Any) -> Any:
    return lambda key: eqx.filter_vmap(make)(jax.random.split(key, 3))


def _run(blocks: Any, x: Any, remat: bool) -> Any:
    """Every layer in turn, the usual way for stacked modules: split off the arrays, scan over them."""
    arrays, static = eqx.partition(blocks, eqx.is_array)

    def step(x: Any, layer: Any) -> Any:
        return eqx.combine(layer, static)(x), None

    return lax.scan(jax.checkpoint(step) if remat else step, x, arrays)[0]


@model
def scanned() -> Model:
    fn = lambda m, xs: jax.vmap(lambda x: _run(m, x, False))(xs)  # noqa: E731
    return _made(_stacked(Block), normal(4, 6), axes={"linear/weight": STACK}, fn=fn)


@model
def scan_of_remat() -> Model:
    fn = lambda m, xs: jax.vmap(lambda x: _run(m, x, True))(xs)  # noqa: E731
    return _made(_stacked(Block), normal(4, 6), axes={"linear/weight": STACK}, fn=fn)


@model
def keys_of_every_layer() -> Model:
    """A scan that emits each layer's product of one input."""

    def fn(layers: Any, xs: Any) -> Any:
        arrays, static = eqx.partition(layers, eqx.is_array)
        return lax.scan(lambda _, a: (None, jax.vmap(eqx.combine(a, static))(xs)), None, arrays)[1]

    make = _stacked(lambda key: eqx.nn.Linear(6, 6, use_bias=False, key=key))
    return _made(make, normal(4, 6), axes={"weight": STACK}, fn=fn)


@model
def convolutional() -> Model:
    """Strided, dilated, grouped and transposed, channels first, one example at a time."""

    def make(key: Any) -> Any:
        return eqx.nn.Sequential(
            [
                eqx.nn.Conv2d(3, 4, 3, stride=2, dilation=2, key=key),
                eqx.nn.GroupNorm(2, 4),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Conv2d(4, 6, 2, groups=2, padding="SAME", key=key),
                eqx.nn.ConvTranspose2d(6, 3, 2, stride=2, key=key),
            ]
        )

    axes = {f"layers/{i}/weight": dense((1, 2, 3), 0) for i in (0, 3, 4)}
    return _made(make, normal(2, 3, 8, 8), axes=axes)


@model
def stateful() -> Model:
    """BatchNorm's statistics go in and out as Equinox's state."""

    def make(key: Any) -> Any:
        return eqx.nn.Sequential([eqx.nn.Linear(5, 7, key=key), eqx.nn.BatchNorm(7, "batch", mode="batch")])

    def fn(module: Any, x: Any, state: Any) -> Any:
        return jax.vmap(module, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    module, state = filled(eqx.filter_eval_shape(eqx.nn.make_with_state(make), KEY))
    return Model(fn, module, (normal(4, 5), state), {"layers/0/weight": FLIPPED})


@model
def recurrent() -> Model:
    class Net(eqx.Module):
        gru: eqx.nn.GRUCell
        lstm: eqx.nn.LSTMCell

        def __init__(self, key: Any):
            self.gru = eqx.nn.GRUCell(5, 4, key=key)
            self.lstm = eqx.nn.LSTMCell(4, 3, key=key)

        def __call__(self, xs: Any) -> Any:
            def step(carry: Any, x: Any) -> Any:
                h, state = carry
                h = self.gru(x, h)
                state = self.lstm(h, state)
                return (h, state), state[0]

            return lax.scan(step, (jnp.zeros(4), (jnp.zeros(3), jnp.zeros(3))), xs)[1]

    axes = {f"{cell}/weight_{which}": FLIPPED for cell in ("gru", "lstm") for which in ("ih", "hh")}
    return _made(Net, normal(2, 3, 5), axes=axes)


@model
def weight_norm() -> Model:
    """`eqx.nn.WeightNorm`, whose norm is computed from the factors."""
    make = lambda key: eqx.nn.WeightNorm(eqx.nn.Linear(5, 4, key=key))  # noqa: E731
    return _made(make, normal(3, 5), axes={"layer/weight": FLIPPED})


@model
def shared() -> Model:
    """`eqx.nn.Shared`: one table, two layers."""

    class Net(eqx.Module):
        shared: eqx.nn.Shared

        def __init__(self, key: Any):
            embed, linear = eqx.nn.Embedding(9, 6, key=key), eqx.nn.Linear(6, 9, use_bias=False, key=key)
            self.shared = eqx.nn.Shared((embed, linear), lambda m: m[1].weight, lambda m: m[0].weight)

        def __call__(self, ids: Any) -> Any:
            embed, linear = self.shared()
            return jax.vmap(linear)(jax.nn.relu(jax.vmap(embed)(ids)))

    return _made(Net, jnp.array([[1, 2, 8]]), axes={}, tables={"shared/pytree/0/weight": dense()})
