"""`decompose` takes weights before their quantization; its residual may be quantized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

CONFIG = jlora.LoraConfig(rank=4, alpha=4, targets=("w",))


@pytest.fixture
def base() -> dict[str, Any]:
    return jlora.quantize({"w": jax.random.normal(jax.random.key(0), (128, 64))}, "nf4", targets=("w",))


@pytest.mark.parametrize("method", ["pissa", "olora", "loftq", "lq"])
def test_a_quantized_weight_is_refused_by_name(base: dict[str, Any], method: Any) -> None:
    options: Any = {"quantizer": jlora.quantize_array} if method in ("loftq", "lq") else {}
    with pytest.raises(TypeError, match=r"(?s)'w': nf4.*jlora.dequantize\(params\).*quantizer"):
        jlora.decompose(base, CONFIG, method=method, **options)


@pytest.mark.parametrize("method", ["loftq", "lq"])
def test_the_way_out_has_a_quantized_residual_that_is_closer(base: dict[str, Any], method: Any) -> None:
    """Than quantizing alone; and the adapted residual computes."""
    params = {"w": jax.random.normal(jax.random.key(1), (128, 64))}
    residual, adapters = jlora.decompose(params, CONFIG, method=method, quantizer=jlora.quantize_array)
    assert isinstance(residual["w"], jlora.QuantizedArray) and residual["w"].scheme == "nf4"
    start = jlora.merge(jlora.dequantize(residual), adapters)["w"]
    alone = jlora.quantize_array(params["w"]).dequantize()
    assert jnp.linalg.norm(start - params["w"]) < jnp.linalg.norm(alone - params["w"])
    x = jax.random.normal(jax.random.key(2), (3, 128))
    apply: Any = jlora.lora(lambda tree, x: x @ tree["w"])
    np.testing.assert_allclose(apply(jlora.attach(residual, adapters), x), x @ start, atol=1e-4)
