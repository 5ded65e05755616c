"""`models.load` and `models.save`: bit-exact round trips that read no more than needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jlora import models, named_leaves
from jlora.files.safetensors import Tensor
from tests.messages import expect, message
from tests.small_checkpoints import BERT, ROOT, change, network, same

# ---- there and back


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", [10**9, 3000])
def test_load_returns_what_save_was_given(dtype: str, shard: int, tmp_path: Path) -> None:
    """Bit for bit, in one file or in several with an index."""
    model, params = network(dtype)
    files = models.save(tmp_path, model, params, max_shard_bytes=shard)
    assert all(f.is_file() for f in files) and sorted(tmp_path.iterdir()) == sorted(files)
    again, loaded = models.load(tmp_path)
    assert same(loaded, params)
    assert type(again) is type(model)
    names = {f.name for f in files}
    if shard == 3000:
        assert "model.safetensors.index.json" in names and len(names) > 4
        sizes = [sum(x.nbytes for x in load_file(f).values()) for f in files if f.suffix == ".safetensors"]
        assert all(0 < size <= shard for size in sizes)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
    else:
        assert names == {"model.safetensors", "config.json"}


def test_float64_is_kept_under_x64_and_narrowed_without(tmp_path: Path) -> None:
    model, params = network()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)) / 3, params)
        models.save(tmp_path, model, wide)
        assert same(models.load(tmp_path)[1], wide)
    narrow = models.load(tmp_path)[1]
    assert same(narrow, jax.tree.map(lambda x: np.asarray(x).astype(np.float32), wide))


def test_the_same_parameters_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        models.save(tmp_path / name, *network())
    assert all(
        (tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes()
        for f in ("model.safetensors", "config.json")
    )


def test_saving_again_leaves_no_stale_file_and_an_error_midway_the_old_ones(tmp_path: Path) -> None:
    model, params = network()
    models.save(tmp_path, model, params, max_shard_bytes=3000)
    (tmp_path / "notes.txt").write_text("mine")
    models.save(tmp_path, model, params)
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "config.json", "notes.txt"}
    models.save(tmp_path, model, params, max_shard_bytes=9000)
    assert not (tmp_path / "model.safetensors").exists()
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}

    from jlora.models import _checkpoint

    calls = iter(range(8))
    leaves, _ = named_leaves(jax.tree.map(lambda x: x + 1, params))
    with pytest.raises(StopIteration):
        _checkpoint.write(tmp_path, model, leaves, lambda path: (next(calls), leaves[path])[1], 3000)
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_saving_what_is_not_the_networks_is_refused(tmp_path: Path) -> None:
    model, params = network()
    leaves, treedef = named_leaves(params)
    leaves |= {
        "params/classifier/bias": jnp.full(2, jnp.nan),
        "params/encoder/layer_1/query/kernel": jnp.full((16, 16), -jnp.inf, jnp.bfloat16),
        "params/encoder/layer_0/key/bias": jnp.zeros(3),
    }
    text = message(models.ModelError, lambda: models.save(tmp_path / "x", model, treedef.unflatten(leaves.values())))
    expect(
        text,
        "classifier/bias' holds NaN",
        "layer_1/query/kernel' holds NaN",
        "key/bias' has shape (3,), expected (16,)",
    )
    text = message(
        models.ModelError, lambda: models.save(tmp_path / "x", model, {"params": {"clasifier": jnp.ones(2)}})
    )
    expect(
        text,
        "'params/encoder/word_embeddings/embedding' is missing",
        "'params/clasifier' is not a parameter",
        "closest",
    )
    assert not (tmp_path / "x").exists()


# ---- options


@pytest.mark.parametrize("spread", ["none", "one", "tree", "callable"])
def test_shardings_place_the_right_values_and_read_no_more_than_needed(
    spread: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte is read once, even if several devices hold it, and a shard reads only its slice."""
    model, params = network()
    models.save(tmp_path, model, params)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rows, whole = NamedSharding(mesh, PartitionSpec(None, "model")), NamedSharding(mesh, PartitionSpec())

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return rows if len(shape) == 2 and shape[1] % 4 == 0 else whole

    shapes, treedef = named_leaves(models.abstract(model))
    expected = {
        path: None if spread == "none" else whole if spread == "one" else place(path, x.shape)
        for path, x in shapes.items()
    }
    tree = treedef.unflatten([expected[path] for path in shapes])
    shardings = {"none": None, "one": whole, "tree": tree, "callable": place}[spread]

    parts: list[tuple[str, int]] = []
    read = Tensor.read

    def counted(self: Tensor, index: Any = None) -> np.ndarray:
        array = read(self, index)
        parts.append((self.name, array.nbytes))
        return array

    monkeypatch.setattr(Tensor, "read", counted)
    loaded = models.load(tmp_path, shardings=shardings)[1]
    assert same(loaded, params)
    for path, leaf in named_leaves(loaded)[0].items():
        assert expected[path] is None or leaf.sharding == expected[path]
    assert sum(size for _, size in parts) == sum(x.nbytes for x in jax.tree.leaves(params))
    split = [size for name, size in parts if name == "bert.encoder.layer.0.attention.self.query.weight"]
    assert split == ([16 * 16 * 4 // 4] * 4 if spread in ("tree", "callable") else [16 * 16 * 4])


def test_loaded_parameters_can_be_donated(saved: Path) -> None:
    """Memory that JAX uses without a copy has no other owner."""
    expected = network()[1]
    whole = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec())
    double = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)
    for shardings in (None, whole):
        assert same(double(models.load(saved, shardings=shardings)[1]), jax.tree.map(lambda x: 2 * x, expected))
    assert same(models.load(saved)[1], expected)


