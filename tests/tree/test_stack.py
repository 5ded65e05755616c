"""`stack` and `unstack`: adapters that differ in rank and scale under one vmap, each with its own update."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jlora
from tests.messages import expect, message
from tests.toys import TOYS, assert_close, normal

TOY = TOYS["stacked"]
USES = jlora.trace(TOY.fn, TOY.params, TOY.x)


def filled(seed: int, rank: int, alpha: float, **options: Any) -> Any:
    """Random adapters of the toy."""
    config = jlora.LoraConfig(**{"rank": rank, "alpha": alpha} | options)
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), TOY.params, config, USES))
    leaves, treedef = jax.tree.flatten(shapes)
    made = [normal(seed + i, *x.shape, scale=0.3).astype(x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(made)


def same(x: Any, y: Any) -> bool:
    """Equal bit for bit, static fields included."""
    return jax.tree.structure(x) == jax.tree.structure(y) and all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (x, y)), strict=True)
    )


def factors(value: Any) -> jlora.LoraFactors:
    """``value``, which is factors."""
    assert isinstance(value, jlora.LoraFactors)
    return value


def run(adapters: Any) -> Any:
    """The adapted toy."""
    return jlora.lora(TOY.fn)(jlora.attach(TOY.params, adapters), TOY.x)


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.sampled_from((1, 2, 4)), st.sampled_from((1.0, 3.0, 4.0))), min_size=1, max_size=3),
    st.booleans(),
)
def test_each_of_a_stack_keeps_its_update(sizes: list[tuple[int, float]], dora: bool) -> None:
    """Under vmap over the stack each adapter gives what it gives alone; unstacked, each merges to the same weights."""
    xs = [filled(10 * i, rank, alpha, use_dora=dora) for i, (rank, alpha) in enumerate(sizes)]
    stacked = jlora.stack(xs)
    assert_close(jax.vmap(run)(stacked), jnp.stack([run(x) for x in xs]))
    for x, y in zip(xs, jlora.unstack(stacked), strict=True):
        assert_close(jlora.merge(TOY.params, y), jlora.merge(TOY.params, x))
        if len({(rank, alpha) for rank, alpha in sizes}) == 1:
            assert same(x, y)


def test_padding_alone_changes_no_bit_of_what_is_there() -> None:
    """Ranks differ and scales do not: the entries are those given, zeros follow, and the scale stays."""
    small, large = filled(0, 1, 2.0), filled(10, 3, 6.0)
    one = factors(jlora.stack([small, large])["up"])
    assert one.scale == 2.0 and one.a.shape == (2, 2, 8, 3)
    np.testing.assert_array_equal(one.a[0, ..., :1], small["up"].a)
    np.testing.assert_array_equal(one.b[0, :, :1], small["up"].b)
    assert not one.a[0, ..., 1:].any() and not one.b[0, :, 1:].any()


def test_a_path_that_some_lack_gets_zeros() -> None:
    """Exact for LoRA: the one that lacks a path acts as if it had none there, and its zeros stay zero in training."""
    whole, part = filled(0, 2, 2.0), {"up": filled(10, 1, 4.0)["up"]}
    stacked: Any = jlora.stack([whole, part])
    assert_close(jax.vmap(run)(stacked), jnp.stack([run(whole), run(part)]))
    grads = jax.grad(lambda s: jnp.sum(jnp.sin(jax.vmap(run)(s))))(stacked)
    assert grads["down"].a[0].any() and not grads["down"].a[1].any() and not grads["down"].b[1].any()
    assert not grads["up"].a[1, ..., 1:].any()


def test_narrow_factors_are_scaled_in_float32() -> None:
    """A scale that is folded is not rounded to bfloat16; dtypes that differ are promoted, strictly too."""
    narrow = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), filled(i, 2, alpha)) for i, alpha in enumerate((3.0, 5.0))]
    with jax.numpy_dtype_promotion("strict"):
        pairs = narrow, [narrow[0], narrow[0]], [narrow[0], filled(3, 2, 3.0)]
        folded, kept, mixed = (factors(jlora.stack(pair)["up"]) for pair in pairs)
    assert folded.b.dtype == jnp.float32 and folded.a.dtype == kept.b.dtype == jnp.bfloat16
    np.testing.assert_array_equal(folded.b[1], narrow[1]["up"].b.astype(jnp.float32) * 2.5)
    assert mixed.a.dtype == mixed.b.dtype == jnp.float32


def test_stack_is_pure_and_takes_whole_leaves() -> None:
    """The same under jit, and shapes under eval_shape; leaves trained whole are stacked as they are."""
    xs = [{**filled(i, i + 1, 2.0, targets=("up",)), "down": TOY.params["down"] + i} for i in range(2)]
    stacked, jitted = jlora.stack(xs), jax.jit(jlora.stack)(xs)
    assert_close(jitted, stacked)
    shapes = jax.eval_shape(jlora.stack, xs)
    assert jax.tree.structure(shapes) == jax.tree.structure(stacked)
    assert [x.shape for x in jax.tree.leaves(shapes)] == [x.shape for x in jax.tree.leaves(stacked)]
    whole: Any = stacked["down"]
    np.testing.assert_array_equal(whole[1], xs[1]["down"])
    assert all(same(x, y) for x, y in zip(xs[1:], jax.jit(jlora.unstack)(stacked)[1:], strict=True))


def test_what_changes_nothing_fills_what_zeros_cannot() -> None:
    """The advice of the error works: fresh adapters of the others' config, for DoRA and for leaves trained whole."""
    config = jlora.LoraConfig(rank=2, targets=("up",), train_also=("down",), use_dora=True)
    full = jlora.init(jax.random.key(0), TOY.params, config, USES)
    full = jax.tree.map(lambda x: x + 0.1, full)
    text = message(ValueError, lambda: jlora.stack([full, {}]))
    expect(text, "2 differences", "'down': adapters [1] lack it", "'up': adapters [1] lack it", "magnitude")
    expect(text, "{**jlora.init(key, params, plan), **adapters}")
    filling = {**jlora.init(jax.random.key(1), TOY.params, config, USES)}
    both = jax.vmap(run)(jlora.stack([full, filling]))
    assert_close(both[1], TOY.fn(TOY.params, TOY.x))


