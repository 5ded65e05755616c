"""`trace`: how a model consumes each of its weights, read off its jaxpr instead of guessed from names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jlora import _compat, _paths
from jlora._rearrange import reshape_groups
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
        probe = _Probe(path, leaf.ndim, tuple(frozenset({d}) for d in range(leaf.ndim)))
        values[i] = (probe,) if jnp.issubdtype(leaf.dtype, jnp.floating) else CONST
    walker = _Walker()
    walker.walk(staged.jaxpr, [CONST] * len(staged.consts), values)
    floating = {p: x for p, x in weights.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return {p: WeightUse(tuple(x.shape), x.dtype, tuple(walker.uses.get(p, ()))) for p, x in floating.items()}


@dataclasses.dataclass(frozen=True)
class _Probe:
    """A weight on its way through the program.

    Attributes:
      path: of the weight.
      ndim: of the weight.
      dims: for each current dimension, the weight's axes that it holds.
      stopped: whether it is behind a stop_gradient.
      lookup: the use to report if it turns out to be a looked-up row rather than a weight.
    """

    path: Path
    ndim: int
    dims: tuple[frozenset[int], ...]
    stopped: bool = False
    lookup: Use | None = None


Value: TypeAlias = "tuple[_Probe, ...] | str"
"""A weight, or several joined ones; or DATA (depends on the other arguments); or CONST (does not)."""
DATA, CONST = "data", "const"
UNIT: frozenset[int] = frozenset()

_SAME_DIMS = frozenset(
    "convert_element_type copy copy_p name sharding_constraint reduce_precision pvary "
    "reshard mesh_cast slice dynamic_slice rev pad neg split".split()
)
_ELEMENTWISE = frozenset("mul div add sub select_n".split())


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
        name = eqn.primitive.name
        handler = getattr(self, f"on_{name}", None)
        if handler is not None:
            return handler(eqn, values)
        if name in ("optimization_barrier", "device_put"):
            return values
        if name in _SAME_DIMS:
            kept = [values[0]] * len(eqn.outvars)
            return kept if not isinstance(values[0], str) else self.consume(eqn, values)
        if name in _ELEMENTWISE and self.in_weight_space(eqn, values):
            shape = eqn.outvars[0].aval.shape
            return [_union([_broadcast(v, atom.aval.shape, shape) for atom, v in zip(eqn.invars, values, strict=True)])]
        return self.consume(eqn, values)

    def in_weight_space(self, eqn: Any, values: list[Value]) -> bool:
        """Whether an elementwise equation makes a weight of weights, rather than applying one to activations."""
        pairs = zip(eqn.invars, values, strict=True)
        return all(np.prod(atom.aval.shape, dtype=int) == 1 for atom, value in pairs if value == DATA)

    def consume(self, eqn: Any, values: list[Value], axes: Callable[[int, _Probe], Any] | None = None) -> list[Value]:
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

    # Products and lookups: the axes are read off the dimension numbers.

    def on_dot_general(self, eqn: Any, values: list[Value]) -> list[Value]:
        contracted, batch = eqn.params["dimension_numbers"]
        return self.consume(eqn, values, lambda i, probe: _axes(probe, contracted[i], batch[i]))

    def on_ragged_dot_general(self, eqn: Any, values: list[Value]) -> list[Value]:
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        contracted, batch = numbers.dot_dimension_numbers
        groups = ((), (*batch[1], *numbers.rhs_group_dimensions))
        return self.consume(
            eqn, values, lambda i, probe: _axes(probe, contracted[i], groups[i]) if i < 2 else "it is a group size"
        )

    def on_conv_general_dilated(self, eqn: Any, values: list[Value]) -> list[Value]:
        kernel = eqn.params["dimension_numbers"].rhs_spec
        return self.consume(
            eqn, values, lambda i, probe: _axes(probe, kernel[1:], ()) if i == 1 else "it is the image of a convolution"
        )

    def on_gather(self, eqn: Any, values: list[Value]) -> list[Value]:
        table, index = values
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if isinstance(table, str) or not isinstance(index, str) or numbers.operand_batching_dims:
            return self.consume(eqn, values)
        shape = eqn.invars[0].aval.shape
        picked = [d for d, n in enumerate(sizes) if n == 1 != shape[d] or d in numbers.collapsed_slice_dims]
        if any(sizes[d] != shape[d] for d in range(len(shape)) if d not in picked):
            return self.consume(eqn, values)
        kept = [d for d in range(len(sizes)) if d not in numbers.collapsed_slice_dims]
        out = eqn.outvars[0].aval
        scalar = all(n == 1 for i, n in enumerate(out.shape) if i not in numbers.offset_dims)
        rows = sum(shape[d] > 1 for d in kept if d not in picked)
        source = _compat.source_line(eqn)

        def pick(probe: _Probe) -> _Probe:
            dims = [UNIT] * out.ndim
            for d, i in zip(kept, numbers.offset_dims, strict=True):
                dims[i] = UNIT if d in picked else probe.dims[d]
            found = _axes(probe, picked, ())
            lookup = Use("gather", found, source) if isinstance(found, Axes) and (rows == 1 or not scalar) else None
            return dataclasses.replace(probe, dims=tuple(dims), lookup=lookup)

        looked_up = tuple(map(pick, table))
        return [looked_up] if rows > 1 else self.consume(eqn, [looked_up, index])

    # Rearrangements: the dimensions move.

    def on_transpose(self, eqn: Any, values: list[Value]) -> list[Value]:
        return [_moved(values[0], lambda dims: [dims[d] for d in eqn.params["permutation"]])]

    def on_squeeze(self, eqn: Any, values: list[Value]) -> list[Value]:
        gone = eqn.params["dimensions"]
        return [_moved(values[0], lambda dims: [axes for d, axes in enumerate(dims) if d not in gone])]

    def on_broadcast_in_dim(self, eqn: Any, values: list[Value]) -> list[Value]:
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        return [_broadcast(values[0], before, after, eqn.params["broadcast_dimensions"])]

    def on_reshape(self, eqn: Any, values: list[Value]) -> list[Value]:
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        groups = reshape_groups(before, after)
        if groups is None:
            return self.consume(eqn, values)

        def move(dims: Sequence[frozenset[int]]) -> list[frozenset[int]]:
            new = [UNIT] * len(after)
            for olds, news in groups:
                for d in news:
                    new[d] = UNIT.union(*(dims[o] for o in olds))
            return new

        return [_moved(values[0], move)]

    def on_concatenate(self, eqn: Any, values: list[Value]) -> list[Value]:
        return self.consume(eqn, values) if DATA in values else [_union(values)]

    def on_stack(self, eqn: Any, values: list[Value]) -> list[Value]:
        at = eqn.params["axis"]
        if DATA in values:
            return self.consume(eqn, values)
        return [_moved(_union(values), lambda dims: [*dims[:at], UNIT, *dims[at:]])]

    def on_all_gather(self, eqn: Any, values: list[Value]) -> list[Value]:
        return values if eqn.params["tiled"] else self.consume(eqn, values)

    def on_stop_gradient(self, eqn: Any, values: list[Value]) -> list[Value]:
        self.consume(eqn, values, lambda *_: "its gradient is stopped")
        (value,) = values
        return [tuple(dataclasses.replace(p, stopped=True) for p in value) if not isinstance(value, str) else value]

    # Calls and control flow: follow the weight inside.

    def on_jit(self, eqn: Any, values: list[Value]) -> list[Value]:
        return self.inner(eqn.params["jaxpr"], values)

    on_pjit = on_remat2 = on_checkpoint = on_compute_on = on_shard_map = on_jit

    def on_custom_jvp_call(self, eqn: Any, values: list[Value]) -> list[Value]:
        return self.inner(eqn.params["call_jaxpr"], values)

    on_custom_vjp_call = on_custom_jvp_call

    def on_cond(self, eqn: Any, values: list[Value]) -> list[Value]:
        results = [self.inner(branch, values[1:]) for branch in eqn.params["branches"]]
        return [self.one_of(eqn, choices) for choices in zip(*results, strict=True)]

    def one_of(self, eqn: Any, choices: Sequence[Value]) -> Value:
        """What a branch returns: a weight, or one of several; among activations it is consumed."""
        if all(v == choices[0] for v in choices):
            return choices[0]
        return self.consume(eqn, list(choices))[0] if DATA in choices else _union(choices)

    def on_while(self, eqn: Any, values: list[Value]) -> list[Value]:
        p = eqn.params
        n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
        body, _ = _compat.open_jaxpr(p["body_jaxpr"])
        carry = self.carry(eqn, values[n_cond + n_body :], body.invars[n_body:], body.outvars)
        self.inner(p["cond_jaxpr"], [*values[:n_cond], *carry])
        self.inner(p["body_jaxpr"], [*values[n_cond : n_cond + n_body], *carry])
        return carry

    def on_scan(self, eqn: Any, values: list[Value]) -> list[Value]:
        n_consts, n_carry = _compat.scan_split(eqn.params)
        jaxpr, _ = _compat.open_jaxpr(eqn.params["jaxpr"])
        carry = self.carry(eqn, values[n_consts : n_consts + n_carry], jaxpr.invars[n_consts:], jaxpr.outvars)
        stacked = values[n_consts + n_carry :]
        slices = [_moved(v, lambda dims: dims[1:]) for v in stacked]
        results = self.inner(eqn.params["jaxpr"], [*values[:n_consts], *carry, *slices])
        lead = {probe.path: probe.dims[0] for v in stacked if not isinstance(v, str) for probe in v}
        return [*carry, *(_restacked(v, lead) for v in results[n_carry:])]

    def carry(self, eqn: Any, init: list[Value], invars: Any, outvars: Any) -> list[Value]:
        """A loop's carried values: a weight that every iteration hands on is still that weight."""
        kept: list[Value] = []
        for value, before, after in zip(init, invars, outvars, strict=False):
            if not isinstance(value, str) and before is not after:
                self.consume(eqn, [value])
            kept.append(value if before is after else DATA)
        return kept


