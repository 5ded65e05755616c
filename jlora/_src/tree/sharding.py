"""Shards parameters over a mesh by rules on their paths; adapters follow their weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jlora._src.paths import named_leaves
from jlora._src.quantized import QuantizedArray
from jlora._src.tree.checks import check_kinds, check_paths
from jlora._src.types import Adapters, FullWeight, LoraFactors, LoraWeight, Path, PyTree, is_attached
from jlora.fields import bad_pattern
from jlora.messages import bullets, nearest

ShardingRules: TypeAlias = Sequence[tuple[str, PartitionSpec]]
"""``(pattern, spec)`` pairs: the first pattern that matches (`re.search`) the ``/``-joined path of a leaf applies."""


def shardings(params: PyTree, mesh: Mesh, rules: ShardingRules) -> PyTree:
    """A sharding for each leaf, by the first rule whose pattern its path matches.

    >>> mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    >>> rules = ((r"/kernel$", P("fsdp", "tensor")), (r"/(bias|scale)$", P()))
    >>> params = jax.device_put(params, jlora.shardings(params, mesh, rules))

    Args:
      params: the parameters, or their shapes.
      mesh: with the axes that the specs name; axes of size 1 split nothing.
      rules: for all leaves; end with ``(r"", P())`` to replicate the rest.

    Returns:
      A tree of `NamedSharding` like ``params``, with each rule's spec. A quantized leaf has one for each array: scales
      are split with their blocks, or not at all along an axis where a block would be split.

    Raises:
      ValueError: listing every leaf that no rule matches, every rule that applies to no leaf, every spec that is longer
        than its leaf's shape, names an axis that the mesh lacks, or repeats an axis, and every size that its mesh axes
        do not divide.
    """
    leaves, treedef = named_leaves(params)
    wrong = [f"rule {problem}" for pattern, _ in rules if (problem := bad_pattern(pattern))]
    applied = {} if wrong else {path: _first(rules, path) for path in leaves}
    if not wrong:
        wrong = [*_unmatched(leaves, applied, rules), *_idle(applied, rules), *_bad_specs(mesh, rules)]
        wrong += _uneven(leaves, applied, mesh, rules)
    if wrong:
        raise ValueError(
            f"shardings: {len(wrong)} problem(s) with the rules on {_axes_of(mesh)}:{bullets(wrong)}\nExpected a rule "
            "for each leaf (the first match applies), a leaf for each rule, and axes that their mesh axes divide: "
            "change the rule, put a rule for that path before it, or use a mesh of another shape."
        )
    places = {path: NamedSharding(mesh, rules[i][1]) for path, i in applied.items() if i is not None}
    return treedef.unflatten([quantized_shardings(leaves[path], place) for path, place in places.items()])


def quantized_shardings(leaf: Any, place: Any) -> Any:
    """The shardings of the arrays of a quantized leaf placed at ``place``: an axis of scales that the mesh axes do not
    divide is replicated. Of any other leaf, ``place`` itself."""
    if not isinstance(leaf, QuantizedArray) or not isinstance(place, NamedSharding):
        return jax.tree.map(lambda _: place, leaf) if isinstance(leaf, QuantizedArray) else place

    def follow(part: Any) -> Any:
        parts = [math.prod(place.mesh.shape[name] for name in _mesh_axes(entry)) for entry in place.spec]
        fits = [e if size % n == 0 else None for size, e, n in zip(part.shape, place.spec, parts, strict=False)]
        return NamedSharding(place.mesh, PartitionSpec(*fits), memory_kind=place.memory_kind)

    return jax.tree.map(follow, leaf)


def adapter_shardings(adapters: Adapters | PyTree, shardings: PyTree) -> Any:
    """Shardings for adapters: each factor is split like the axes of its weight that it follows.

    A is split like the weight's batch and input axes, B and DoRA's magnitude like its batch and output axes; the rank
    is not split. A leaf trained whole is sharded like its weight.

    >>> start = lambda: jlora.init(jax.random.key(0), params, plan)
    >>> own = jlora.adapter_shardings(jax.eval_shape(start), jlora.shardings(params, mesh, rules))
    >>> adapters = jax.jit(start, out_shardings=own)()

    For an attached tree, the result covers all leaves: weights as in ``shardings``, strengths and dropout keys
    replicated. Flax's boxes are kept: pass ``flax.linen.get_sharding(params, mesh)`` of the boxed params.

    >>> step = jax.jit(step, in_shardings=jlora.adapter_shardings(tree, jlora.shardings(params, mesh, rules)))

    Args:
      adapters: as from `init`, or an attached tree; or their shapes.
      shardings: of the weights: a tree of `NamedSharding` like the params, or one `NamedSharding` for all.

    Returns:
      A tree of `NamedSharding` like ``adapters``, for ``in_shardings``, ``out_shardings`` and `jax.device_put`.

    Raises:
      KeyError: listing every path that ``shardings`` lack.
      TypeError: listing every weight whose sharding is not a `NamedSharding` (others do not state how axes are split),
        and every value that is not an adapter.
      ValueError: listing every weight that is not split evenly, or has fewer axes than its spec.
    """
    leaves, treedef = named_leaves(adapters)
    if any(map(is_attached, leaves.values())):
        places = _weight_shardings({path: _trained(leaf) for path, leaf in leaves.items()}, shardings)
        return treedef.unflatten([_follow(leaf, places[path]) for path, leaf in leaves.items()])
    check_kinds(adapters, "adapter_shardings")
    places = _weight_shardings(adapters, shardings)
    return {path: _follow(value, places[path]) for path, value in adapters.items()}


def _trained(leaf: Any) -> Any:
    """The adapter of a leaf of an attached tree; any other leaf is sharded like one trained whole."""
    return leaf.factors if isinstance(leaf, LoraWeight) else leaf.value if isinstance(leaf, FullWeight) else leaf


def _weight_shardings(adapters: Adapters, shardings: PyTree) -> dict[Path, NamedSharding]:
    """The shardings of these adapters' weights, checked."""
    given = dict.fromkeys(adapters, shardings) if isinstance(shardings, Sharding) else named_leaves(shardings)[0]
    check_paths(adapters, given, "adapter_shardings")
    places: dict[Path, Any] = {path: getattr(given[path], "codes", given[path]) for path in adapters}
    if odd := {path: place for path, place in places.items() if not isinstance(place, NamedSharding)}:
        raise TypeError(
            f"adapter_shardings: these weights have no NamedSharding:{bullets(f'{p!r}: {x!r}' for p, x in odd.items())}"
            "\nExpected the result of jlora.shardings(params, mesh, rules), of flax.linen.get_sharding(params, mesh), "
            "or one NamedSharding for all."
        )
    wrong = [
        problem
        for path, place in places.items()
        for problem in _misfits(repr(path), _weight_shape(adapters[path]), place.mesh, place.spec)
    ]
    if wrong:
        raise ValueError(
            f"adapter_shardings: {len(wrong)} weight(s) do not fit their sharding:{bullets(wrong)}\nExpected the "
            "shardings of the weights that these adapters were made for: jlora.shardings(params, mesh, rules)."
        )
    return places


