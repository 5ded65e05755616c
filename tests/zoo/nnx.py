"""Flax NNX modules, through `nnx.split` and `nnx.merge`; what changes in them is returned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ._model import Model, dense, filled, model, normal

HEADS_IN, HEADS_OUT = dense(0, (1, 2)), dense((0, 1), 2)
STACK = dense(1, 2, batch=0)


def _made(make: Callable[[nnx.Rngs], Any], *args: Any, axes: Any, tables: Any = None) -> Model:
    """``fn(params, rest, *args)``: the module put together again, called, and its other state returned."""
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)

    def fn(params: Any, rest: Any, *args: Any) -> Any:
        module = nnx.merge(graph, params, rest, copy=True)
        y = module(*args)
        return y, nnx.state(module, nnx.Not(nnx.Param))

    return Model(fn, filled(params), (filled(rest), *args), axes, tables or {})


@model
def stateful() -> Model:
    """BatchNorm's statistics and Dropout's counter move on; both are returned."""

    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Sequential(
            nnx.Linear(5, 7, rngs=rngs),
            nnx.BatchNorm(7, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.5, rngs=rngs),
            nnx.Linear(7, 3, rngs=rngs),
        )

    return _made(make, normal(4, 5), axes={"layers/0/kernel": dense(), "layers/4/kernel": dense()})


class Transformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(9, 6, rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.gate = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
        self.down = nnx.LinearGeneral((8,), (6,), rngs=rngs)

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        x = x + self.attention(self.norm(x))
        return self.embed.attend(x + self.down(nnx.relu(self.gate(x))))


@model
def transformer() -> Model:
    axes = {f"attention/{name}/kernel": HEADS_IN for name in ("query", "key", "value")}
    axes |= {"attention/out/kernel": HEADS_OUT, "gate/kernel": dense(), "down/kernel": dense()}
    return _made(Transformer, jnp.array([[1, 2, 8]]), axes=axes, tables={"embed/embedding": dense()})


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.linear = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + nnx.relu(self.linear(self.norm(x)))


class Stack(nnx.Module):
    """Blocks made by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, remat: bool = False):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> Block:
            return Block(rngs)

        self.blocks = make(rngs)
        self.remat = remat

    def __call__(self, x: Any) -> Any:
        def step(x: Any, block: Block) -> Any:
            return block(x)

        step = nnx.remat(step) if self.remat else step
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


@model
def scanned() -> Model:
    return _made(Stack, normal(4, 6), axes={"blocks/linear/kernel": STACK})


@model
def scan_of_remat() -> Model:
    return _made(lambda rngs: Stack(rngs, remat=True), normal(4, 6), axes={"blocks/linear/kernel": STACK})


class Keys(nnx.Module):
    """Every layer's product of one input, by a scan that emits it."""

    def __init__(self, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(rngs: nnx.Rngs) -> nnx.Linear:
            return nnx.Linear(6, 6, use_bias=False, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x: Any) -> Any:
        return nnx.scan(lambda x, layer: layer(x), in_axes=(None, 0), out_axes=0)(x, self.layers)


@model
def keys_of_every_layer() -> Model:
    return _made(Keys, normal(4, 6), axes={"layers/kernel": STACK})


@model
def convolutional() -> Model:
    def make(rngs: nnx.Rngs) -> Any:
        return nnx.Sequential(
            nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs),
            nnx.GroupNorm(4, num_groups=2, rngs=rngs),
            nnx.ConvTranspose(4, 3, (2, 2), strides=2, rngs=rngs),
            nnx.Einsum("bhwc,co->bwo", (3, 4), rngs=rngs),
        )

    axes = {f"layers/{i}/kernel": dense((0, 1, 2), 3) for i in (0, 2)}
    return _made(make, normal(2, 6, 6, 3), axes={**axes, "layers/3/kernel": dense()})


@model
def recurrent() -> Model:
    """A GRU one way and an LSTM the other; both join the gates' kernels themselves."""

    def make(rngs: nnx.Rngs) -> Any:
        gru, lstm = nnx.GRUCell(5, 4, rngs=rngs), nnx.OptimizedLSTMCell(5, 3, rngs=rngs)
        return nnx.Bidirectional(nnx.RNN(gru, rngs=rngs), nnx.RNN(lstm, rngs=rngs), rngs=rngs)

    axes = {f"{c}_rnn/cell/dense_{i}/kernel": dense() for c in ("forward", "backward") for i in "hi"}
    return _made(make, normal(2, 3, 5), axes=axes)
