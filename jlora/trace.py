"""`trace`: how a model consumes each of its weights, read off its jaxpr instead of guessed from names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core

from jlora import _compat, _paths
from jlora._labels import CONST, DATA, Probe, Value
from jlora._primitives import PRIMITIVES
from jlora._staging import is_array, stage
from jlora._types import Axes, Path, PyTree, Use, WeightUse, is_attached


def trace(fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any) -> dict[Path, WeightUse]:
    """How ``fn(params, *args, **kwargs)`` consumes every floating leaf of ``params``.

    Abstract: nothing is computed, and arrays may be `jax.ShapeDtypeStruct`. A stacked layer axis, an expert
    axis and an axis indexed by a scalar are batch; contracted axes are inputs, the others outputs; the rows
    of a looked-up table are its inputs. It sees through scan, cond, while, remat, jit, shard_map and custom
    derivatives, and through casts, transposes, reshapes and other rearrangements of a weight.

    >>> uses = jlora.trace(model.apply, params, batch)
    >>> uses["params/query/kernel"].axes
    Axes(batch=(), inputs=(0,), outputs=(1, 2))

    Args:
      fn: the model's function; its first argument is the parameter tree.
      params: the parameters, or their shapes.
      *args, **kwargs: the rest of the arguments; what is not an array is static.

    Returns:
      ``{path: WeightUse}`` in the tree's order.
    """
    leaves, _ = _paths.named_leaves(params)
    staged = stage(fn, (params, *args), kwargs)
    weights = {path: leaf for path, leaf in leaves.items() if is_array(leaf) or is_attached(leaf)}
    values: list[Value] = [DATA] * len(staged.given)
    for i, (path, leaf) in enumerate(weights.items()):  # the parameters' arrays come first, in the tree's order
        probe = Probe(path, leaf.ndim, tuple(frozenset({d}) for d in range(leaf.ndim)))
        values[i] = (probe,) if jnp.issubdtype(leaf.dtype, jnp.floating) else CONST
    walker = _Walker()
    walker.walk(staged.jaxpr, [CONST] * len(staged.consts), values)
    floating = {p: x for p, x in weights.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {p: WeightUse(tuple(x.shape), x.dtype, tuple(walker.uses.get(p, ()))) for p, x in floating.items()}


class _Walker:
    """Follows weights through a jaxpr and its inner jaxprs, and notes where they are consumed."""

    def __init__(self) -> None:
        self.uses: dict[Path, list[Use]] = {}

    def walk(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        env: dict[Any, Value] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(atom: Any) -> Value:
            return CONST if isinstance(atom, core.Literal) else env[atom]

        for eqn in jaxpr.eqns:
            env.update(zip(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def inner(self, closed: Any, args: Sequence[Value]) -> list[Value]:
        jaxpr, consts = _compat.open_jaxpr(closed)
        return self.walk(jaxpr, [CONST] * len(consts), args)

    def equation(self, eqn: Any, values: list[Value]) -> list[Value]:
        if all(isinstance(v, str) for v in values):
            return [DATA if DATA in values else CONST] * len(eqn.outvars)
        primitive = PRIMITIVES.get(eqn.primitive.name)
        return self.consume(eqn, values) if primitive is None else primitive.label(self, eqn, values)

    def consume(self, eqn: Any, values: list[Value], axes: Callable[[int, Probe], Any] | None = None) -> list[Value]:
        """Notes a use of every weight among ``values``; ``axes(position, probe)`` gives `Axes`, or why not."""
        source = _compat.source_line(eqn)
        for position, value in enumerate(values):
            for probe in () if isinstance(value, str) else value:
                found = axes(position, probe) if axes else "the primitive has no matrix form"
                if isinstance(found, Axes):
                    use = Use(eqn.primitive.name, found, source)
                else:
                    use = probe.lookup or Use(eqn.primitive.name, None, source, str(found))
                if not probe.stopped:
                    self.uses.setdefault(probe.path, []).append(use)
        return [DATA if DATA in values else CONST] * len(eqn.outvars)
