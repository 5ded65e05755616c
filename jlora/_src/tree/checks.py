"""Checks of adapters against the parameters they belong to; each lists every offender."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Sharding

from jlora._src.engine import compat
from jlora._src.engine.factored import check_fit
from jlora._src.types import Adapters, LoraFactors, Path, is_attached
from jlora.messages import bullets, nearest


def check_paths(adapters: Mapping[Path, Any], leaves: Mapping[Path, Any], what: str) -> None:
    """Raises a KeyError for paths of ``adapters`` that ``leaves`` lacks."""
    if missing := [p for p in adapters if p not in leaves]:
        raise KeyError(
            f"{what}: no leaf of the params has the path"
            + bullets(f"{p!r}{nearest(p, leaves)}" for p in missing)
            + f"\nExpected paths of the given tree, which has {len(leaves)} leaves. Pass the tree that was given to "
            "`jlora.init`."
        )


def check_kinds(adapters: Mapping[Path, Any], what: str) -> None:
    """Raises a TypeError for values of ``adapters`` that are neither `LoraFactors` nor arrays."""
    parts = {path: (v.a, v.b) if isinstance(v, LoraFactors) else (v,) for path, v in adapters.items()}
    odd = {path: part for path, found in parts.items() for part in found if not hasattr(part, "shape")}
    if odd:
        hint = restored_hint(odd)
        if any(isinstance(part, Sharding) for part in odd.values()):
            hint = " For the shardings of an attached tree, call jlora.adapter_shardings(tree, shardings)."
        raise TypeError(
            f"{what}: {len(odd)} of {len(adapters)} values are not adapters:"
            f"{bullets(f'{path!r}: got a {type(part).__name__}' for path, part in odd.items())}\nExpected LoraFactors "
            f"of arrays, or arrays for leaves that are trained whole, as jlora.init makes them.{hint}"
        )


def restored_hint(tree: Mapping[Any, Any]) -> str:
    """A hint for adapters that orbax or flax restored as plain dictionaries; else ``""``."""
    if not any(isinstance(v, Mapping) and {"a", "b"} <= set(v) for v in tree.values()):
        return ""
    return (
        " Got factors restored without a target, which loses their scale, axes and dropout: read the files of "
        "jlora.save wrote with jlora.load, or restore with a target: adapters of jlora.init, or their shapes."
    )


def check_adapters(leaves: Mapping[Path, Any], adapters: Adapters, what: str) -> None:
    """Raises a ValueError for adapters that do not fit their leaf, a TypeError for values that are not adapters."""
    check_kinds(adapters, what)
    wrong = []
    for path, value in adapters.items():
        leaf = leaves[path]
        if is_attached(leaf):
            wrong.append(f"{path!r}: an adapter is attached already; call jlora.detach or jlora.merge first")
        elif isinstance(value, LoraFactors):
            if problem := check_fit(tuple(leaf.shape), value):
                wrong.append(f"{path!r}: {problem}")
        elif tuple(value.shape) != tuple(leaf.shape):
            wrong.append(f"{path!r}: the trained leaf has shape {tuple(value.shape)}, expected {tuple(leaf.shape)}")
    if wrong:
        raise ValueError(
            f"{what}: {len(wrong)} of {len(adapters)} adapters do not fit the params:{bullets(wrong)}\n"
            "Expected the adapters that jlora.init made for these params. One axis too many or too few usually means "
            "adapters of another model, or a stack of adapters outside of jax.vmap."
        )


def check_finite(adapters: Adapters, what: str) -> None:
    """Raises a ValueError for adapters that hold NaN or infinity. Does nothing while tracing."""
    leaves = jax.tree.leaves(adapters)
    if any(isinstance(x, Tracer) for x in leaves):
        return
    with jax.ensure_compile_time_eval():  # also checks adapters that a jitted function closes over
        finite = jax.device_get({path: _all_finite(value) for path, value in adapters.items()})
    if bad := [path for path, ok in finite.items() if not ok]:
        raise ValueError(
            f"{what}: NaN or infinity in the adapters of {len(bad)} of {len(adapters)} weights:"
            f"{bullets(map(repr, bad))}\nExpected finite values. Training diverged: restore an earlier checkpoint, or "
            "lower the learning rate."
        )


def _all_finite(value: Any) -> Any:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(compat.to_device(x))) for x in jax.tree.leaves(value)]))
