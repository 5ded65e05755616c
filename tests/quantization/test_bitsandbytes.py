"""NF4 and int8 equal bitsandbytes': against golden files, and live where bitsandbytes is installed."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from jlora._src.quantized import DYNAMIC, NF4
from tests.golden.make_quantized import CASES, FILE, computed, dequantized, tables

SCHEMES = {"nf4": jlora.Scheme("nf4", double=False), "nf4-double": jlora.Scheme("nf4"), "int8": jlora.Scheme("int8")}


def assert_equal(weight: np.ndarray, found: dict[str, np.ndarray], same_groups: bool = True) -> None:
    """Our dequantized weights equal these within 1e-6 of the largest magnitude of each row, or, with coded
    scales, of the weight.

    To code a scale, the CPU kernel of bitsandbytes takes the second nearest value where two are about as near (its GPU
    kernel does not): its blocks with another code are left out, at most one in a hundred.
    """
    largest = np.abs(weight).max(1, keepdims=True).astype(np.float32)
    expected = dequantized(found, weight.shape)
    for name, scheme in SCHEMES.items():
        array = jlora.quantize_array(jnp.asarray(weight.T, jnp.float32), scheme)
        # The rounding of a coded scale is relative to the largest one of its group.
        limit = largest.max() if name == "nf4-double" else largest
        close = np.abs(array.dequantize().T - expected[name]) <= 1e-6 * limit
        if name == "nf4-double":
            if not same_groups:
                errors = [np.linalg.norm(x - weight) for x in (array.dequantize().T, expected[name])]
                assert errors[0] <= 1.001 * errors[1]
                continue
            apart = np.asarray(array.scales, int).T.ravel() - found["nested"]
            assert np.abs(apart).max(initial=0) <= 1 and np.count_nonzero(apart) <= apart.size / 100
            np.testing.assert_allclose(np.asarray(array.offset), found["offset"][None], rtol=1e-6)
            close |= np.repeat(apart != 0, 64).reshape(weight.shape)
        assert close.all(), name


def test_the_tables_are_those_of_bitsandbytes() -> None:
    golden = load_file(FILE)
    np.testing.assert_allclose(NF4, golden["nf4"], rtol=0, atol=1e-7)
    np.testing.assert_allclose(DYNAMIC, golden["dynamic"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_bitsandbytes(case: str) -> None:
    golden = {name.removeprefix(f"{case}/"): value for name, value in load_file(FILE).items()}
    assert_equal(golden["weight"].astype(np.float32), golden)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(64, 64), (512, 128), (128, 1024), (16, 4096), (8, 16384), (256, 576)], ids=str)
def test_live_weights_equal_those_of_bitsandbytes(shape: tuple[int, int]) -> None:
    """Groups of bitsandbytes follow each other in memory; ours do too, where the blocks of a row divide 256."""
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    weight = np.random.default_rng(shape[1]).normal(size=shape).astype(np.float32)
    assert_equal(weight, computed(weight), same_groups=256 % (shape[1] // 64) == 0)


@pytest.mark.filterwarnings("ignore")
def test_the_golden_file_is_what_bitsandbytes_computes() -> None:
    pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    golden, live = load_file(FILE), tables()
    for case in CASES:
        weight = golden[f"{case}/weight"].astype(np.float32)
        live |= {f"{case}/{name}": value for name, value in computed(weight).items()}
    for name, value in live.items():
        assert value.dtype == golden[name].dtype
        step = 1 if name.endswith("/nested") else 0
        np.testing.assert_allclose(np.float32(value), np.float32(golden[name]), rtol=1e-6, atol=step)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nf4_takes_at_most_four_and_a_fifth_bits_a_weight(dtype: Any) -> None:
    """With all of its scales."""
    for shape in ((4096, 1024), (576, 1536), (1536, 576), (3, 384, 96)):
        array = jlora.quantize_array(jnp.ones(shape, dtype), "nf4")
        parts: Any = (array.codes, array.scales, array.groups, array.offset)
        assert array.nbytes == sum(x.size * {"uint4": 4, "uint8": 8, "float32": 32}[x.dtype.name] for x in parts) / 8
        assert 8 * array.nbytes / array.size <= 4.2, shape
        assert array.dtype == jnp.dtype(dtype) == array.dequantize().dtype