def test_dtypes_of_parameters_and_of_the_computation(tmp_path: Path) -> None:
    models.save(tmp_path, *network("bfloat16"))
    model, params = models.load(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert jax.eval_shape(model.apply, params, models.example_inputs(model)).dtype == jnp.bfloat16
    wide = models.load(tmp_path, param_dtype="float32")[1]
    assert same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), params))
    models.save(tmp_path, *network())
    narrow = models.load(tmp_path, param_dtype=jnp.float16)[1]
    assert same(narrow, jax.tree.map(lambda x: x.astype(jnp.float16), network()[1]))


@pytest.mark.parametrize("param_dtype", ["float16", "bfloat16"])
def test_a_value_beyond_the_asked_dtype_is_named(param_dtype: str, saved: Path) -> None:
    change(saved, lambda t: {**t, "classifier.bias": np.full(2, 3.4e38, np.float32)})
    text = message(models.TensorError, lambda: models.load(saved, param_dtype=param_dtype))
    expect(text, "'classifier.bias' of dtype float32 exceeds the range of " + param_dtype, "param_dtype")


# ---- names


def test_names_with_and_without_the_prefix_and_of_old(saved: Path) -> None:
    """A network with a head reads a bare checkpoint and the reverse; LayerNorm.gamma and .beta are weight and bias."""
    params = network()[1]

    def old(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    change(saved, lambda t: {old(name.removeprefix("bert.")): x for name, x in t.items()})
    assert same(models.load(saved)[1], params)
    change(saved, lambda t: {f"bert.{name}": x for name, x in t.items() if not name.startswith("classifier")})
    bare = models.load(saved, task="features")[1]
    assert same(bare["params"], params["params"]["encoder"])


def test_buffers_and_other_heads_are_passed_over(saved: Path) -> None:
    change(
        saved, lambda t: {**t, "bert.embeddings.position_ids": np.arange(8)[None], "cls.predictions.bias": np.ones(3)}
    )
    assert same(models.load(saved)[1], network()[1])


# ---- a new head


def test_a_head_starts_from_the_key_alone(saved: Path) -> None:
    """Only the head is new, equal for equal keys, and drawn as the network draws it; the rest is the file's."""
    change(saved, lambda t: {name: x for name, x in t.items() if not name.startswith("classifier")})
    expect(message(models.ModelError, lambda: models.load(saved)), "2 tensor(s)", "classifier.weight", "pass key=")
    (model, first), (_, again), (_, other) = (models.load(saved, key=jax.random.key(s)) for s in (0, 0, 1))
    assert same(first, again)
    expected = network()[1]["params"]
    for params in (first, other):
        assert same(params["params"]["encoder"], expected["encoder"])
    kernel = first["params"]["classifier"]["kernel"]
    assert not np.array_equal(kernel, other["params"]["classifier"]["kernel"])
    drawn = jax.jit(model.init)(jax.random.key(0), models.example_inputs(model))["params"]
    np.testing.assert_allclose(kernel, drawn["classifier"]["kernel"], rtol=1e-6)


def test_nothing_but_the_head_is_drawn(saved: Path) -> None:
    """The compiled program draws one random array, of the head's shape."""
    from jlora.models import _checkpoint

    model = network()[0]
    compiled: list[str] = []
    jit = jax.jit

    def spied(fn: Any) -> Any:
        return lambda key: (compiled.append(jit(fn).lower(key).compile().as_text() or ""), jit(fn)(key))[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_checkpoint.jax, "jit", spied)
        _checkpoint._start(model, ["params/classifier/kernel"], jax.random.key(0), jnp.float32, lambda path: None)
    assert "[16,2]" in compiled[0] and "[24,16]" not in compiled[0] and "[16,32]" not in compiled[0]


def test_labels_are_written_into_the_config(saved: Path) -> None:
    """Other labels start a new head; their names reach config.json, and come back."""
    text = message(models.ModelError, lambda: models.load(saved, labels=3))
    expect(text, "'classifier.weight' has shape (2, 16), expected (3, 16); pass key=jax.random.key(0)")
    words = ["bad", "fair", "good"]
    model, params = models.load(saved, labels=words, key=jax.random.key(0))
    assert params["params"]["classifier"]["kernel"].shape == (16, 3)
    models.save(saved, model, params)
    hf = json.loads((saved / "config.json").read_text())
    assert hf["id2label"] == {"0": "bad", "1": "fair", "2": "good"} and hf["label2id"]["good"] == 2
    assert hf["architectures"] == ["BertForSequenceClassification"] and hf["dtype"] == "float32"
    assert same(models.load(saved)[1], params)
    named = models.load(saved, labels=words[::-1])  # as many: the head is kept
    assert same(named[1], params)
    for wrong in (0, [], ["a", "a"]):
        expect(message(models.ModelError, lambda w=wrong: models.load(saved, labels=w)), f"labels = {wrong!r}")


def test_a_config_tells_the_dtype_of_most_parameters(tmp_path: Path) -> None:
    """And it has no ``torch_dtype`` that contradicts it."""
    model = models.build({**BERT, "torch_dtype": "float16"})
    leaves, treedef = named_leaves(network()[1])
    mixed = [x.astype("float32" if path.endswith("bias") else "bfloat16") for path, x in leaves.items()]
    models.save(tmp_path, model, treedef.unflatten(mixed))
    hf = json.loads((tmp_path / "config.json").read_text())
    assert hf["dtype"] == "bfloat16" and "torch_dtype" not in hf


# ---- memory

MEASURE = """
import sys
from pathlib import Path
import jax
from jlora import models, named_leaves

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

large, small, quantize = *sys.argv[1:], *[None] * (4 - len(sys.argv))
models.load(small, key=jax.random.key(0), quantize=quantize)  # what is imported and compiled once
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
assert resident("VmHWM") < before + 2e7
model, params = models.load(large, key=jax.random.key(0), quantize=quantize)
jax.block_until_ready(params)
leaves = named_leaves(params)[0].values()
size = sum(x.nbytes for x in leaves)
if quantize and jax.__version_info__ < (0, 12):  # a CPU has a byte for each code of four bits
    size += sum(x.codes.nbytes // 2 for x in leaves if hasattr(x, "codes"))
print(resident("VmHWM") - before, size)
"""


def measured(*args: str) -> tuple[float, float]:
    """The additional peak memory of loading in a process of its own, and the size of the parameters, in bytes."""
    optimized = {**os.environ, "XLA_FLAGS": ""}  # conftest's flags leave out fusions: each operation has an array
    command = [sys.executable, "-c", MEASURE, *args]
    done = subprocess.run(command, check=True, capture_output=True, cwd=ROOT, text=True, env=optimized)
    peak, size = map(float, done.stdout.split())
    return peak, size


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_loading_needs_little_more_than_the_parameters(tmp_path: Path) -> None:
    """The host's peak memory is below 1.3 times the parameters, with one file or several, and with a new head."""
    large = {**BERT, "vocab_size": 60_000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    for name, hf, shard in (("small", BERT, 10**9), ("whole", large, 10**9), ("sharded", large, 50 * 10**6)):
        model = models.build(hf, task="features")
        leaves = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), models.abstract(model))
        models.save(tmp_path / name, model, leaves, max_shard_bytes=shard)
        (tmp_path / name / "config.json").write_text(json.dumps(hf))
    for name in ("whole", "sharded"):
        peak, size = measured(str(tmp_path / name), str(tmp_path / "small"))
        assert size > 150e6
        assert 0.9 < peak / size < 1.3, (name, peak / size)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_a_quantized_base_is_loaded_without_the_whole_model(tmp_path: Path) -> None:
    """The host's peak memory is below 1.3 times the quantized parameters and one file."""
    sizes = {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
    shard = 50 * 10**6
    for name, layers in (("small", 1), ("large", 12)):
        hf = {**sizes, "model_type": "llama", "num_hidden_layers": layers, "num_key_value_heads": 8}
        model = models.build(hf)
        leaves = jax.tree.map(lambda x: np.full(x.shape, 0.5, jnp.bfloat16), models.abstract(model))
        models.save(tmp_path / name, model, leaves, max_shard_bytes=shard)
    whole = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    peak, size = measured(str(tmp_path / "large"), str(tmp_path / "small"), "nf4")
    print(f"{peak / size:.2f} times {size / 1e6:.0f} MB, of {whole / 1e6:.0f} MB")
    assert 0.9 * size < peak < 1.3 * size + shard < whole, (peak / size, size, whole)
