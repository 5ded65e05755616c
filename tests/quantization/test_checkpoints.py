"""`models.load` of quantized checkpoints, and with ``quantize``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from safetensors.numpy import load_file, save_file

import jlora
from jlora import models
from jlora._src.quantized import DYNAMIC, NF4
from jlora.files.quantized_tensors import stored_weights
from jlora.files.safetensors import open_tensors
from tests.golden.make_quantized import CASES, FILE, dequantized
from tests.messages import expect, message

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 24,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 384,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "dtype": "bfloat16",
}
LINEAR = "proj.weight"


def nf4(name: str, weight: np.ndarray, double: bool = True) -> dict[str, np.ndarray]:
    """The tensors of a weight [outputs, inputs] as bitsandbytes names them; blocks of 32 entries, groups of 256."""
    blocks = weight.reshape(-1, 32)
    largest = np.abs(blocks).max(1)
    codes = np.abs(blocks[..., None] / largest[:, None, None] - np.asarray(NF4, np.float32)).argmin(-1).ravel()
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 32, "dtype": "float16", "shape": list(weight.shape)}
    found = {name: (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None]}
    found |= {f"{name}.quant_map": np.asarray(NF4, np.float32), f"{name}.absmax": largest}
    if double:
        offset = float(largest.mean())
        groups = np.asarray([np.abs(largest[i : i + 256] - offset).max() for i in range(0, largest.size, 256)])
        values = (largest - offset) / np.repeat(groups, 256)[: largest.size]
        coded = np.abs(values[:, None] - DYNAMIC).argmin(1).astype(np.uint8)
        found |= {f"{name}.absmax": coded, f"{name}.nested_absmax": groups, f"{name}.nested_quant_map": DYNAMIC}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    return {**found, f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8)}


def int8(name: str, weight: np.ndarray) -> dict[str, Any]:
    largest = np.abs(weight).max(1)
    codes = np.round(weight * (127 / largest[:, None])).astype(np.int8)
    module = name.removesuffix(".weight")
    return {name: codes, f"{module}.SCB": largest, f"{module}.weight_format": np.uint8(0)}


def fp8(name: str, weight: np.ndarray, scales: tuple[int, int], suffix: str = "weight_scale_inv") -> dict[str, Any]:
    """In blocks of 40 rows and 48 columns; one for each row; or one."""
    rows, columns = {(1, 1): weight.shape, (0, 1): (1, weight.shape[1])}.get(scales, scales)
    padded = np.pad(weight, [(0, -weight.shape[0] % rows), (0, -weight.shape[1] % columns)])
    blocks = padded.reshape(padded.shape[0] // rows, rows, -1, columns)
    scale = np.abs(blocks).max((1, 3)) / np.float32(448)
    whole = np.repeat(np.repeat(scale, rows, 0), columns, 1)[: weight.shape[0], : weight.shape[1]]
    codes = (weight / whole).astype(ml_dtypes.float8_e4m3fn)
    stored = scale.reshape(()) if scales == (1, 1) else scale
    return {name: codes, name.replace("weight", suffix): stored, name.replace("weight", "input_scale"): np.float32(1)}


BITSANDBYTES = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
FP8: dict[str, Any] = {"quant_method": "fp8"}
FORMATS: dict[str, tuple[dict[str, Any], Callable[..., dict[str, Any]], float]] = {
    "nf4": (BITSANDBYTES | {"load_in_4bit": True}, nf4, 0.16),
    "nf4, float32 scales": (BITSANDBYTES | {"load_in_4bit": True}, functools.partial(nf4, double=False), 0.16),
    "int8": (BITSANDBYTES | {"load_in_8bit": True}, int8, 0.5 / 127),
    "fp8, blocks": (FP8 | {"weight_block_size": [40, 48]}, functools.partial(fp8, scales=(40, 48)), 1 / 28),
    "fp8, a tensor": (FP8, functools.partial(fp8, scales=(1, 1)), 1 / 28),
    "fp8, rows": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        functools.partial(fp8, scales=(0, 1), suffix="weight_scale"),
        1 / 28,
    ),
}


def write(folder: Path, quantization: Any, quantized: Callable[..., dict[str, Any]]) -> tuple[Any, Any]:
    """A small network in float32, whose linear layers are quantized in ``folder``."""
    model = models.build(LLAMA)
    leaves, treedef = jlora.named_leaves(models.abstract(model))
    rng = np.random.default_rng(0)
    params = treedef.unflatten([jnp.asarray(rng.normal(size=x.shape) / 8, jnp.float32) for x in leaves.values()])
    models.save(folder, model, params)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **LLAMA, "quantization_config": quantization}))
    tensors: dict[str, Any] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        tensors |= quantized(name, weight) if name.endswith(LINEAR) else {name: weight}
    save(folder / "model.safetensors", tensors)
    return model, params


def save(file: Path, tensors: dict[str, Any]) -> None:
    """As `save_file`, which has no float8: the dtype is put into the header."""
    plain = {name: x.view(np.uint8) if x.dtype == ml_dtypes.float8_e4m3fn else x for name, x in tensors.items()}
    save_file({name: np.ascontiguousarray(x) if np.ndim(x) else np.asarray(x) for name, x in plain.items()}, file)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    for name, x in tensors.items():
        header[name]["dtype"] = "F8_E4M3" if x.dtype == ml_dtypes.float8_e4m3fn else header[name]["dtype"]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("case", FORMATS)
def test_a_quantized_checkpoint_gives_its_stored_values(case: str, tmp_path: Path) -> None:
    """Of all linear layers, in our order of axes; with the dtype that the checkpoint names."""
    quantization, quantized, tolerance = FORMATS[case]
    model, params = write(tmp_path, quantization, quantized)
    loaded = models.load(tmp_path)[1]
    leaves, before = jlora.named_leaves(loaded)[0], jlora.named_leaves(params)[0]
    found = {path for path, leaf in leaves.items() if isinstance(leaf, jlora.QuantizedArray)}
    assert found == {path for path in leaves if path.endswith("proj/kernel")} and len(found) == 7
    for path, leaf in leaves.items():
        if path in found:
            assert leaf.dtype == (jnp.float16 if case.startswith("nf4") else jnp.bfloat16)
            error = jnp.abs(leaf.astype(jnp.float32).dequantize() - before[path])
            assert jnp.max(error) <= tolerance * jnp.max(jnp.abs(before[path])) * 1.05, path
        else:
            np.testing.assert_array_equal(leaf, before[path])
    if case == "nf4":  # groups of whole rows stay coded; the others have float32 scales
        groups = {path.split("/")[-2] for path in found if leaves[path].groups is not None}
        assert groups == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    ids = jnp.arange(12).reshape(2, 6)
    logits = jlora.lora(model.apply)(loaded, ids)
    np.testing.assert_allclose(logits, model.apply(jlora.dequantize(loaded), ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_what_bitsandbytes_wrote_is_read_without_a_change(case: str, tmp_path: Path) -> None:
    golden = {name.removeprefix(f"{case}/"): x for name, x in load_file(FILE).items()}
    expected = dequantized(golden, CASES[case])
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": CASES[case]}
    tensors = {
        "w.weight": (golden["nf4"][::2] << 4 | golden["nf4"][1::2])[:, None],
        "w.weight.absmax": golden["nested"],
        "w.weight.quant_map": load_file(FILE)["nf4"],
        "w.weight.nested_absmax": golden["nested_absmax"],
        "w.weight.nested_quant_map": load_file(FILE)["dynamic"],
        "i.weight": golden["int8"],
        "i.SCB": golden["SCB"],
    }
    state |= {"nested_blocksize": 256, "nested_offset": float(golden["offset"][0])}
    tensors["w.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    save_file(tensors, tmp_path / "model.safetensors")
    found: Any = stored_weights(open_tensors(tmp_path / "model.safetensors"), BITSANDBYTES, "float32")
    assert set(found) == {"w.weight", "i.weight"}
    for name, scheme in (("w.weight", "nf4-double"), ("i.weight", "int8")):
        np.testing.assert_allclose(found[name].read(), expected[scheme], rtol=1e-6, atol=1e-6)
    assert found["w.weight"].read_parts().groups is not None


@pytest.mark.sampled(2)
@pytest.mark.parametrize("layout", ["one device", "mesh"])
@pytest.mark.parametrize("scheme", ["nf4", "int8", "int4-32"])
def test_load_quantizes_as_quantize_does(scheme: str, layout: str, tmp_path: Path) -> None:
    """Layer by layer, to the same leaves; on a mesh, each in its place."""
    model, params = write(tmp_path, None, lambda name, weight: {name: weight})
    places = None
    if layout == "mesh":
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        places = jlora.shardings(models.abstract(model), mesh, models.sharding_rules(model))
        params = jax.device_put(params, places)
    found = models.load(tmp_path, quantize=scheme, shardings=places)[1]
    expected = jlora.quantize(params, scheme, jlora.trace(model.apply, params, models.example_inputs(model)))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=1e-5)
        assert places is None or one.sharding.is_equivalent_to(other.sharding, one.ndim)


def test_what_cannot_be_read_is_listed(tmp_path: Path) -> None:
    quantization, quantized, _ = FORMATS["nf4"]

    def refused(damage: Callable[[dict[str, Any]], Any], quantization: Any = quantization) -> str:
        write(tmp_path, quantization, quantized)
        tensors: dict[str, Any] = load_file(tmp_path / "model.safetensors")
        damage(tensors)
        save(tmp_path / "model.safetensors", tensors)
        return message(Exception, lambda: models.load(tmp_path))

    name = "model.layers.1.mlp.up_proj.weight"
    expect(refused(lambda t: t.pop(f"{name}.absmax")), name, "absmax' is missing", "original checkpoint")
    expect(refused(lambda t: t.update({name: t[name][:-1]})), name, "expected 12288 entries of uint8")
    expect(refused(lambda t: t.update({f"{name}.quant_map": np.arange(16, dtype="f4")})), name, "NF4's values")
    state = f"{name}.quant_state.bitsandbytes__nf4"
    expect(refused(lambda t: t.update({state: np.frombuffer(b"{}", np.uint8)})), name, "not the state")
    expect(refused(lambda t: t.pop(state)), name, "no scales")
    text = refused(
        lambda t: [t.pop(n) for n in [*t] if n.startswith(name)] and t.update({name: np.ones((384, 64), "f4")})
    )
    expect(text, "layers/mlp/up_proj/kernel", "1 of 3 layers are not quantized", name)
    fp8_config, fp8_quantized, _ = FORMATS["fp8, a tensor"]
    write(tmp_path, fp8_config, fp8_quantized)
    text = message(models.ModelError, lambda: models.load(tmp_path, quantize="nf4"))
    expect(text, "quantized already ('fp8')", "quantize='nf4'")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    expect(message(models.TensorError, lambda: models.load(tmp_path)), "F8_E4M3", name)


def test_quantized_parameters_are_not_saved_silently(tmp_path: Path) -> None:
    write(tmp_path, *FORMATS["int8"][:2])
    model, params = models.load(tmp_path)
    text = message(models.ModelError, lambda: models.save(tmp_path / "new", model, params))
    expect(text, "up_proj/kernel", "is quantized", "jlora.dequantize")
    models.save(tmp_path / "new", model, jlora.dequantize(params))
    assert "quantization_config" not in json.loads((tmp_path / "new/config.json").read_text())
    models.load(tmp_path / "new")