def _axes(probe: _Probe, contracted: Sequence[int], batch: Sequence[int]) -> Axes | str:
    """The weight's axes when these dimensions of the probe are contracted or batch, or why there are none."""
    inputs = UNIT.union(*(probe.dims[d] for d in contracted))
    stacked = UNIT.union(*(probe.dims[d] for d in batch))
    free = [probe.dims[d] for d in range(len(probe.dims)) if d not in (*contracted, *batch)]
    outputs = UNIT.union(*free)
    if inputs & outputs or inputs & stacked or outputs & stacked:
        return "a part of one axis is contracted and another part is kept"
    if not inputs or not outputs:
        return "it is contracted whole: a vector, not a matrix" if inputs else "nothing of it is contracted"
    rest = frozenset(range(probe.ndim)) - inputs - outputs
    return Axes(tuple(sorted(rest)), tuple(sorted(inputs)), tuple(sorted(outputs)))


def _moved(value: Value, move: Callable[[Sequence[frozenset[int]]], Sequence[frozenset[int]]]) -> Value:
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=tuple(move(p.dims))) for p in value)


def _broadcast(value: Value, before: Sequence[int], after: Sequence[int], place: Sequence[int] | None = None) -> Value:
    """A weight whose dimensions, by default its last ones, lie at ``place``; one spread from size 1 holds no axis."""
    place = range(len(after) - len(before), len(after)) if place is None else place
    olds = {new: old for old, new in enumerate(place) if before[old] == after[new]}
    return _moved(value, lambda dims: [dims[olds[d]] if d in olds else UNIT for d in range(len(after))])


def _restacked(value: Value, lead: dict[Path, frozenset[int]]) -> Value:
    """What a scan hands on at every step: slices of a stacked weight are that stack again."""
    if isinstance(value, str):
        return value
    return tuple(dataclasses.replace(p, dims=(lead.get(p.path, UNIT), *p.dims)) for p in value)


def _union(values: Sequence[Value]) -> Value:
    return tuple(dict.fromkeys(p for v in values if not isinstance(v, str) for p in v))