def _follow(leaf: Any, place: NamedSharding) -> Any:
    """An adapter or a leaf of a tree, with shardings in place of its arrays; ``place`` is the weight's."""
    match leaf:
        case LoraFactors():
            return _follow_axes(leaf, place)
        case LoraWeight(factors=f, path=path):
            replicated = NamedSharding(place.mesh, PartitionSpec())
            strength, key = jax.tree.map(lambda _: replicated, (leaf.strength, leaf.dropout_key))
            base: Any = quantized_shardings(leaf.base, place)
            return LoraWeight(base, _follow_axes(f, place), strength, key, path, leaf.split_inputs)
        case FullWeight(path=path):
            base = quantized_shardings(leaf.base, place)
            return FullWeight(base, place, path)  # pyright: ignore[reportArgumentType]
        case _:
            return quantized_shardings(leaf, place)


def _follow_axes(factors: LoraFactors, place: NamedSharding) -> LoraFactors:
    """The same factors, with shardings in place of their arrays."""
    padded: Any = (*place.spec, *(None,) * (sum(map(len, factors.axes)) - len(place.spec)))
    batch, inputs, outputs = factors.axes.sizes(padded)

    def at(*entries: Any) -> Any:
        return NamedSharding(place.mesh, PartitionSpec(*entries))

    magnitude = None if factors.magnitude is None else at(*batch, *outputs)
    return dataclasses.replace(factors, a=at(*batch, *inputs, None), b=at(*batch, None, *outputs), magnitude=magnitude)


