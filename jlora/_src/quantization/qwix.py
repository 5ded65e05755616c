"""`from_qwix`: arrays that Google's qwix has quantized, as `QuantizedArray` leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.paths import path_of
from jlora._src.quantized import QuantizedArray
from jlora._src.types import PyTree
from jlora.messages import bullets


def from_qwix(params: PyTree) -> PyTree:
    """``params`` with `QuantizedArray` leaves in place of qwix's ``QArray`` (https://github.com/google/qwix), also
    inside the ``WithAux`` of ``qwix.quantize_params``. Codes are shared; scales become float32.

    >>> base = jlora.from_qwix(qwix.quantize_params(params, quantized_model.params))

    Raises:
      ValueError: listing every array with zero points, which `QuantizedArray` lacks.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: _qarray(x) is not None)
    if wrong := [path_of(keys) for keys, leaf in flat if getattr(_qarray(leaf), "zero_point", None) is not None]:
        raise ValueError(
            f"from_qwix: {len(wrong)} array(s) have zero points:{bullets(map(repr, wrong))}\nExpected symmetric "
            "quantization, such as qwix's calibration method 'absmax'; or dequantize them: qwix.dequantize(array)."
        )
    return treedef.unflatten([leaf if (array := _qarray(leaf)) is None else _converted(array) for _, leaf in flat])


def _qarray(x: Any) -> Any:
    """The ``QArray`` that ``x`` is or wraps; None for anything else. By class name, so that qwix is not imported."""
    if type(x).__name__ == "WithAux":
        x = x.array
    return x if type(x).__name__ == "QArray" and hasattr(x, "qvalue") else None


def _converted(array: Any) -> QuantizedArray:
    scale: Any = array.scale
    shape_alone = isinstance(scale, jax.ShapeDtypeStruct)
    scales: Any = jax.ShapeDtypeStruct(scale.shape, jnp.float32) if shape_alone else scale.astype(jnp.float32)
    name = array.qtype if isinstance(array.qtype, str) else jnp.dtype(array.qtype).name
    name = {"float8_e4m3fn": "fp8"}.get(name, name)
    return QuantizedArray(array.qvalue, scales, scheme=name, dtype=jnp.dtype(scale.dtype))
