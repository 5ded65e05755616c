"""`quantize` and `dequantize`: trees of parameters with frozen weights in few bits, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding

from jlora._src.config import HEADS
from jlora._src.engine import compat
from jlora._src.paths import named_leaves
from jlora._src.quantization.array import matrix_axes, quantize_array
from jlora._src.quantization.scheme import Scheme
from jlora._src.quantized import QuantizedArray
from jlora._src.tree.sharding import quantized_shardings
from jlora._src.tree.state import is_linen, state
from jlora._src.types import Array, Axes, Path, PyTree, Uses, WeightUse, is_attached
from jlora.fields import bad_pattern
from jlora.messages import bullets, nearest

Targets: TypeAlias = Literal["all-linear"] | tuple[str, ...]
_TABLES = re.compile(r"(^|/)[^/]*(embed|position|wte|wpe)[^/]*(/|$)", re.IGNORECASE)
"""Lookup tables by the usual names of their modules, where no uses tell."""
_VECTORS = re.compile(r"(^|/)([^/]*norm[^/]*/[^/]+|ln_?\w*/[^/]+|bias|scale|b|gamma|beta|offset)$", re.IGNORECASE)
"""Norms and biases by the usual names, which have two axes in a stack of layers."""


def quantize(
    params: PyTree,
    scheme: str | Scheme = "nf4",
    uses: Uses | None = None,
    *,
    targets: Targets = "all-linear",
    exclude: tuple[str, ...] = HEADS,
) -> PyTree:
    """``params`` with weights replaced by `QuantizedArray` leaves: a frozen base in few bits.

    >>> uses = jlora.trace(model.apply, params, batch)
    >>> base = jlora.quantize(params, "nf4", uses)
    >>> logits = jlora.lora(model.apply)(jlora.attach(base, adapters), batch)

    The blocks of a scheme follow the weight's inputs; a lookup table's follow its rows. A size that the block does not
    divide gets blocks of another size: of its largest divisor down to half the block, else the next larger one. Each
    matrix of a stack (scanned layers, experts) is quantized on its own. Without ``uses``, the second last axis is the
    input, and the axes before it are stacks.

    Works under ``jit`` and `jax.eval_shape`. Sharded weights stay sharded, their scales like their blocks.

    Args:
      params: the parameters, or their shapes.
      scheme: see `Scheme`.
      uses: from `trace`.
      targets: ``"all-linear"``: every weight whose first matrix use is a product; without ``uses``, every floating leaf
        of two or more axes that does not have the usual name of a table, norm or bias. Or regular expressions, searched
        in the path.
      exclude: regular expressions of paths that are never quantized; by default output heads (`HEADS`), which
        bitsandbytes leaves out too.

    Returns:
      A tree like ``params``; it shares the leaves that are not quantized.

    Raises:
      ValueError: listing every pattern that matches nothing (with the closest paths), every weight named by ``targets``
        that is not a floating matrix, every weight that is quantized or has an adapter already, and every weight that
        holds NaN or infinity (checked only outside ``jit``); or if nothing is left to quantize.
    """
    scheme = Scheme.parse(scheme)
    leaves, treedef = named_leaves(params)
    choose = Chooser(targets, exclude, uses, state(params), is_linen(params))
    chosen = choose.all(leaves)
    made = {path: quantized_leaf(leaves[path], scheme, choose.axes(path, leaves[path])) for path in chosen}
    finite = {path: ok for path, (_, ok) in made.items() if isinstance(ok, jax.Array) and not isinstance(ok, Tracer)}
    check_finite_weights(jax.device_get(finite), "quantize")
    return treedef.unflatten([made[path][0] if path in made else leaf for path, leaf in leaves.items()])


def dequantize(params: PyTree) -> PyTree:
    """``params`` with plain arrays in place of `QuantizedArray` leaves, in its ``dtype`` and sharded like its codes.

    >>> merged = jlora.merge(jlora.dequantize(base), adapters)

    The tree shares all other leaves with ``params``.
    """
    leaves, treedef = named_leaves(params)
    return treedef.unflatten([_dequantized_leaf(leaf) for leaf in leaves.values()])


def check_finite_weights(finite: Mapping[Path, Any], what: str) -> None:
    """Raises a ValueError listing the weights that are not finite."""
    if bad := [path for path, ok in finite.items() if not ok]:
        raise ValueError(
            f"{what}: NaN or infinity in {len(bad)} of {len(finite)} weights:{bullets(map(repr, bad))}\nExpected "
            "finite values: any other destroys its whole block. Load the checkpoint again."
        )


class Chooser(NamedTuple):
    """Chooses the weights to quantize.

    Attributes:
      targets, exclude, uses: as given to `quantize`.
      state: ``{path: what it is}`` for leaves that are state, not parameters.
      linen: whether the tree has Linen's variable collections.
    """

    targets: Targets
    exclude: tuple[str, ...]
    uses: Uses | None
    state: Mapping[Path, str]
    linen: bool

    def all(self, leaves: Mapping[Path, Any]) -> list[Path]:
        """The paths of the weights to quantize; raises as `quantize`."""
        if wrong := [problem for pattern in self._patterns() if (problem := bad_pattern(pattern))]:
            raise ValueError(f"quantize: {len(wrong)} pattern(s) are wrong:{bullets(wrong)}")
        named = [path for path, leaf in leaves.items() if self._is_named(path, leaf)]
        chosen = [path for path in named if not _matches(self.exclude, path)]
        wrong = [*self._unmatched(leaves), *self._unknown(leaves)]
        wrong += [f"{path!r}: {why}" for path in chosen if (why := _why_not(leaves[path], self.state.get(path)))]
        if not chosen and not wrong:
            wrong = [f"nothing is left to quantize among {len(leaves)} leaves"]
        if wrong:
            raise ValueError(
                f"quantize: {len(wrong)} problem(s) with these params:{bullets(wrong)}\nExpected patterns in targets "
                "and exclude that match floating matrices of plain params, as from a model's init or a checkpoint."
            )
        return chosen

    def axes(self, path: Path, leaf: Any) -> Axes:
        """The roles of a weight's axes. A table is flipped: its rows are read one by one, and so have scales of their
        own."""
        use = self._use(path)
        if use is not None and use.axes is not None:
            return use.axes.flipped() if use.kind == "lookup" else use.axes
        axes = matrix_axes(len(leaf.shape))
        return axes.flipped() if _TABLES.search(path) else axes

    def _is_named(self, path: Path, leaf: Any) -> bool:
        if self.targets != "all-linear":
            return _matches(self.targets, path)
        if path in self.state or (self.linen and not path.startswith("params/")):
            return False
        if self.uses is not None:
            use = self._use(path)
            return use is not None and use.kind == "matmul" and _is_floating(leaf)
        return _is_floating(leaf) and len(leaf.shape) > 1 and not _TABLES.search(path) and not _VECTORS.search(path)

    def _use(self, path: Path) -> WeightUse | None:
        return None if self.uses is None else self.uses.get(path)

    def _patterns(self) -> tuple[str, ...]:
        if isinstance(self.exclude, str) or isinstance(self.targets, str) and self.targets != "all-linear":
            raise ValueError(
                f"quantize: got targets={self.targets!r} and exclude={self.exclude!r}; expected 'all-linear' or a "
                "tuple of patterns, and a tuple of patterns"
            )
        return (*(() if isinstance(self.targets, str) else self.targets), *self.exclude)

    def _unmatched(self, leaves: Mapping[Path, Any]) -> Iterable[str]:
        """The patterns that match nothing."""
        excluded = () if self.exclude == HEADS else self.exclude
        for name, patterns in (("target", self.targets), ("exclude", excluded)):
            for pattern in () if isinstance(patterns, str) else patterns:
                if not any(re.search(pattern, path) for path in leaves):
                    yield f"{name} {pattern!r} matches no weight{nearest(pattern, leaves)}"

    def _unknown(self, leaves: Mapping[Path, Any]) -> Iterable[str]:
        if self.uses is not None and (unknown := [p for p in leaves if _is_floating(leaves[p]) and p not in self.uses]):
            yield f"uses come from another tree: they lack {unknown[:5]}; trace with the params that are given here"


def _why_not(leaf: Any, state: str | None) -> str | None:
    """Why a leaf cannot be quantized; None if it can."""
    if isinstance(leaf, QuantizedArray):
        return f"quantized already ({leaf.scheme}); to change its scheme, call jlora.dequantize first"
    if is_attached(leaf):
        return "an adapter is attached; quantize the base first, then attach"
    if state is not None:
        return f"not a parameter ({state})"
    if not _is_floating(leaf) or len(leaf.shape) < 2:
        return (
            f"shape {tuple(leaf.shape)}, dtype {leaf.dtype}: not a floating matrix"
            if hasattr(leaf, "shape")
            else "no array"
        )
    return None


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)


def _matches(patterns: Iterable[str], path: Path) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def quantized_leaf(leaf: Any, scheme: Scheme, axes: Axes) -> tuple[Any, Any]:
    """The quantized weight, and whether all of it was finite; for a shape, shapes."""
    place = None if isinstance(leaf, Tracer) else _place(leaf)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shapes, finite = jax.eval_shape(lambda x: _quantize(x, scheme, axes), leaf)
        return shapes if place is None else _shapes_at(shapes, _places(shapes, place)), finite
    if place is None:
        return jax.jit(_quantize, static_argnums=(1, 2))(leaf, scheme, axes)
    shapes, _ = jax.eval_shape(lambda x: _quantize(x, scheme, axes), leaf)
    out = (_places(shapes, place), None)
    return jax.jit(_quantize, static_argnums=(1, 2), out_shardings=out)(leaf, scheme, axes)


def _quantize(leaf: Any, scheme: Scheme, axes: Axes) -> tuple[QuantizedArray, Array]:
    array = compat.to_device(jnp.asarray(leaf))
    return quantize_array(array, scheme, axes), jnp.all(jnp.isfinite(array))


def _dequantized_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, QuantizedArray):
        return leaf
    place = None if isinstance(leaf.codes, Tracer) else _place(leaf.codes)
    if isinstance(leaf.codes, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
    return jax.jit(_dequantize, out_shardings=place)(leaf)


def _dequantize(leaf: QuantizedArray) -> Array:
    return jax.tree.map(compat.to_device, leaf).dequantize()


def _place(leaf: Any) -> Any:
    """The sharding of a leaf on a mesh or in host memory, where a result must be put; None anywhere else."""
    place = getattr(leaf, "sharding", None)
    on_device = place is None or place.memory_kind in (None, "device", "unpinned_host")
    return None if on_device and not isinstance(place, NamedSharding) else place


def _places(shapes: QuantizedArray, place: Any) -> Any:
    """The shardings of a quantized weight's arrays."""
    return (
        quantized_shardings(shapes, place)
        if isinstance(place, NamedSharding)
        else jax.tree.map(lambda _: place, shapes)
    )


def _shapes_at(shapes: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)