def test_scales_are_trained_as_strengths() -> None:
    """The other advice: one alpha, with a strength for each, trains like adapters with scales of their own."""
    start = filled(0, 2, 2.0)
    scales = (1.0, 3.0)
    own = [{p: dataclasses.replace(f, scale=s) for p, f in start.items()} for s in scales]

    def loss(adapters: Any, strength: Any = None) -> Any:
        return jnp.mean(
            jnp.square(jlora.lora(TOY.fn)(jlora.attach(TOY.params, adapters, strength=strength), TOY.x) - 1)
        )

    def moved(adapters: Any, grads: Any) -> Any:
        tx = optax.adam(0.1)
        return optax.apply_updates(adapters, tx.update(grads, tx.init(adapters), adapters)[0])

    stacked = jlora.stack([start, start])
    grads = jax.vmap(jax.grad(loss))(stacked, jnp.array(scales))
    for alone, one in zip(own, jlora.unstack(moved(stacked, grads)), strict=True):
        assert_close(jax.tree.leaves(one), jax.tree.leaves(moved(alone, jax.grad(loss)(alone))))


def test_what_cannot_be_stacked_is_named() -> None:
    """Every path at once: dropout rates, axes, kinds and shapes; no adapters; values that are not adapters."""
    one = filled(0, 2, 2.0)
    up, down = one["up"], one["down"]
    dropped = {"up": dataclasses.replace(up, dropout=0.5), "down": TOY.params["down"]}
    text = message(ValueError, lambda: jlora.stack([one, dropped]))
    expect(text, "'up': dropout rates [0.0, 0.5]", "'down': kinds ['LoRA', 'whole leaf']", "the same leaves whole")
    assert "lacks paths" not in text
    text = message(ValueError, lambda: jlora.stack([{"down": TOY.params["down"]}, {}]))
    expect(text, "adapters [1] lack it", "{**jlora.init(key, params, plan), **adapters}")
    assert "use_dora" not in text
    turned = {"up": dataclasses.replace(up, axes=up.axes.flipped()), "down": dataclasses.replace(down, a=down.a[:, :5])}
    text = message(ValueError, lambda: jlora.stack([one, turned]))
    expect(text, "'up': axes [((0,), (1,), (2,)), ((0,), (2,), (1,))]", "'down': shapes of the weight", "(2, 5, 8)")
    expect(message(ValueError, lambda: jlora.stack([])), "no adapters")
    restored: Any = {"up": {"a": up.a, "b": up.b}}
    expect(message(TypeError, lambda: jlora.stack([one, restored])), "adapters 1", "'up'")


def test_what_is_not_stacked_is_named() -> None:
    """unstack finds the values without the axis of the others."""
    one = filled(0, 2, 2.0)
    three = jlora.stack([one, one, one])
    expect(message(ValueError, lambda: jlora.unstack(one)), "'up': got no such axis", "'down'", "jlora.stack")
    text = message(ValueError, lambda: jlora.unstack({"two": jlora.stack([one, one])["up"], **three}))
    expect(text, "'two': got {2}, expected 3")
    with pytest.raises(ValueError, match="leading axis"):
        jlora.unstack({})