def _weight_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of an adapter's weight."""
    if not isinstance(leaf, LoraFactors):
        return np.shape(leaf)
    batch = len(leaf.axes.batch)
    sizes = (*leaf.a.shape[:-1], *leaf.b.shape[batch + 1 :])
    order = (axis for group in leaf.axes for axis in group)
    return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))


def _first(rules: ShardingRules, path: Path) -> int | None:
    """The index of the rule that applies to a leaf."""
    return next((i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)), None)


def _unmatched(leaves: Mapping[Path, Any], applied: Mapping[Path, int | None], rules: ShardingRules) -> Iterable[str]:
    patterns = [pattern for pattern, _ in rules]
    for path, leaf in leaves.items():
        if is_attached(leaf):
            yield f"{path!r} is attached; give the plain params, jlora.detach(tree)[0], then adapter_shardings(tree, …)"
        elif applied[path] is None:
            yield f"{path!r} of shape {np.shape(leaf)} matches no rule{nearest(path, patterns)}"


def _idle(applied: Mapping[Path, int | None], rules: ShardingRules) -> Iterable[str]:
    for i, (pattern, _) in enumerate(rules):
        matched = [path for path in applied if re.search(pattern, path)]
        if not matched:
            yield f"rule {pattern!r} matches no leaf{nearest(pattern, applied)}"
        elif i not in applied.values():
            first = applied[matched[0]]
            assert first is not None
            yield (
                f"rule {pattern!r} applies to no leaf: earlier rules match all of its leaves, such as {matched[0]!r} "
                f"by {rules[first][0]!r}"
            )


def _bad_specs(mesh: Mesh, rules: ShardingRules) -> list[str]:
    """The faults of the specs themselves."""
    wrong = []
    for pattern, spec in rules:
        if not isinstance(spec, PartitionSpec):
            wrong.append(f"rule {pattern!r} has {spec!r}; expected a jax.sharding.PartitionSpec")
            continue
        named = [axis for entry in spec for axis in _mesh_axes(entry)]
        wrong += [
            f"rule {pattern!r} names {axis!r} in {spec}; the mesh has no such axis"
            for axis in dict.fromkeys(named)
            if axis not in mesh.shape
        ]
        wrong += [
            f"rule {pattern!r} names {axis!r} {named.count(axis)} times in {spec}; a mesh axis splits one axis"
            for axis in dict.fromkeys(named)
            if named.count(axis) > 1
        ]
    return wrong


def _uneven(
    leaves: Mapping[Path, Any], applied: Mapping[Path, int | None], mesh: Mesh, rules: ShardingRules
) -> Iterable[str]:
    for path, i in applied.items():
        if i is not None and not _bad_specs(mesh, [rules[i]]):
            pattern, spec = rules[i]
            yield from _misfits(f"{path!r} by rule {pattern!r}", np.shape(leaves[path]), mesh, spec)


def _misfits(where: str, shape: tuple[int, ...], mesh: Any, spec: PartitionSpec) -> list[str]:
    """Why an array of ``shape`` cannot have this spec."""
    if len(spec) > len(shape):
        return [f"{where}: {spec} has {len(spec)} entries for an array of shape {shape}"]
    wrong = []
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        axes = {name: mesh.shape[name] for name in _mesh_axes(entry)}
        if size % (parts := math.prod(axes.values())):
            product = " x ".join(f"{name}={n}" for name, n in axes.items())
            wrong.append(f"{where}: axis {axis} of size {size} is not divisible by {parts} ({product})")
    return wrong


def _mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of one entry of a spec."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _axes_of(mesh: Mesh) -> str:
    return f"the mesh ({', '.join(f'{name}={size}' for name, size in mesh.shape.items())})"
