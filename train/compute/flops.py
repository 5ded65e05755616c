"""The FLOPs of a step, and the utilization of its devices.

``count(step, *args)`` counts the floating point operations of a step's matrix products. Model FLOPs utilization (MFU,
PaLM, Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B) relates them to what the devices could
compute in the step's time::

    count(step, *args) / (seconds * devices * peak(device))

Model FLOPs cover the forward and the backward pass, without recomputation (`jax.checkpoint`): count the step without
it, and time the step with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

# Dense, per JAX device, from the vendors' datasheets. Datasheets of GPUs often state peaks with 2:4 sparsity, double.
# NVIDIA: nvidia.com/en-us/data-center, a page for each product; B200 and GB200 as parts of HGX B200 and GB200 NVL72.
# TPU: docs.cloud.google.com/tpu/docs, a page for each version; a chip of v2, v3 or 7x is two JAX devices, one per core.
PEAKS: dict[str, float] = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,  # v4i, https://doi.org/10.1109/ISCA52012.2021.00010
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # Ironwood
    "V100-PCIE": 112e12,  # V100 and T4 have no bfloat16: float16 peaks
    "V100": 125e12,
    "T4": 65e12,
    "A100": 312e12,
    "A30": 165e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40": 181e12,
    "L40S": 362e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}
"""Peak bfloat16 FLOP/s by part of `jax.Device.device_kind`; the first match wins."""


def peak(device: Any) -> float | None:
    """The peak of a `jax.Device` for bfloat16 matrix products, in FLOP/s; None if unknown, for example for a CPU or a
    GPU slice (MIG).

    It is bfloat16's peak whatever the program's dtype: float32 cannot reach a utilization of 1.
    """
    if "MIG" in device.device_kind:
        return None
    return next((flops for words, flops in PEAKS.items() if re.search(rf"\b{words}\b", device.device_kind)), None)


def count(fn: Callable[..., Any], *args: Any) -> float:
    """Count the floating point operations of ``fn(*args)`` in matrix products and convolutions, by tracing it.

    A multiply-add is two operations. Everything else is left out, as are products that no result depends on, and
    kernels opaque to JAX: Pallas's and vendors' (cuDNN's attention). The body of a scan counts once per iteration, of a
    ``shard_map`` once per device. The most expensive branch of a ``cond`` counts. A ``while_loop`` counts as one
    iteration. Ragged products count as if every row belonged to a group.

    Args:
      fn: a function of pytrees of arrays, such as a training step.
      args: its arguments: arrays, or their shapes (`jax.ShapeDtypeStruct`).

    Example:
      >>> x, w = jax.ShapeDtypeStruct((8, 16), "float32"), jax.ShapeDtypeStruct((16, 32), "float32")
      >>> count(jnp.dot, x, w) == 2 * 8 * 16 * 32
    """
    return float(_of_jaxpr(jax.make_jaxpr(fn)(*args)))


def _of_jaxpr(jaxpr: Any) -> int:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    live, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))  # a gradient's jaxpr contains equations that XLA drops
    return sum(map(_of_equation, live.eqns))


def _of_equation(eqn: Any) -> int:
    match eqn.primitive.name:
        case "dot_general":
            return _of_dot(eqn, eqn.params["dimension_numbers"], ())
        case "contract":  # jlora's low-rank products
            return 2 * math.prod(_sizes(eqn.params["product"].names[:2], eqn.invars).values())
        case "adapted_product":  # jlora's, of the weight and its last factor
            names = eqn.params["axes"].names
            pairs = (_sizes([names[i] for i in pair], [eqn.invars[i] for i in pair]) for pair in ((0, 1), (2, 4)))
            return sum(2 * math.prod(sizes.values()) for sizes in pairs)
        case "ragged_dot_general":
            numbers = eqn.params["ragged_dot_dimension_numbers"]
            return _of_dot(eqn, numbers.dot_dimension_numbers, numbers.rhs_group_dimensions)
        case "conv_general_dilated":
            return _of_conv(eqn)
        case "pallas_call":  # its jaxpr is one block's
            return 0
        case "cond":
            return max(map(_of_jaxpr, eqn.params["branches"]))
        case "scan":
            return eqn.params["length"] * _of_jaxpr(eqn.params["jaxpr"])
        case "shard_map":
            mesh, axes = eqn.params["mesh"], eqn.params["newly_manual_axes"]
            return math.prod(mesh.shape[axis] for axis in axes) * _of_jaxpr(eqn.params["jaxpr"])
        case _:
            return sum(map(_of_jaxpr, _jaxprs(eqn.params)))


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs in an equation's parameters, alone or in tuples."""
    return filter(_is_jaxpr, jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr))


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def _sizes(names: Iterable[Any], operands: Iterable[Any]) -> dict[Any, int]:
    """The size of every named axis."""
    return {n: size for own, v in zip(names, operands, strict=True) for n, size in zip(own, v.aval.shape, strict=True)}


def _of_dot(eqn: Any, numbers: Any, groups: tuple[int, ...]) -> int:
    """Every element of the left operand is multiplied with every column of the right one. ``groups`` are axes of the
    right operand, along which each row of the left one uses one element."""
    lhs, rhs = (v.aval for v in eqn.invars[:2])
    (_, contracted), (_, batch) = numbers
    columns = [n for axis, n in enumerate(rhs.shape) if axis not in (*contracted, *batch, *groups)]
    return 2 * math.prod(lhs.shape) * math.prod(columns)


def _of_conv(eqn: Any) -> int:
    """Exact: products with padding, or with the zeros between the elements of a dilated input, are left out. So each of
    a convolution's two gradients, also convolutions, counts as much as the convolution."""
    lhs, rhs, out = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape, eqn.outvars[0].aval.shape
    lhs_spec, rhs_spec, out_spec = eqn.params["dimension_numbers"]
    taps = math.prod(
        _taps(lhs[lhs_spec[axis]], rhs[rhs_spec[axis]], out[out_spec[axis]], eqn.params, axis - 2)
        for axis in range(2, len(lhs))
    )
    # The kernel's input features belong to one group, whether features or the batch are grouped.
    return 2 * out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]] * taps


def _taps(size: int, kernel: int, out: int, params: dict[str, Any], axis: int) -> int:
    """The number of (output, kernel) position pairs that meet an input element, along one spatial axis."""
    start = np.arange(out)[:, None] * params["window_strides"][axis] - params["padding"][axis][0]
    position = start + np.arange(kernel) * params["rhs_dilation"][axis]
    dilation = params["lhs_dilation"][axis]
    inside = (position >= 0) & (position <= (size - 1) * dilation) & (position % dilation == 0)
    return int(inside.sum())
