"""A quantized base inside `lora`: it is dequantized where a product takes it, and never kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import PartitionSpec

from jlora._src.engine import compat
from jlora._src.engine.factors.adapted_product import checkpoint_policy
from jlora._src.quantized import QuantizedArray, spec_of_blocks
from jlora._src.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """An equation to apply to the dequantized weight.

    Attributes:
      eqn: its first operand is the weight.
      result: the index of its result.
      operands: the number of its other operands.
    """

    eqn: Any
    result: int
    operands: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stored:
    """A quantized weight, and what the model does to it before a product takes it.

    Attributes:
      array: the weight.
      operands: of the moves, one after the other.
      moves: applied after it is dequantized. Static.
    """

    array: QuantizedArray
    operands: tuple[Any, ...] = ()
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return self._aval.shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return self._aval.size

    @property
    def dtype(self) -> Any:
        return self._aval.dtype

    @property
    def _aval(self) -> Any:
        return self.moves[-1].eqn.outvars[self.moves[-1].result].aval if self.moves else self.array

    def dequantize(self) -> Array:
        x, operands = self.array.dequantize(), list(self.operands)
        for move in self.moves:
            own = [operands.pop(0) for _ in range(move.operands)]
            x = compat.bind(move.eqn, [x, *own])[move.result]
        return x


def dequantized(base: Any) -> Any:
    """A base as an array."""
    return base.dequantize() if isinstance(base, Stored) else base


def array_like(base: Any) -> Any:
    """An array in the memory space of a base, and with its varying mesh axes."""
    match base:
        case Stored():
            return base.array.codes
        case QuantizedArray():
            return base.codes
        case _:
            return base


def with_base(base: Any, fn: Callable[..., Any], *args: Any) -> Any:
    """``fn(base, *args)``; of a stored base, dequantized for it, and once more for its derivative."""
    if not isinstance(base, Stored):
        return fn(base, *args)
    run = jax.checkpoint(lambda base, *args: fn(base.dequantize(), *args), policy=checkpoint_policy(None))
    return run(base, *args)


def bind_stored(eqn: Any, base: Stored, others: Sequence[Any]) -> list[Any]:
    """The results of a primitive that moves or cuts the weight, its first operand."""
    cut = None if base.moves else _CUTS.get(eqn.primitive.name)
    found = None if cut is None else cut(eqn, base.array, *others)
    if found is not None:
        return [Stored(found)]
    operands = (*base.operands, *others)
    return [Stored(base.array, operands, (*base.moves, Move(eqn, i, len(others)))) for i in range(len(eqn.outvars))]


# Each of these applies an equation to all arrays of a weight, or returns None if that is not exact.


def _convert(eqn: Any, array: QuantizedArray) -> QuantizedArray | None:
    exact = array.dtype == "float32" or eqn.params["new_dtype"] == array.dtype
    return array.astype(eqn.params["new_dtype"]) if exact else None


def _transpose(eqn: Any, array: QuantizedArray) -> QuantizedArray:
    return jax.tree.map(lambda x: lax.transpose(x, eqn.params["permutation"]), array)


def _squeeze(eqn: Any, array: QuantizedArray) -> QuantizedArray:
    return jax.tree.map(lambda x: lax.squeeze(x, eqn.params["dimensions"]), array)


def _dynamic_slice(eqn: Any, array: QuantizedArray, *starts: Any) -> QuantizedArray | None:
    """Along axes that are not divided into blocks: layers, experts, outputs."""
    sizes = eqn.params["slice_sizes"]
    along = [d for d, size in enumerate(sizes) if size != array.shape[d]]
    if len(starts) != len(sizes) or any(x.shape[d] not in (1, array.shape[d]) for x in _arrays(array) for d in along):
        return None

    def cut(x: Any) -> Any:
        for d in along:
            x = x if x.shape[d] == 1 else lax.dynamic_slice_in_dim(x, starts[d], sizes[d], d)
        return x

    return jax.tree.map(cut, array)


def _slice(eqn: Any, array: QuantizedArray) -> QuantizedArray | None:
    """In whole blocks."""
    p = eqn.params
    windows = list(zip(p["start_indices"], p["limit_indices"], p["strides"] or (1,) * array.ndim, strict=True))

    def window(x: Any, d: int) -> tuple[int, int, int] | None:
        """That of an array along one axis; None if it cuts through a block."""
        (start, stop, step), block = windows[d], array.shape[d] // x.shape[d]
        if block == 1 or windows[d] == (0, array.shape[d], 1) or x.shape[d] == 1:
            return windows[d] if block == 1 else (0, x.shape[d], 1)
        whole = start % block == stop % block == 0 and step == 1
        return (start // block, stop // block, 1) if whole else None

    own = [[window(x, d) for d in range(array.ndim)] for x in _arrays(array)]
    if any(found is None for one in own for found in one):
        return None
    cut = iter(own)
    return jax.tree.map(lambda x: lax.slice(x, *zip(*next(cut), strict=True)), array)


_CUTS: dict[str, Callable[..., QuantizedArray | None]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "dynamic_slice": _dynamic_slice,
    "slice": _slice,
}


def _arrays(array: QuantizedArray) -> list[Any]:
    return jax.tree.leaves(array)


# The layers of a scan, and the places of a base


def sliceable(base: Any) -> Any:
    """A base as `lax.scan` slices it along its first axis: all of its arrays must have it."""
    fits = isinstance(base, Stored) and not base.moves and all(x.shape[0] == base.shape[0] for x in _arrays(base.array))
    return base if fits else dequantized(base)


def divisible(base: Any, spec: Any, mesh: Any) -> Any:
    """A base that ``spec`` splits in whole blocks."""
    if not isinstance(base, Stored):
        return base
    own = [spec_of_blocks(x.shape, base.shape, spec, mesh) for x in _arrays(base.array)]
    return base.dequantize() if base.moves or any(one is None for one in own) else base


def specs_of(base: Any, spec: Any, mesh: Any) -> Any:
    """The specs of a base, where ``spec`` is the weight's, and splits it in whole blocks."""
    if not isinstance(base, Stored):
        return spec
    return jax.tree.map(lambda x: PartitionSpec(*(spec_of_blocks(x.shape, base.shape, spec, mesh) or ())), base)
