"""Plain functions of a dictionary of weights."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._model import Model, dense, model, normal, weights

STACK = dense(1, 2, batch=0)
LAYERS = {"w": (3, 6, 6), "b": (3, 6)}


@model
def mlp() -> Model:
    def fn(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]

    p = weights(**{"in": (5, 7), "bias": (7,), "out": (7, 3)})
    return Model(fn, p, (normal(4, 5),), {"in": dense(), "out": dense()})


@model
def einsum_both_ways() -> Model:
    """Input axes first and last, the weight as the left and as the right operand."""

    def fn(p: Any, x: Any) -> Any:
        h = jnp.einsum("bti,io->bto", x, p["io"])
        h = jnp.einsum("oi,bti->bto", p["oi"], h)
        return (p["left"] @ h.reshape(-1, 6).T).T

    p = weights(io=(5, 7), oi=(6, 7), left=(4, 6))
    return Model(fn, p, (normal(2, 3, 5),), {"io": dense(), "oi": dense(1, 0), "left": dense(1, 0)})


@model
def attention_heads() -> Model:
    """Kernels with a head axis, in the orders in which people write them."""

    def fn(p: Any, x: Any) -> Any:
        q = jnp.einsum("btd,dhk->bhtk", x, p["q"])
        k = jnp.einsum("hdk,btd->bhtk", p["k"], x)
        v = jnp.einsum("btd,hkd->bhtk", x, p["v"])
        scores = jax.nn.softmax(jnp.einsum("bhtk,bhsk->bhts", q, k))
        return jnp.einsum("bhts,bhsk,hkd->btd", scores, v, p["o"])

    axes = {"q": dense(0, (1, 2)), "k": dense(1, (0, 2)), "v": dense(2, (0, 1)), "o": dense((0, 1), 2)}
    return Model(fn, weights(q=(6, 2, 3), k=(2, 6, 3), v=(2, 3, 6), o=(2, 3, 6)), (normal(2, 4, 6),), axes)


@model
def tied_embedding() -> Model:
    """A table that is looked up, and then, transposed, the output projection."""

    def fn(p: Any, ids: Any) -> Any:
        return jax.nn.relu(p["table"][ids] @ p["w"]) @ p["table"].T

    p = weights(table=(9, 5), w=(5, 5))
    return Model(fn, p, (jnp.array([[1, 2, 8], [0, 1, 1]]),), {"w": dense()}, tables={"table": dense()})


@model
def tied_one_hot() -> Model:
    """The same with the lookup as a matmul."""

    def fn(p: Any, ids: Any) -> Any:
        return jax.nn.relu(jax.nn.one_hot(ids, 9) @ p["table"]) @ p["table"].T

    return Model(fn, weights(table=(9, 5)), (jnp.array([1, 2, 8]),), {"table": dense()})


@model
def split_and_joined() -> Model:
    """One weight split for three products, and three joined for one."""

    def fn(p: Any, x: Any) -> Any:
        q, k, v = jnp.split(p["qkv"], 3, axis=1)
        h = x @ q + jax.nn.relu(x @ k) * (x @ v)
        return h @ jnp.concatenate([p["up"], p["gate"]], axis=1)

    axes = {"qkv": dense(), "up": dense(), "gate": dense()}
    return Model(fn, weights(qkv=(5, 12), up=(4, 3), gate=(4, 6)), (normal(3, 5),), axes)


@model
def cut_and_turned() -> Model:
    """Weights that are reshaped, sliced, reversed and rolled before they are used."""

    def fn(p: Any, x: Any) -> Any:
        h = jnp.einsum("bi,ihk->bhk", x, p["w"].reshape(5, 2, 3)).reshape(-1, 6)
        h = jax.nn.relu(h @ p["v"].transpose(1, 0, 2).reshape(6, 6))
        return h[:, :4] @ p["u"][1:5, ::-1] + h @ jnp.roll(p["u"], 2, axis=1)

    axes = {"w": dense(), "v": dense(1, (0, 2)), "u": dense()}
    return Model(fn, weights(w=(5, 6), v=(2, 6, 3), u=(6, 5)), (normal(4, 5),), axes)


@model
def gradient_inside() -> Model:
    """Forces: the model itself differentiates an energy by its input."""

    def fn(p: Any, x: Any) -> Any:
        return jax.grad(lambda x: jnp.sum(jnp.tanh(x @ p["in"]) @ p["out"]))(x)

    return Model(fn, weights(**{"in": (5, 7), "out": (7, 3)}), (normal(4, 5),), {"in": dense(), "out": dense()})


@model
def bfloat16_compute() -> Model:
    """float32 weights, cast where they are used."""

    def fn(p: Any, x: Any) -> Any:
        w = {name: leaf.astype(jnp.bfloat16) for name, leaf in p.items()}
        return jax.nn.relu(x.astype(jnp.bfloat16) @ w["in"]) @ w["out"]

    return Model(fn, weights(**{"in": (5, 7), "out": (7, 3)}), (normal(4, 5),), {"in": dense(), "out": dense()})


@model
def experts_einsum() -> Model:
    """Experts with their own rows each, a gated MLP."""

    def fn(p: Any, x: Any) -> Any:
        h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", x, p["gate"])) * jnp.einsum("ecd,efd->ecf", x, p["up"])
        return jnp.einsum("efd,ecf->ecd", p["down"], h)

    axes = {"gate": STACK, "up": dense(2, 1, batch=0), "down": STACK}
    return Model(fn, weights(gate=(3, 5, 4), up=(3, 4, 5), down=(3, 4, 5)), (normal(3, 2, 5),), axes)


@model
def experts_ragged() -> Model:
    """Experts with as many rows each as the router gave them."""

    def fn(p: Any, x: Any, sizes: Any) -> Any:
        h = jax.nn.relu(lax.ragged_dot(x, p["gate"], sizes)) * lax.ragged_dot(x, p["up"], sizes)
        return lax.ragged_dot(h, p["down"], sizes)

    p = weights(gate=(3, 5, 4), up=(3, 5, 4), down=(3, 4, 5))
    return Model(fn, p, (normal(7, 5), jnp.array([2, 0, 5])), {"gate": STACK, "up": STACK, "down": STACK})


@model
def experts_picked() -> Model:
    """Every token picks the matrix of its expert."""

    def fn(p: Any, x: Any, ids: Any) -> Any:
        return jnp.einsum("nd,ndf->nf", x, p["w"][ids])

    return Model(fn, weights(w=(3, 5, 4)), (normal(4, 5), jnp.array([2, 0, 2, 1])), {"w": STACK})


@model
def ensemble() -> Model:
    """Members under vmap over stacked weights. Where all share one input, they are one wider matrix."""

    def fn(p: Any, x: Any) -> Any:
        h = jax.vmap(lambda w: jax.nn.relu(x @ w))(p["in"])
        return jax.vmap(lambda h, w: h @ w)(h, p["out"])

    p = weights(**{"in": (3, 5, 4), "out": (3, 4, 2)})
    return Model(fn, p, (normal(4, 5),), {"in": dense(1, (0, 2)), "out": STACK})


def _layer(w: Any, b: Any, h: Any) -> Any:
    return h + jax.nn.relu(h @ w + b)


@model
def scanned() -> Model:
    def fn(p: Any, x: Any) -> Any:
        return lax.scan(lambda h, layer: (_layer(layer["w"], layer["b"], h), None), x, p)[0]

    return Model(fn, weights(**LAYERS), (normal(4, 6),), {"w": STACK})


@model
def scanned_twice() -> Model:
    """A scan that hands its slices on, transposed, and another one that runs them backwards."""

    def fn(p: Any, x: Any) -> Any:
        x, layers = lax.scan(lambda h, w: (jax.nn.relu(h @ w), w.T), x, p["w"])
        return lax.scan(lambda h, w: (jax.nn.relu(h @ w), None), x, layers, reverse=True)[0]

    return Model(fn, weights(w=(3, 6, 6)), (normal(4, 6),), {"w": STACK})


@model
def indexed_in_a_loop() -> Model:
    """``W[i]`` in a `fori_loop` of static length, which has a reverse mode."""

    def fn(p: Any, x: Any) -> Any:
        return lax.fori_loop(0, 3, lambda i, h: _layer(p["w"][i], p["b"][i], h), x)

    return Model(fn, weights(**LAYERS), (normal(4, 6),), {"w": STACK})


@model
def unrolled() -> Model:
    def fn(p: Any, x: Any) -> Any:
        for i in range(3):
            x = _layer(p["w"][i], p["b"][i], x)
        return x

    return Model(fn, weights(**LAYERS), (normal(4, 6),), {"w": STACK})


@model
def rematerialized() -> Model:
    """`jax.checkpoint`, plain and with a policy."""

    def fn(p: Any, x: Any) -> Any:
        layer, policy = (lambda w, h: jax.nn.relu(h @ w)), jax.checkpoint_policies.dots_saveable
        return jax.checkpoint(layer, policy=policy)(p["out"], jax.checkpoint(layer)(p["in"], x))

    return Model(fn, weights(**{"in": (5, 7), "out": (7, 3)}), (normal(4, 5),), {"in": dense(), "out": dense()})


@model
def conditional() -> Model:
    """Branches that use different weights, and one that both use."""

    def fn(p: Any, x: Any) -> Any:
        yes, no = (lambda q, h: h @ q["yes"] @ q["both"]), (lambda q, h: jax.nn.relu(h @ q["no"]) @ q["both"])
        return lax.cond(x[0, 0] > 0, yes, no, p, x) + lax.cond(x[0, 0] > 0, no, yes, p, x)

    axes = {"yes": dense(), "no": dense(), "both": dense()}
    return Model(fn, weights(yes=(5, 7), no=(5, 7), both=(7, 3)), (normal(4, 5),), axes)


@model
def switched() -> Model:
    """A weight chosen by a `switch`'s branch."""

    def fn(p: Any, x: Any, i: Any) -> Any:
        branches = [lambda h, w=p[name]: jax.nn.relu(h @ w) for name in ("a", "b", "c")]
        return sum(lax.switch((i + k) % 3, branches, x) * (k + 1) for k in range(3))

    axes = {"a": dense(), "b": dense(), "c": dense()}
    return Model(fn, weights(a=(5, 3), b=(5, 3), c=(5, 3)), (normal(4, 5), jnp.array(2)), axes)


