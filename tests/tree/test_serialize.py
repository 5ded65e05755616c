"""Adapters and attached trees in `jax.export` and `flax.serialization`; and restored without a target."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import jlora
from tests.messages import expect, message
from tests.toys import MLP

CONFIG = jlora.LoraConfig(rank=3, alpha=1.7, dropout=0.1, targets=("w",), train_also=("bias",), use_dora=True)
FRESH: Any = jax.tree.map(lambda x: x + 0.1, jlora.init(jax.random.key(0), MLP.params, CONFIG))
APPLY = jlora.lora(MLP.fn)
NARROW = {p: jax.tree.map(lambda x: x.astype(jnp.bfloat16), v) for p, v in FRESH.items()}
TREES = {
    "adapters": FRESH,
    "plain LoRA in bfloat16": {"w0": dataclasses.replace(NARROW["w0"], magnitude=None)},
    "attached": jlora.attach(MLP.params, FRESH),
    "attached with a strength": jlora.attach(MLP.params, FRESH, strength=0.5),
    "state": optax.adam(0.1).init(FRESH),
    "state of freeze": jlora.freeze(optax.adam(0.1)).init(jlora.attach(MLP.params, FRESH)),
}


def assert_same(x: Any, y: Any) -> None:
    """Equal bit for bit, static fields included."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    chex.assert_trees_all_equal_dtypes(x, y)
    chex.assert_trees_all_equal(x, y)


def test_an_exported_function_takes_and_returns_adapters_and_attached_trees() -> None:
    """Through bytes: the same trees, static fields included, and the same numbers."""
    pytest.importorskip("flatbuffers", reason="jax.export writes bytes with it")
    key = jax.random.key(1)
    given = (FRESH, jlora.attach(MLP.params, FRESH, strength=0.5, dropout_key=key), MLP.x)

    @jax.jit
    def fn(adapters: Any, tree: Any, x: Any) -> Any:
        return APPLY(jlora.attach(MLP.params, adapters), x), APPLY(tree, x), adapters, tree

    exported = jax.export.export(fn)(*given)
    again = jax.export.deserialize(exported.serialize())
    assert again.in_tree == exported.in_tree == jax.tree.structure((given, {}))
    results = again.call(*given)
    assert jax.tree.structure(results[2:]) == jax.tree.structure(given[:2])
    for x, y in zip(results[:2], fn(*given)[:2], strict=True):
        np.testing.assert_array_equal(x, y)
    assert_same(results[2], FRESH)


@pytest.mark.parametrize("name", TREES)
def test_flax_keeps_trees_bit_for_bit(name: str) -> None:
    """from_bytes(target, to_bytes(t)) == t, and so for state dictionaries."""
    tree = TREES[name]
    target = jax.tree.map(jnp.zeros_like, tree)
    assert_same(serialization.from_bytes(target, serialization.to_bytes(tree)), tree)
    assert_same(serialization.from_state_dict(target, serialization.to_state_dict(tree)), tree)


def test_flax_compares_what_is_recorded() -> None:
    """Scale, axes, dropout, magnitude, shapes, whether there is a strength: each difference is named."""
    stored = serialization.to_bytes(FRESH)
    factors = FRESH["w0"]
    for other, facts in [
        (dataclasses.replace(factors, scale=2.0, dropout=0.0), ("scale is 0.5666", "expected 2.0", "dropout is 0.1")),
        (dataclasses.replace(factors, axes=factors.axes.flipped()), ("axes is {", "'inputs': {'0': 0}")),
        (dataclasses.replace(factors, magnitude=None), ("magnitude is an array of shape (16,), expected None",)),
        (dataclasses.replace(factors, a=factors.a[:, :2]), ("a is an array of shape (8, 3), expected", "(8, 2)")),
    ]:
        text = message(ValueError, lambda other=other: serialization.from_bytes({**FRESH, "w0": other}, stored))
        expect(text, "LoraFactors at './w0'", "jlora.init", *facts)
    strong = serialization.to_bytes(TREES["attached with a strength"])
    text = message(ValueError, lambda: serialization.from_bytes(TREES["attached"], strong))
    expect(text, "LoraWeight at './w0'", "strength is a scalar, expected None")
    text = message(ValueError, lambda: serialization.from_state_dict(FRESH, {**FRESH, "w0": jnp.ones(3)}))
    expect(text, "expected the fields ['a', 'axes', 'b', 'dropout', 'magnitude', 'scale']")


