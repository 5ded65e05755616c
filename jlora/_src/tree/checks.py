"""Checks of adapters against the parameters they belong to; each lists every offender."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import Sharding

from jlora._src.engine import compat
from jlora._src.engine.factors.factored import check_fit
from jlora._src.tree.state import is_variable
from jlora._src.types import Adapters, LoraFactors, Path, RowAdapters, Target, WeightUse, is_attached
from jlora.messages import bullets, nearest


class PathError(KeyError):
    """A KeyError that prints its message as it is; a KeyError prints its repr, with every line break as ``\\n``."""

    def __str__(self) -> str:
        return str(self.args[0])


def check_arguments(params: Any, adapters: Any, what: str) -> None:
    """Raises a TypeError if ``params`` are adapters, or ``adapters`` no mapping."""
    if isinstance(params, Mapping) and any(isinstance(v, LoraFactors) for v in params.values()):
        raise TypeError(f"{what}: got adapters as the parameters; expected the base parameters, then the adapters")
    check_mapping(adapters, what)


def check_mapping(adapters: Any, what: str) -> None:
    """Raises a TypeError if ``adapters`` are no mapping."""
    if not isinstance(adapters, Mapping):
        attached = any(map(is_attached, jax.tree.leaves(adapters, is_leaf=is_attached)))
        hint = " jlora.detach takes them out of an attached tree." if attached else ""
        raise TypeError(
            f"{what}: got a {type(adapters).__name__} as the adapters; expected {{path: LoraFactors or array}}, as "
            f"jlora.init makes them.{hint}"
        )


def check_paths(adapters: Mapping[Path, Any], leaves: Mapping[Path, Any], what: str) -> None:
    """Raises a KeyError for paths of ``adapters`` that ``leaves`` lacks."""
    if missing := [p for p in adapters if p not in leaves]:
        raise PathError(
            f"{what}: no leaf of the params has the path"
            + bullets(f"{p!r}{nearest(p, leaves)}" for p in missing)
            + f"\nExpected paths of the given tree, which has {len(leaves)} leaves. Pass the tree that was given to "
            "`jlora.init`."
        )


def check_kinds(adapters: Mapping[Path, Any], what: str) -> None:
    """Raises a TypeError for ``adapters`` that are no mapping, and for values that are not `LoraFactors` or arrays."""
    check_mapping(adapters, what)
    parts = {path: _arrays(v) for path, v in adapters.items()}
    odd = {path: part for path, found in parts.items() for part in found if not _is_array(part)}
    if odd:
        hint = restored_hint(odd)
        if any(isinstance(part, Target | WeightUse) for part in odd.values()):
            hint = " Make them from a plan: jlora.init(key, params, plan)."
        if any(map(is_attached, odd.values())):
            hint = " jlora.detach takes them out of an attached tree."
        if any(isinstance(part, RowAdapters) for part in odd.values()):
            hint = " Adapters for the rows of a batch are for jlora.attach alone; jlora.unstack has each by itself."
        if any(map(is_variable, odd.values())):
            hint = " Read the arrays of NNX variables with flax.nnx.as_pure(adapters)."
        if any(isinstance(part, Sharding) for part in odd.values()):
            hint = " For the shardings of an attached tree, call jlora.adapter_shardings(tree, shardings)."
        raise TypeError(
            f"{what}: {len(odd)} of {len(adapters)} values are not adapters:"
            f"{bullets(f'{path!r}: got a {type(part).__name__}' for path, part in odd.items())}\nExpected LoraFactors "
            f"of arrays, or arrays for leaves that are trained whole, as jlora.init makes them.{hint}"
        )


def _arrays(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, LoraFactors):
        return (value,)
    return (value.a, value.b) if value.magnitude is None else (value.a, value.b, value.magnitude)


def _is_array(x: Any) -> bool:
    """Whether ``x`` is an array or its shape: not a box around one, which is a tree (an NNX variable, an attached
    leaf), and not what jlora describes by a shape."""
    return hasattr(x, "shape") and not isinstance(x, Target | WeightUse) and jax.tree_util.all_leaves([x])


def restored_hint(tree: Mapping[Any, Any]) -> str:
    """A hint for adapters that orbax or flax restored as plain dictionaries; else ``""``."""
    if not any(isinstance(v, Mapping) and {"a", "b"} <= set(v) for v in tree.values()):
        return ""
    return (
        " Got factors restored without a target, which loses their scale, axes and dropout: read the files of "
        "jlora.save wrote with jlora.load, or restore with a target: adapters of jlora.init, or their shapes."
    )


def check_adapters(leaves: Mapping[Path, Any], adapters: Mapping[Path, Any], what: str) -> None:
    """Raises a ValueError for adapters that do not fit their leaf.

    Raises:
      TypeError: for values that are not adapters; first, because such a dict is often the params, in the wrong place.
      KeyError: for paths that ``leaves`` lacks.
    """
    check_kinds(adapters, what)
    check_paths(adapters, leaves, what)
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


def differences(column: Sequence[Any], *, dropout: bool = True) -> list[str]:
    """The first difference in kind, axes, dropout rate (if that matters) or shape between the adapters of one path;
    None stands for one that lacks it."""
    views: dict[str, Callable[[Any], Any]] = {"kinds": _kind}
    if all(isinstance(value, LoraFactors) for value in column if value is not None):
        views |= {"axes": lambda f: tuple(f.axes)}
        views |= {"dropout rates": lambda f: f.dropout} if dropout else {}
    views["shapes of the weight"] = _weight_shape
    for what, view in views.items():
        seen = [None if value is None else view(value) for value in column]
        if len({x for x in seen if x is not None}) > 1:
            return [f"{what} {seen}"]
    return []


def _kind(value: Any) -> str:
    return "whole leaf" if not isinstance(value, LoraFactors) else "LoRA" if value.magnitude is None else "DoRA"


def _weight_shape(value: Any) -> tuple[int, ...]:
    """The sizes of the weight, as batch, inputs, outputs."""
    if not isinstance(value, LoraFactors):
        return tuple(value.shape)
    return (*value.a.shape[:-1], *value.b.shape[len(value.axes.batch) + 1 :])