@model
def iterated() -> Model:
    """A fixed point by `while_loop`: forward only."""

    def fn(p: Any, x: Any, n: Any) -> Any:
        step = lambda state: (state[0] + 1, jax.nn.relu(state[1] @ p["w"] + x))  # noqa: E731
        return lax.while_loop(lambda state: state[0] < n, step, (0, jnp.zeros_like(x)))[1]

    return Model(fn, weights(w=(5, 5)), (normal(4, 5), jnp.array(3)), {"w": dense()}, differentiable=False)


@jax.custom_jvp
def _matmul_jvp(x: Any, w: Any) -> Any:
    return x @ w


@_matmul_jvp.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (x, w), (dx, dw) = primals, tangents
    return x @ w, 2 * (dx @ w + x @ dw)


@jax.custom_vjp
def _matmul_vjp(x: Any, w: Any) -> Any:
    return x @ w


_matmul_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (2 * g @ saved[1].T, 2 * saved[0].T @ g))


def _custom(matmul: Any) -> Model:
    """A matmul whose own rule doubles its gradient, so that a lost rule shows."""

    def fn(p: Any, x: Any) -> Any:
        return matmul(jax.nn.relu(x @ p["in"]), p["out"])

    p, axes = weights(**{"in": (5, 7), "out": (7, 3)}), {"in": dense(), "out": dense()}
    return Model(fn, p, (normal(4, 5),), axes, materialized={"out": "its own derivative rule"})


