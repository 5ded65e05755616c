"""Small models of plain functions, and the law that holds under every transform and on every mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import jlora

RANK = 3
"""No other size of these models, so that a shape says whether it has the rank in it."""


def normal(seed: int, *shape: int, scale: float = 0.5) -> jax.Array:
    """Normal numbers, the same for the same seed."""
    return jnp.asarray(np.random.default_rng(seed).normal(0, scale, shape), jnp.float32)


class Toy(NamedTuple):
    """A model, its parameters, and its input."""

    fn: Callable[..., Any]
    params: dict[str, jax.Array]
    x: jax.Array


def mlp(params: Any, x: Any) -> Any:
    """Two layers, ``[..., 8]`` to ``[..., 8]``; the weights are split over 8 devices in either direction."""
    return jnp.tanh(x @ params["w0"] + params["bias"]) @ params["w1"]


def named_mlp(params: Any, x: Any) -> Any:
    """`mlp` with a name for checkpoint policies on its hidden layer, and a bend at the end."""
    hidden = checkpoint_name(jnp.tanh(x @ params["w0"] + params["bias"]), "hidden")
    return jnp.sin(hidden @ params["w1"])


def tied(params: Any, ids: Any) -> Any:
    """An embedding that is the output projection too: ``[...]`` integers to ``[..., 11]``."""
    return jnp.tanh(params["table"][ids] + params["bias"]) @ params["table"].T


def layer(h: Any, w: Any) -> tuple[Any, None]:
    """One step of `stacked`."""
    return jnp.tanh(h @ w["up"]) @ w["down"], None


def stacked(params: Any, x: Any) -> Any:
    """Two layers under one scan, ``[..., 8]`` to ``[..., 8]``."""
    return lax.scan(layer, x, params)[0]


def experts(params: Any, x: Any) -> Any:
    """Four experts, each with its own rows: ``[..., 8]`` to ``[4, ..., 8]``."""
    h = jnp.tanh(jnp.einsum("...i,eio->e...o", x, params["up"]))
    return jnp.einsum("e...i,eio->e...o", h, params["down"])


TOYS = {
    "mlp": Toy(mlp, {"w0": normal(0, 8, 16), "bias": normal(1, 16), "w1": normal(2, 16, 8)}, normal(3, 16, 8)),
    "tied": Toy(tied, {"table": normal(4, 11, 8), "bias": normal(5, 8)}, jnp.arange(16) % 11),
    "stacked": Toy(stacked, {"up": normal(6, 2, 8, 16), "down": normal(7, 2, 16, 8)}, normal(8, 16, 8)),
    "experts": Toy(experts, {"up": normal(9, 4, 8, 16), "down": normal(10, 4, 16, 8)}, normal(11, 16, 8)),
}
MLP = TOYS["mlp"]


SPLIT = {"w0": P(None, "tensor"), "bias": P("tensor"), "w1": P("tensor", None)}
"""The weights of `mlp` over a mesh axis "tensor": the first split on its outputs, the second on its inputs."""
FULLY_SHARDED = {"w0": P("data", "tensor"), "bias": P("tensor"), "w1": P("tensor", "data")}
"""The weights of `mlp` over two mesh axes."""


def tensor_parallel(params: Any, x: Any) -> Any:
    """`mlp` on one device's shards of its `SPLIT` weights, inside shard_map."""
    return lax.psum(mlp(params, x), "tensor")


def adapters_for(fn: Callable[..., Any], params: Any, *args: Any, seed: int = 20, **config: Any) -> Any:
    """Random adapters for every weight that ``fn`` multiplies or looks up: every update is felt."""
    uses = jlora.trace(fn, params, *args)
    targets = tuple(f"^{path}$" for path, use in uses.items() if use.kind in ("matmul", "lookup"))
    chosen = jlora.LoraConfig(**{"rank": RANK, "alpha": 2 * RANK, "targets": targets} | config)
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), params, chosen, uses))
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten([normal(seed + i, *leaf.shape, scale=0.3) for i, leaf in enumerate(leaves)])


def identity_adapters(params: Any, **options: Any) -> dict[str, jlora.LoraFactors]:
    """Adapters of square weights whose update is the identity, so that their output is their own input."""

    def factors(w: jax.Array) -> jlora.LoraFactors:
        *batch, n, _ = w.shape
        eye = jnp.broadcast_to(jnp.eye(n), w.shape)
        axes = jlora.Axes(tuple(range(len(batch))), (len(batch),), (len(batch) + 1,))
        return jlora.LoraFactors(eye, eye, axes=axes, **options)

    return {path: factors(w) for path, w in params.items()}


def stack(adapters: Any, n: int) -> Any:
    """``n`` different adapters of one shape, stacked for `jax.vmap`."""
    return jax.tree.map(lambda x: jnp.stack([x * (0.5 + i / n) for i in range(n)]), adapters)


def unstack(stacked: Any, n: int) -> list[Any]:
    """The adapters of a `stack`, one by one."""
    return [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(n)]


def loss_of(results: Any) -> Any:
    """A scalar in which every entry counts differently."""
    floats = [x for x in jax.tree.leaves(results) if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
    return jnp.stack([jnp.mean(jnp.sin(3 * x.astype(jnp.float32))) for x in floats]).sum()


def adapted_loss(fn: Callable[..., Any], materialize: Any = "error") -> Callable[..., Any]:
    """``loss(adapters, params, *args)`` of the adapted model."""
    apply = jlora.lora(fn, materialize=materialize)
    return lambda adapters, params, *args: loss_of(apply(jlora.attach(params, adapters), *args))


def merged_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The same of the merged model: what every test compares with."""
    return lambda adapters, params, *args: loss_of(fn(jlora.merge(params, adapters), *args))


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Same structure, and the same numbers up to float32's rounding."""
    actual, expected = jax.block_until_ready((actual, expected))
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_law(fn: Callable[..., Any], adapters: Any, params: Any, *args: Any, jit: bool = True) -> None:
    """Adapted and merged, ``fn`` gives the same loss and the same gradient of the adapters, and stays factored."""

    def both(adapters: Any, params: Any, *args: Any) -> Any:
        return [jax.value_and_grad(loss(fn))(adapters, params, *args) for loss in (adapted_loss, merged_loss)]

    assert_close(*(jax.jit(both) if jit else both)(adapters, params, *args))
