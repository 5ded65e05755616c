"""Laws of `jlora.save` and `jlora.load`: what is read is what was written, bit for bit, or an error says why."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora.files.checksums import write_sums
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
    chex.assert_trees_all_equal(one, other)
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
    other = {**adapters, "a": dataclasses.replace(adapters["a"], b=jnp.ones((9, 9)))}
    with pytest.raises(ValueError, match=r"'a': b is float32\[.*\], expected float32\[9, 9\]"):
        jlora.load(tmp_path / "adapters", like=other)
    like = {**adapters, "a": dataclasses.replace(adapters["a"], a=jnp.zeros((8, 3), jnp.bfloat16))}
    with pytest.raises(ValueError, match=r"'a': a is float32\[8, 2\], expected bfloat16\[8, 3\]"):
        jlora.load(tmp_path / "adapters", like=like)


def test_a_folder_without_whole_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorError, match=r"holds no adapters: adapters\.json is missing"):
        jlora.load(tmp_path)
    jlora.save(tmp_path / "adapters", made())
    for file in (tmp_path / "adapters" / "arrays").rglob("*"):
        if file.is_file() and file.name in ("manifest.ocdbt", "_METADATA"):
            os.remove(file)
    with pytest.raises(
        TensorError, match=r"damaged(.|\n)*arrays/_METADATA is missing(.|\n)*arrays/manifest.ocdbt is mis"
    ):
        jlora.load(tmp_path / "adapters")
    write_sums(tmp_path / "adapters")
    with pytest.raises(TensorError, match="adapters/arrays: orbax cannot read the arrays"):
        jlora.load(tmp_path / "adapters")


def test_a_folder_that_holds_anything_else_is_left_alone(tmp_path: Path) -> None:
    """Foreign files are named, and nothing is written; a symbolic link stays one, and the folder is not private."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TensorError, match=r"holds other files:\n  - notes\.txt\n.*new folder"):
        jlora.save(tmp_path, made())
    with pytest.raises(TensorError, match="is a file"):
        jlora.save(tmp_path / "notes.txt", made())
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    jlora.save(tmp_path / "link", made())
    assert (tmp_path / "link").is_symlink()
    assert_equal(jlora.load(tmp_path / "real"), made())
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "real").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_failed_replacement_leaves_the_old_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jlora.save(tmp_path / "adapters", made())
    replace = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == "adapters" and not str(source).endswith("-old"):
            raise OSError("no space")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="no space"):
        jlora.save(tmp_path / "adapters", {"head/bias": made()["head/bias"]})
    assert_equal(jlora.load(tmp_path / "adapters"), made())
    assert [file.name for file in tmp_path.iterdir()] == ["adapters"]


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters.*jlora.init"):
        jlora.save(tmp_path / "new" / "adapters", {})
    empty = {"w": jlora.LoraFactors(jnp.ones((8, 0)), jnp.ones((0, 4))), "bias": jnp.ones(0)}
    with pytest.raises(ValueError, match=r"3 arrays are empty:\n.*'w' of shape \(8, 0\)(.|\n)*'bias'(.|\n)*rank"):
        jlora.save(tmp_path / "new" / "adapters", {**made(), **empty})
    assert not list(tmp_path.iterdir())


def test_what_is_not_adapters_is_not_stored(tmp_path: Path) -> None:
    params = {"w": jnp.ones((4, 6))}
    plan = jlora.plan(params, jlora.LoraConfig(rank=2, targets=("w",)))
    tree = jlora.attach(params, jlora.init(jax.random.key(0), params, plan))
    for wrong, hint in ((plan, "jlora.init"), (tree, "jlora.detach"), ([tree], "jlora.detach"), (None, "jlora.init")):
        with pytest.raises(TypeError, match=f"^save: (.|\n)*{hint}"):
            jlora.save(tmp_path / "adapters", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="^load, like: got a list"):
        jlora.load(tmp_path / "adapters", like=[tree])  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_paths_with_dots_do_not_collide(tmp_path: Path) -> None:
    adapters = {"a": made()["a"], "a.a": made()["head/bias"], "a.b": made()["head/bias"] + 1}
    jlora.save(tmp_path / "adapters", adapters)
    assert_equal(jlora.load(tmp_path / "adapters", like=adapters), adapters)


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda r: r.clear(), "there are no adapters"),
        (lambda r: r.update(a=3), "'a': got 3, expected an object"),
        (lambda r: r["a"].pop("scale"), r"'a': got \['a', 'axes', 'b', 'dropout', 'key'\], expected"),
        (lambda r: r["a"].pop("b"), "'a': got"),
        (lambda r: r["a"].update(scale="x"), "'a': scale is 'x', expected a number"),
        (lambda r: r["a"].update(axes={"batch": []}), "'a': axes is"),
        (lambda r: r["a"]["a"].update(dtype="int33"), "'a': got .*int33.*expected a shape and a dtype"),
        (lambda r: r["head/bias"].update(shape=[1.5]), "'head/bias': got"),
        (lambda r: r["head/bias"].update(key=0), "'head/bias': key is 0"),
        (lambda r: r["a"].update(key=r["a/b"]["key"]), "the same key"),
    ],
)
def test_damaged_records_are_named(damage: Any, part: str, tmp_path: Path) -> None:
    jlora.save(tmp_path / "adapters", made())
    file = tmp_path / "adapters" / "adapters.json"
    records = json.loads(file.read_text())
    damage(records)
    file.write_text(json.dumps(records))
    with pytest.raises(TensorError, match=r"damaged(.|\n)*adapters\.json differs(.|\n)*sha256sum"):
        jlora.load(tmp_path / "adapters")
    write_sums(tmp_path / "adapters")
    with pytest.raises(TensorError, match=rf"adapters\.json is damaged:\n.*{part}"):
        jlora.load(tmp_path / "adapters")


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    """The tool accepts them, and an edited file loads after its sum is updated as the error says."""
    jlora.save(tmp_path / "adapters", made())
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=tmp_path / "adapters", check=True)
    file = tmp_path / "adapters" / "adapters.json"
    file.write_text(file.read_text().replace('"scale": 0.5', '"scale": 0.25'))
    with pytest.raises(TensorError, match="adapters.json differs") as error:
        jlora.load(tmp_path / "adapters")
    command = str(error.value).split("`")[1]
    subprocess.run(command, shell=True, cwd=tmp_path / "adapters", check=True)
    restored = jlora.load(tmp_path / "adapters")["a"]
    assert isinstance(restored, jlora.LoraFactors) and restored.scale == 0.25
    for content in ("", "x", "0" * 64 + "  adapters.json\n", "0" * 64 + "  ../x\0\n"):
        (tmp_path / "adapters" / "SHA256SUMS").write_text(content)
        with pytest.raises(TensorError, match="is damaged"):
            jlora.load(tmp_path / "adapters")
    (tmp_path / "adapters" / "SHA256SUMS").unlink()
    with pytest.raises(TensorError, match="SHA256SUMS cannot be read.*No such file"):
        jlora.load(tmp_path / "adapters")
