"""What adapters add to their base: low-rank updates, and the differences of leaves trained whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jlora._src.engine import compat
from jlora._src.engine.factors.named_axes import accumulation_dtype, promoted_dtype
from jlora._src.paths import named_leaves
from jlora._src.quantized import as_array
from jlora._src.tree.checks import check_adapters, check_arguments, check_kinds, differences
from jlora._src.types import Adapters, Array, LoraFactors, Path, PyTree
from jlora.messages import bullets


class Parts(NamedTuple):
    """What adapters add to their base.

    Attributes:
      factors: plain LoRA, by path.
      whole: ``leaf - base`` of the leaves trained whole, by path, float32 or wider.
    """

    factors: dict[Path, LoraFactors]
    whole: dict[Path, Array]


def parts(adapters: Adapters, params: PyTree | None, what: str) -> Parts:
    """The parts of adapters; ``params`` are needed if there are leaves trained whole.

    Raises:
      ValueError: listing every DoRA, whose update depends on the base; every leaf trained whole, without ``params``;
        and factors whose axes do not fit each other.
      TypeError, KeyError: as `merge`.
    """
    check_kinds(adapters, what)
    check_no_dora(adapters, what)
    check_ranks(adapters, what)
    factors = {path: value for path, value in adapters.items() if isinstance(value, LoraFactors)}
    whole = {path: value for path, value in adapters.items() if not isinstance(value, LoraFactors)}
    if params is None:
        if whole:
            raise ValueError(
                f"{what}: {len(whole)} of {len(adapters)} leaves are trained whole, so their update is the difference "
                f"to the base:{bullets(map(repr, whole))}\nPass the base as params=params; or leave them out: "
                "{path: f for path, f in adapters.items() if isinstance(f, jlora.LoraFactors)}."
            )
        return Parts(factors, {})
    check_arguments(params, adapters, what)
    leaves = named_leaves(params)[0]
    check_adapters(leaves, adapters, what)
    return Parts(factors, {path: difference(value, leaves[path]) for path, value in whole.items()})


def difference(leaf: Any, base: Any) -> Array:
    """``leaf - base``, float32 or wider."""
    one, other = (compat.to_device(jnp.asarray(as_array(x))) for x in (leaf, base))
    dtype = accumulation_dtype(promoted_dtype(one.dtype, other.dtype))
    return one.astype(dtype) - other.astype(dtype)


def check_no_dora(adapters: Adapters, what: str) -> None:
    """Raises a ValueError listing every path with DoRA."""
    dora = [path for path, f in adapters.items() if isinstance(f, LoraFactors) and f.magnitude is not None]
    if dora:
        raise ValueError(
            f"{what}: {len(dora)} of {len(adapters)} adapters use DoRA, whose update depends on the base and is not of "
            f"low rank:{bullets(map(repr, dora))}\nFor plain LoRA close to it, call jlora.extract(params, "
            "jlora.merge(params, adapters), plan), with a plan without use_dora."
        )


def check_ranks(adapters: Adapters, what: str) -> None:
    """Raises a ValueError listing every path whose factors do not fit each other, as in a stack of adapters."""
    wrong = [
        f"{path!r}: a has shape {tuple(f.a.shape)} and b {tuple(f.b.shape)}, with axes {tuple(f.axes)}"
        for path, f in adapters.items()
        if isinstance(f, LoraFactors) and not _fit(f)
    ]
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} of {len(adapters)} adapters have factors that do not fit each other:"
            f"{bullets(wrong)}\nExpected those of jlora.init. For a stack, call it on each of jlora.unstack(stacked), "
            "or under jax.vmap."
        )


def _fit(f: LoraFactors) -> bool:
    batch, inputs, outputs = map(len, f.axes)
    if f.a.ndim != batch + inputs + 1 or f.b.ndim != batch + 1 + outputs:
        return False
    return f.a.shape[:batch] == f.b.shape[:batch] and f.a.shape[-1] == f.b.shape[batch]


def check_alike(trees: Sequence[Adapters], what: str) -> None:
    """Raises a ValueError listing every path at which adapters differ in kind, axes or shape of the weight."""
    paths = dict.fromkeys(path for tree in trees for path in tree)
    wrong = [
        f"{path!r}: {problem}"
        for path in paths
        for problem in differences([tree.get(path) for tree in trees], dropout=False)
    ]
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} differences between the {len(trees)} adapters:{bullets(wrong)}\nExpected adapters "
            "of one base that differ only in rank, scale, dtype, dropout and values, or lack paths. Where one was "
            "trained whole, give it factors: jlora.extract(params, jlora.merge(params, adapters), plan)."
        )
