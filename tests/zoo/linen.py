"""Flax Linen modules, with their functional ``init`` and ``apply``."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ._model import Model, dense, filled, model, normal

HEADS_IN, HEADS_OUT = dense(0, (1, 2)), dense((0, 1), 2)
STACK = dense(1, 2, batch=0)


def _made(module: Any, *args: Any, axes: Any, tables: Any = None, materialized: Any = None, fn: Any = None) -> Model:
    """``module.apply`` of the variables ``{"params": …}``; the paths given lie under ``params``."""
    variables = filled(jax.eval_shape(module.init, jax.random.key(0), *args))
    axes, tables, materialized = (
        {f"params/{p}": v for p, v in (t or {}).items()} for t in (axes, tables, materialized)
    )
    return Model(fn or module.apply, variables, args, axes, tables, materialized)


class Block(nn.Module):
    """A layer that `nn.scan` and `nn.remat` lift: carry in, carry out."""

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        return x + nn.relu(nn.Dense(6, name="dense")(nn.LayerNorm()(x))), None


class Transformer(nn.Module):
    """Attention, an MLP, norms, dropout; the embedding is tied to the logits."""

    @nn.compact
    def __call__(self, ids: Any) -> Any:
        embed = nn.Embed(9, 6, name="embed")
        x = embed(ids)
        h = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        h = nn.RMSNorm()(x + nn.Dropout(0.5, deterministic=True)(h))
        return embed.attend(nn.Dense(6, name="down")(nn.relu(nn.Dense(8, name="up")(h))))


@model
def mlp() -> Model:
    module = nn.Sequential([nn.Dense(7), nn.relu, nn.GroupNorm(num_groups=1), nn.Dense(3)])
    return _made(module, normal(4, 5), axes={"layers_0/kernel": dense(), "layers_3/kernel": dense()})


@model
def transformer() -> Model:
    heads = {f"attention/{name}/kernel": HEADS_IN for name in ("query", "key", "value")}
    rest = {f"{name}/kernel": dense() for name in ("up", "down")}
    axes = {**heads, "attention/out/kernel": HEADS_OUT, **rest}
    return _made(Transformer(), jnp.array([[1, 2, 8], [0, 1, 1]]), axes=axes, tables={"embed/embedding": dense()})


@model
def dense_general() -> Model:
    """Several inputs contracted, several outputs made, and a batch of matrices."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.DenseGeneral((2, 3), axis=(-2, -1), name="many")(x)
            x = nn.DenseGeneral(4, axis=-1, batch_dims=(0,), name="batched")(x)
            return nn.Einsum((4, 2, 5), "bhi,iho->bo", name="einsum")(x)

    axes = {
        "many/kernel": dense((0, 1), (2, 3)),
        "batched/kernel": STACK,
        "einsum/kernel": dense((0, 1), 2),
    }
    return _made(Net(), normal(3, 2, 5), axes=axes)


def _lifted(lift: Any, x: Any, axes: Any) -> Model:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(6, name="in")(x)
            return lift(name="blocks")(x)[0]

    return _made(Net(), x, axes={"in/kernel": dense(), "blocks/dense/kernel": axes})


def _scan(block: Any, axis: int = 0) -> Any:
    return nn.scan(block, variable_axes={"params": axis}, split_rngs={"params": True}, length=3)


@model
def scanned() -> Model:
    return _lifted(_scan(Block), normal(4, 5), STACK)


@model
def scanned_along_another_axis() -> Model:
    """The layers' axis lies in the middle of each kernel."""
    return _lifted(_scan(Block, axis=1), normal(4, 5), dense(0, 2, batch=1))


@model
def rematerialized() -> Model:
    return _lifted(nn.remat(Block), normal(4, 5), dense())


@model
def scan_of_remat() -> Model:
    return _lifted(_scan(nn.remat(Block, prevent_cse=False)), normal(4, 5), STACK)


@model
def vmapped() -> Model:
    """Experts by `nn.vmap`: each with its own rows."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
            return experts(4, name="experts")(x)

    return _made(Net(), normal(3, 2, 5), axes={"experts/kernel": STACK})


@model
def keys_of_every_layer() -> Model:
    """A scan that emits each layer's product of one input, as cross-attention precomputes its keys."""

    class Key(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return x, nn.Dense(x.shape[-1], use_bias=False, name="key")(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return _scan(Key)(name="layers")(x, None)[1]

    return _made(Net(), normal(4, 6), axes={"layers/key/kernel": STACK})


@model
def convolutional() -> Model:
    """Strided, grouped and transposed; batch statistics are returned with the result."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(4, (3, 3), strides=2, padding="CIRCULAR", name="strided")(x)
            x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            x = nn.GroupNorm(num_groups=2)(nn.Conv(6, (3, 3), feature_group_count=2, name="grouped")(x))
            return nn.ConvTranspose(3, (2, 2), strides=(2, 2), transpose_kernel=True, name="flipped")(x)

    module = Net()
    kernels = {f"{name}/kernel": dense((0, 1, 2), 3) for name in ("strided", "grouped")}
    apply = lambda variables, x: module.apply(variables, x, mutable=["batch_stats"])  # noqa: E731
    return _made(module, normal(2, 6, 6, 3), axes={**kernels, "flipped/kernel": dense((0, 1, 3), 2)}, fn=apply)


@model
def local_convolution() -> Model:
    """A kernel of its own at every place: the places are batch, the patch is the input."""
    return _made(nn.ConvLocal(4, (3,)), normal(2, 5, 3), axes={"kernel": dense(1, 2, batch=0)})


@model
def recurrent() -> Model:
    """A GRU one way, and the other way an LSTM whose cell joins its kernels into one."""
    module = nn.Bidirectional(nn.RNN(nn.GRUCell(4)), nn.RNN(nn.OptimizedLSTMCell(3)))
    gru = {f"forward_rnn/cell/{i}{gate}/kernel": dense() for i in "hi" for gate in "nrz"}
    lstm = {f"backward_rnn/cell/{i}{gate}/kernel": dense() for i in "hi" for gate in "figo"}
    return _made(module, normal(2, 3, 5), axes=gru | lstm)


@model
def partitioned() -> Model:
    """Parameters in `nn.Partitioned` boxes; the box does not change the path."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    module = nn.Sequential([nn.Dense(7, kernel_init=init), nn.relu, nn.Dense(3, kernel_init=init)])
    return _made(module, normal(4, 5), axes={"layers_0/kernel": dense(), "layers_2/kernel": dense()})


@model
def bfloat16_compute() -> Model:
    """float32 parameters, ``dtype=bfloat16``."""
    module = nn.Sequential([nn.Dense(7, dtype=jnp.bfloat16), nn.relu, nn.Dense(3, dtype=jnp.bfloat16)])
    return _made(module, normal(4, 5), axes={"layers_0/kernel": dense(), "layers_2/kernel": dense()})


@model
def weight_norm() -> Model:
    """`nn.WeightNorm`, whose norm is computed from the factors."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.WeightNorm(nn.Dense(4, name="dense"))(x)

    return _made(Net(), normal(3, 5), axes={"dense/kernel": dense()})
