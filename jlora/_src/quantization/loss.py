"""`quantization_loss`: what quantization changes, weight by weight."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jlora._src.engine import compat
from jlora._src.paths import named_leaves
from jlora._src.quantized import QuantizedArray
from jlora._src.types import Array, Path, PyTree
from jlora.messages import bullets, nearest, table


class QuantizationLoss(dict[Path, float]):
    """``{path: norm(quantized - weight) / norm(weight)}`` in the tree's order; prints as a readable table.

    Attributes:
      weights: ``{path: (format, bits of an entry, scales included)}``.
    """

    def __init__(self, lost: dict[Path, float], weights: dict[Path, tuple[str, float]]):
        super().__init__(lost)
        self.weights = weights

    def __str__(self) -> str:
        rows = [(path, self.weights[path][0], f"{self.weights[path][1]:.2f}", f"{self[path]:.2%}") for path in self]
        worst = max(self, key=lambda path: self[path], default=None)
        last = "nothing is quantized" if worst is None else f"most is lost in {worst}: {self[worst]:.2%}"
        return f"{table(('weight', 'format', 'bits', 'error / weight'), rows, right=(2, 3))}\n{last}"


def quantization_loss(params: PyTree, quantized: PyTree) -> QuantizationLoss:
    """What quantization loses: for each quantized weight, the norm of its error relative to the weight's own.

    >>> print(jlora.quantization_loss(params, jlora.quantize(params, "nf4", uses)))

    Args:
      params: the weights before; one at a time is dequantized beside them.
      quantized: the same tree with `QuantizedArray` leaves.

    Raises:
      ValueError: listing every quantized weight that ``params`` lack, or have in another shape.
    """
    before = named_leaves(params)[0]
    after = {path: leaf for path, leaf in named_leaves(quantized)[0].items() if isinstance(leaf, QuantizedArray)}
    wrong = [f"{path!r} is missing{nearest(path, before)}" for path in after if path not in before]
    wrong += [
        f"{path!r} has shape {tuple(before[path].shape)}; expected {leaf.shape}"
        for path, leaf in after.items()
        if path in before and tuple(before[path].shape) != leaf.shape
    ]
    if wrong:
        raise ValueError(
            f"quantization_loss: {len(wrong)} of {len(after)} weights differ:{bullets(wrong)}\nExpected the params "
            "from which the quantized tree was made, first."
        )
    lost = jax.device_get({path: _relative_error(before[path], leaf) for path, leaf in after.items()})
    return QuantizationLoss(
        {path: float(value) for path, value in lost.items()},
        {path: (leaf.scheme, 8 * leaf.nbytes / max(leaf.size, 1)) for path, leaf in after.items()},
    )


@jax.jit
def _relative_error(weight: Any, quantized: QuantizedArray) -> Array:
    weight, quantized = jax.tree.map(compat.to_device, (weight, quantized))
    weight = weight.dequantize() if isinstance(weight, QuantizedArray) else weight
    weight = weight.astype(jnp.float32)
    size = jnp.linalg.norm(weight)
    lost = jnp.linalg.norm(quantized.astype(jnp.float32).dequantize() - weight)
    return jnp.where(size > 0, lost / jnp.where(size > 0, size, 1), 0.0)
