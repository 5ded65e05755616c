"""`AdapterPool`: many adapters through few slots, each as alone, and nothing compiles on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.messages import expect, message
from tests.toys import TOYS, assert_close

TOY = TOYS["stacked"]
SLOTS, RANK, ROWS = 16, 4, 16


def factors(seed: int, rank: int, dtype: Any = np.float32, magnitude: bool = False) -> dict[str, Any]:
    """Random factors of the toy, with a scale of their own."""
    rng = np.random.default_rng(seed)

    def one(w: Any) -> jlora.LoraFactors:
        layers, inputs, outputs = w.shape
        shapes = (layers, inputs, rank), (layers, rank, outputs), (layers, outputs)
        a, b, m = (np.asarray(rng.normal(0, 0.3, shape), dtype) for shape in shapes)
        axes = jlora.Axes((0,), (1,), (2,))
        given: Any = (a, b, np.abs(m) if magnitude else None)
        return jlora.LoraFactors(*given, scale=1 + seed % 3 / 2, axes=axes)

    return {path: one(w) for path, w in TOY.params.items()}


SOURCE = {f"user{i}": factors(i, 1 + i % RANK) for i in range(1000)}


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The compilations since the start of the test."""
    found: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if "backend_compile" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@jax.jit
def run(rows: Any, x: Any) -> Any:
    return jlora.lora(TOY.fn, materialize="error")(jlora.attach(TOY.params, rows), x)


def expected(names: list[Any]) -> np.ndarray:
    """Each row with its weights summed, in NumPy."""
    found = []
    for x, name in zip(np.asarray(TOY.x), names, strict=True):
        own = SOURCE.get(name, {})
        full = {
            path: np.asarray(w) + (own[path].scale * own[path].a @ own[path].b if own else 0)
            for path, w in TOY.params.items()
        }
        for up, down in zip(full["up"], full["down"], strict=True):
            x = np.tanh(x @ up) @ down
        found.append(x)
    return np.stack(found)


def test_a_thousand_adapters_pass_through_sixteen_slots(compilations: list[str]) -> None:
    """Each is used; every row is as alone; after the first batch nothing compiles."""
    pool = jlora.AdapterPool(SOURCE, like=SOURCE["user0"], slots=SLOTS, rank=RANK)
    order = np.random.default_rng(0).permutation(len(SOURCE))
    batches = [[f"user{i}" for i in order[k : k + ROWS - 1]] + [None] for k in range(0, len(order), ROWS - 1)]
    batches[-1] += [None] * (ROWS - len(batches[-1]))
    for k, names in enumerate(batches):
        found = run(pool.select(names), TOY.x)
        if k == 0:
            assert compilations
            compilations.clear()
        if k % 10 == 0 or k == len(batches) - 1:
            np.testing.assert_allclose(found, expected(names), rtol=1e-5, atol=1e-5)
    assert not compilations


def test_the_least_recently_used_leaves() -> None:
    """What a batch needs stays, in use order; a copy is read again only when it was dropped."""
    source = {name: SOURCE[f"user{i}"] for i, name in enumerate("abcd")}
    reads: list[str] = []

    class Counted(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            reads.append(name)
            return super().__getitem__(name)

    counted = Counted(source)
    pool = jlora.AdapterPool(counted, like=source["a"], slots=2, rank=RANK)
    for names, left in (("ab", "ab"), ("a", "ba"), ("c", "ac"), ("ca", "ca"), ("da", "ad"), ("bd", "db")):
        pool.select(list(names))
        assert pool.names == tuple(left), names
    assert "".join(reads) == "abcdb"
    counted["d"] = source["c"]
    stale = pool.select(["d"])["up"].value.a
    pool.drop("d")
    pool.drop("d")
    assert pool.names == ("b",)
    np.testing.assert_array_equal(stale[:, 0], _padded(SOURCE["user3"]["up"].a))
    np.testing.assert_array_equal(pool.select(["d"])["up"].value.a[:, 0], _padded(SOURCE["user2"]["up"].a))
    assert pool.names == ("b", "d")


def _padded(a: np.ndarray) -> np.ndarray:
    return np.pad(a, ((0, 0), (0, 0), (0, RANK - a.shape[-1])))


def test_slots_hold_dora_whole_leaves_and_what_lacks_a_path() -> None:
    """In groups too; narrow factors keep their update, as scales are folded in float32."""
    whole = {i: factors(i, 2, jnp.bfloat16, True) | {"down": TOY.params["down"] * i} for i in (1, 2)}
    part = {1: SOURCE["user1"], 2: {"up": SOURCE["user2"]["up"]}}
    apply = jlora.lora(TOY.fn)
    for source in (whole, part):
        pool = jlora.AdapterPool(source, like=jax.eval_shape(lambda s=source: s[1]), slots=2, rank=RANK)
        tree = jlora.attach(TOY.params, pool.select([1, 2, None, 1], group_size=2))
        singles = [jlora.attach(TOY.params, source[i]) if i else TOY.params for i in (1, 2, None, 1)]
        alone = [apply(one, TOY.x[i : i + 1])[0] for i, one in enumerate(singles)]
        assert_close(apply(tree, TOY.x[:4]), jnp.stack(alone))


def test_what_a_pool_does_not_take() -> None:
    """Everything at once, and the pool is as before."""
    one = SOURCE["user1"]
    up = one["up"]
    odd = {
        "large": factors(0, RANK + 1),
        "other": {"up": up, "left": up},
        "turned": {"up": dataclasses.replace(up, axes=up.axes.flipped()), "down": factors(0, 1, np.float64)["down"]},
        "dropped": {"up": dataclasses.replace(up, dropout=0.5)},
        "fine": one,
        "better": one,
    }
    pool = jlora.AdapterPool(odd, like=one, slots=2, rank=RANK)
    pool.select(["fine"])
    for name, parts in {
        "large": ("'up': rank 5, expected at most 4", "'down': rank 5"),
        "other": ("'left' is no path of the slots",),
        "turned": ("'up': axes", "'down': dtype float64, which float32 cannot hold"),
        "dropped": ("'up': dropout rates [0.0, 0.5]",),
    }.items():
        text = message(ValueError, lambda name=name: pool.select(["better", name]))
        expect(text, f"the adapters {name!r} do not fit", *parts, "a pool of their own")
        assert pool.names == ("fine",)
    text = message(ValueError, lambda: pool.select(["fine", "better", "large"]))
    expect(text, "3 different adapters for 2 slots", "divide the batch")
    expect(message(KeyError, lambda: pool.select(["fin", None])), "'fin' (closest: 'fine'")
    expect(message(ValueError, lambda: jlora.AdapterPool(odd, like=one, slots=0, rank=1)), "slots = 0")
    dora = jlora.AdapterPool({"a": {}}, like=factors(0, 1, magnitude=True), slots=1, rank=1)
    expect(message(ValueError, lambda: dora.select(["a"])), "'up' is missing", "'down' is missing")
