"""Haiku functions under `hk.transform`; their parameters' names hold slashes of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from haiku.experimental import layer_stack

from ._model import Model, dense, filled, model, normal

STACK = dense(1, 2, batch=0)


def _made(net: Callable[..., Any], *args: Any, axes: Any, tables: Any = None) -> Model:
    pure = hk.without_apply_rng(hk.transform(net))
    params = filled(jax.eval_shape(pure.init, jax.random.key(0), *args))
    return Model(pure.apply, params, args, axes, tables or {})


@model
def mlp() -> Model:
    def net(x: Any) -> Any:
        return hk.LayerNorm(-1, True, True)(hk.nets.MLP([7, 3])(x))

    return _made(net, normal(4, 5), axes={"mlp/~/linear_0/w": dense(), "mlp/~/linear_1/w": dense()})


@model
def stateful() -> Model:
    """Batch statistics are state: given, and returned."""

    def net(x: Any) -> Any:
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(7)(x), is_training=True)
        return hk.Linear(3, name="out")(jax.nn.relu(x))

    pure = hk.without_apply_rng(hk.transform_with_state(net))
    x = normal(4, 5)
    params, state = filled(jax.eval_shape(pure.init, jax.random.key(0), x))
    return Model(pure.apply, params, (state, x), {"linear/w": dense(), "out/w": dense()})


@model
def transformer() -> Model:
    """Attention and an embedding that is tied to the logits."""

    def net(ids: Any) -> Any:
        embed = hk.Embed(9, 6)
        x = embed(ids)
        x = x + hk.MultiHeadAttention(2, 3, w_init=hk.initializers.RandomNormal(), model_size=6)(x, x, x)
        x = hk.Linear(6, with_bias=False, name="down")(jax.nn.relu(hk.Linear(8, name="up")(hk.RMSNorm(-1)(x))))
        return x @ embed.embeddings.T

    axes = {f"multi_head_attention/{name}/w": dense() for name in ("query", "key", "value", "linear")}
    axes |= {"up/w": dense(), "down/w": dense()}
    return _made(net, jnp.array([[1, 2, 8]]), axes=axes, tables={"embed/embeddings": dense()})


def _block(x: Any) -> Any:
    return x + jax.nn.relu(hk.Linear(6)(hk.LayerNorm(-1, True, True)(x)))


@model
def stacked() -> Model:
    def net(x: Any) -> Any:
        return layer_stack(3)(_block)(x)

    return _made(net, normal(4, 6), axes={"__layer_stack_no_per_layer/linear/w": STACK})


@model
def stacked_remat() -> Model:
    def net(x: Any) -> Any:
        return layer_stack(3, name="layers")(hk.remat(_block))(x)

    return _made(net, normal(4, 6), axes={"layers/linear/w": STACK})


@model
def keys_of_every_layer() -> Model:
    """A layer_stack that emits each layer's product of one input."""

    def net(x: Any) -> Any:
        stack = layer_stack(3, with_per_layer_inputs=True, name="layers")
        return stack(lambda x: (x, hk.Linear(6, with_bias=False)(x)))(x)[1]

    return _made(net, normal(4, 6), axes={"layers/linear/w": STACK})


@model
def convolutional() -> Model:
    """Both layouts: strided, grouped, depthwise and transposed."""

    def net(x: Any) -> Any:
        x = hk.Conv2D(4, 3, stride=2, name="nhwc")(x).transpose(0, 3, 1, 2)
        x = hk.Conv2D(4, 3, rate=2, feature_group_count=2, data_format="NCHW", name="nchw")(x)
        x = hk.DepthwiseConv2D(2, 3, data_format="NHWC", name="depthwise")(jax.nn.relu(x).transpose(0, 2, 3, 1))
        return hk.Conv2DTranspose(3, 2, stride=2, name="up")(hk.GroupNorm(2)(x))

    axes = {f"{name}/w": dense((0, 1, 2), 3) for name in ("nhwc", "nchw", "depthwise")}
    return _made(net, normal(2, 6, 6, 3), axes={**axes, "up/w": dense((0, 1, 3), 2)})


@model
def recurrent() -> Model:
    def net(x: Any) -> Any:
        core = hk.DeepRNN([hk.GRU(4), hk.LSTM(3)])
        return hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))[0]

    return _made(net, normal(3, 2, 5), axes={"gru/w_i": dense(), "gru/w_h": dense(), "lstm/linear/w": dense()})