def by_orbax(adapters: Any, folder: Path) -> Any:
    """What orbax restores without a target."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "adapters", adapters)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "adapters")


def by_flax(adapters: Any, folder: Path) -> Any:
    """What flax restores without a target."""
    return serialization.msgpack_restore(serialization.to_bytes(adapters))


def takers(given: Any, folder: Path) -> list[Callable[[], Any]]:
    """Calls of all that takes adapters."""
    jlora.save(folder / "fresh", FRESH)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return [
        lambda: jlora.attach(MLP.params, given),
        lambda: jlora.merge(MLP.params, given),
        lambda: jlora.unmerge(MLP.params, given),
        lambda: jlora.rounding(MLP.params, given),
        lambda: jlora.save(folder / "saved", given),
        lambda: jlora.load(folder / "fresh", like=given),
        lambda: jlora.adapter_shardings(given, one),
        lambda: jlora.stack([FRESH, given]),
        lambda: jlora.unstack(given),
    ]


@pytest.mark.parametrize("restore", [by_orbax, by_flax])
def test_adapters_restored_without_a_target_are_refused(restore: Callable[..., Any], tmp_path: Path) -> None:
    """By all that takes adapters; and both ways out restore them bit for bit."""
    restored = restore(FRESH, tmp_path)
    for call in takers(restored, tmp_path):
        expect(message(TypeError, call), "2 of 3", "'w0': got a dict", "'w1'", "jlora.load", "with a target")
    for call in (jlora.labels, jlora.freeze(optax.sgd(0.1)).init):
        expect(message(ValueError, lambda call=call: call(restored)), "jlora.load", "with a target")


def test_adapters_of_nnx_variables_are_refused(tmp_path: Path) -> None:
    """As an nnx.Optimizer trains them; saved, they could not be loaded."""
    variables = jax.tree.map(nnx.Param, FRESH)
    for call in takers(variables, tmp_path):
        expect(message(TypeError, call), "3 of 3", "'w0': got a Param", "flax.nnx.as_pure(adapters)")
    assert not (tmp_path / "saved").exists()
    assert_same(nnx.as_pure(variables), FRESH)


def test_a_boxed_magnitude_is_refused(tmp_path: Path) -> None:
    f = jlora.LoraFactors(jnp.ones((4, 2)), jnp.ones((2, 3)), nnx.Param(jnp.ones(3)))  # type: ignore[arg-type]
    expect(message(TypeError, lambda: jlora.save(tmp_path / "saved", {"w": f})), "'w': got a Param")


def test_what_is_no_dict_of_adapters_is_refused(tmp_path: Path) -> None:
    for call in takers(list(FRESH.values()), tmp_path):
        expect(message(TypeError, call), "a list as the adapters", "jlora.init")


def test_the_ways_out_restore_adapters(tmp_path: Path) -> None:
    """jlora.load; or a target of shapes, with which orbax keeps the factors."""
    jlora.save(tmp_path / "saved", FRESH)
    assert_same(jlora.load(tmp_path / "saved"), FRESH)
    shapes = jax.eval_shape(lambda: jlora.init(jax.random.key(0), MLP.params, CONFIG))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "adapters", FRESH)
        checkpointer.wait_until_finished()
        assert_same(checkpointer.restore(tmp_path / "adapters", shapes), FRESH)