@model
def custom_jvp() -> Model:
    return _custom(_matmul_jvp)


@model
def custom_vjp() -> Model:
    return _custom(_matmul_vjp)


@model
def gains() -> Model:
    """Scalars, and gains along the outputs or the inputs of a weight."""

    def fn(p: Any, x: Any) -> Any:
        return jax.nn.relu(x @ (0.5 * p["w"] * p["per_output"])) @ (p["v"] * p["per_input"][:, None] / 2)

    p = weights(w=(5, 7), per_output=(7,), v=(7, 3), per_input=(7,))
    return Model(fn, p, (normal(4, 5),), {"w": dense(), "v": dense()})


@model
def weight_norm() -> Model:
    """Weight normalization: the norm is that of the whole weight, and is computed from the factors."""

    def fn(p: Any, x: Any) -> Any:
        return x @ (p["gain"] * p["w"] * lax.rsqrt(jnp.sum(p["w"] ** 2, 0)))

    p = weights(w=(5, 7), gain=(7,))
    return Model(fn, p, (normal(4, 5),), {"w": dense()})


@model
def masked() -> Model:
    """An autoregressive layer: its mask follows inputs and outputs at once, which no product of factors does."""

    def fn(p: Any, x: Any) -> Any:
        return x @ jnp.tril(p["w"]) @ (p["v"] * jnp.tri(5, 7))

    why = {"w": "condition does not follow", "v": "inputs and outputs at once"}
    return Model(fn, weights(w=(5, 5), v=(5, 7)), (normal(4, 5),), {"w": dense(), "v": dense()}, materialized=why)


@model
def chosen() -> Model:
    """A weight that a `cond` returns."""

    def fn(p: Any, x: Any) -> Any:
        w = lambda x: lax.cond(x[0, 0] > 0, lambda: p["a"], lambda: p["b"])  # noqa: E731
        return x @ w(x) + x @ w(-x)

    axes, why = {"a": dense(), "b": dense()}, dict.fromkeys("ab", "leaves control flow")
    return Model(fn, weights(a=(5, 3), b=(5, 3)), (normal(4, 5),), axes, materialized=why)
