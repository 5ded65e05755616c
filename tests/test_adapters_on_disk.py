"""Laws of `jlora.save` and `jlora.load`: what is read is what was written, bit for bit, or an error says why."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.models import TensorError


def made(dtype: Any = jnp.float32) -> dict[str, Any]:
    """Factors plain, stacked and with a magnitude, and a leaf trained whole; paths that are prefixes of each other."""
    key = jax.random.key(0)

    def draw(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, sum(shape)), shape, dtype)

    return {
        "a": jlora.LoraFactors(draw(8, 2), draw(2, 4), scale=0.5, dropout=0.1),
        "a/b": jlora.LoraFactors(draw(3, 8, 2), draw(3, 2, 4), axes=jlora.Axes((0,), (1,), (2,))),
        "params/ü x/kernel": jlora.LoraFactors(draw(8, 1), draw(1, 16), draw(16)),
        "head/bias": draw(16),
    }


def assert_equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(f"{x.dtype} != {y.dtype}"), one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_loaded_is_what_was_saved(dtype: str, tmp_path: Path) -> None:
    adapters = made(dtype)
    jlora.save(tmp_path / "new" / "adapters", adapters)
    found = jlora.load(tmp_path / "new" / "adapters", like=jax.eval_shape(lambda: adapters))
    assert_equal(found, adapters)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["adapters"]


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    jlora.save(tmp_path / "adapters", made())
    fewer = {"head/bias": made()["head/bias"] + 1}
    jlora.save(str(tmp_path / "adapters"), fewer)
    assert_equal(jlora.load(str(tmp_path / "adapters")), fewer)
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]


def test_shardings_may_change_on_the_way(tmp_path: Path) -> None:
    mesh = Mesh(np.array(jax.devices()), ("x",))
    over, everywhere = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    adapters = {"w": jlora.LoraFactors(*jax.device_put((jnp.ones((16, 2)), jnp.ones((8, 8))), over))}
    jlora.save(tmp_path / "adapters", adapters)
    for sharding in (over, everywhere):
        found = jlora.load(tmp_path / "adapters", shardings=sharding)
        assert_equal(found, adapters)
        assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(found))
    tree = jax.tree.map(lambda _: everywhere, adapters)
    assert_equal(jlora.load(tmp_path / "adapters", shardings=tree), adapters)


def test_every_difference_from_what_is_expected_is_named(tmp_path: Path) -> None:
    adapters = made()
    jlora.save(tmp_path / "adapters", adapters)
    like = dict(adapters)
    like["a"] = dataclasses.replace(like["a"], scale=2.0, dropout=0.0)
    like["new"] = like.pop("a/b")
    like["head/bias"] = jnp.zeros(3)
    with pytest.raises(ValueError, match="differ from the expected ones") as error:
        jlora.load(tmp_path / "adapters", like=like)
    for part in (
        "'new' is missing",
        "'a/b' is not expected",
        "'a': dropout is 0.1, expected 0.0",
        "'a': scale is 0.5, expected 2.0",
        "'head/bias': shape is [16], expected [3]",
    ):
        assert part in str(error.value)


def test_a_folder_without_whole_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=r"holds no adapters: adapters\.json is missing"):
        jlora.load(tmp_path)
    jlora.save(tmp_path / "adapters", made())
    for file in (tmp_path / "adapters" / "arrays").rglob("*"):
        if file.is_file() and file.name in ("manifest.ocdbt", "_METADATA"):
            os.remove(file)
    with pytest.raises(TensorError, match="the adapters are not whole"):
        jlora.load(tmp_path / "adapters")
