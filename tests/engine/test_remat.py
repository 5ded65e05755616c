"""`lora` and rematerialization: what the backward pass keeps, under JAX's checkpoint policies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

import jlora
from tests.toys import MLP, RANK, TOYS, adapters_for, assert_law, layer, named_mlp, normal

POLICIES = {
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "save_only_these_names": jax.checkpoint_policies.save_only_these_names("hidden"),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


def residuals(fn: Callable[..., Any], *args: Any) -> Counter[tuple[int, ...]]:
    """The shapes of what the backward pass of ``fn`` keeps, scalars aside."""
    _, pullback = jax.vjp(fn, *args)
    return Counter(x.shape for x in jax.tree.leaves(pullback) if x.size > 1)


def attention(params: Any, x: Any) -> Any:
    q, k = (jnp.einsum("ti,ihd->thd", x, params[name]) for name in ("q", "k"))
    scores = checkpoint_name(jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k)), "hidden")
    return jnp.sin(jnp.einsum("hts,shd,hdo->to", scores, k, params["o"]))


REMAT: dict[str, tuple[Any, Any, Any]] = {
    "mlp": (named_mlp, MLP.params, MLP.x),
    "tied": TOYS["tied"],
    "attention": (
        attention,
        {"q": normal(1, 8, 4, 5), "k": normal(2, 8, 4, 5), "o": normal(3, 4, 5, 8)},
        normal(4, 6, 8),
    ),
    "convolution": (
        lambda p, x: jnp.sin(
            lax.conv_general_dilated(x, p["k"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        ),
        {"k": normal(1, 5, 4, 7)},
        normal(2, 2, 6, 4),
    ),
    "ragged": (
        lambda p, x: jnp.sin(lax.ragged_dot(x, p["w"], jnp.array([4, 0, 5, 1]))),
        {"w": normal(1, 4, 8, 7)},
        normal(2, 10, 8),
    ),
}


@every_policy
@pytest.mark.parametrize("name", REMAT)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_remat_keeps_nothing_of_full_width(where: str, name: str, policy: Any) -> None:
    """Under every policy, the adapted model keeps what the bare one does, and rank-sized arrays: no full update."""
    fn, params, x = REMAT[name]
    adapters = adapters_for(fn, params, x)
    bare = jax.checkpoint(fn, policy=policy)
    apply = jlora.lora(bare if where == "inside" else fn, materialize="error")
    run = lambda a, x: apply(jlora.attach(params, a), x)  # noqa: E731
    adapted = jax.checkpoint(run, policy=policy) if where == "around" else run
    if jnp.issubdtype(x.dtype, jnp.floating):
        more = residuals(adapted, adapters, x) - residuals(bare, params, x)
    else:
        more = residuals(lambda a: adapted(a, x), adapters) - residuals(lambda p: bare(p, x), params)
    assert all(RANK in shape for shape in more), more


@every_policy
def test_remat_of_a_scanned_layer(policy: Any) -> None:
    """A scan of a rematerialized layer keeps its policy, and the merged model's gradient."""
    toy = TOYS["stacked"]
    adapters = adapters_for(*toy)

    def model(params: Any, x: Any) -> Any:
        return lax.scan(jax.checkpoint(layer, policy=policy), x, params)[0]

    assert_law(model, adapters, toy.params, toy.x)
    kept = residuals(lambda a, x: jlora.lora(model)(jlora.attach(toy.params, a), x), adapters, toy.x)
    more = kept - residuals(model, toy.params, toy.x)
    assert all(RANK in shape for shape in more), more
