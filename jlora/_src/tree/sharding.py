"""Where parameters lie on a mesh, by rules on their paths; and their adapters, each as its weight."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jlora._src.paths import bad_pattern, bullets, check_kinds, check_paths, named_leaves, nearest
from jlora._src.types import Adapters, FullWeight, LoraFactors, LoraWeight, Path, PyTree, is_attached

ShardingRules: TypeAlias = Sequence[tuple[str, PartitionSpec]]
"""``(pattern, spec)`` pairs; a pattern is searched (`re.search`) in the ``/``-joined path, and the first match wins."""


def shardings(params: PyTree, mesh: Mesh, rules: ShardingRules) -> PyTree:
    """A sharding for each leaf, by the first rule whose pattern its path matches.

    >>> mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    >>> rules = ((r"/kernel$", P("fsdp", "tensor")), (r"/(bias|scale)$", P()))
    >>> params = jax.device_put(params, jlora.shardings(params, mesh, rules))

    Args:
      params: the parameters, or their shapes.
      mesh: whose axes the specs name; an axis of size 1 splits nothing.
      rules: of all leaves; ``(r"", P())`` at the end takes what is left.

    Returns:
      A tree like ``params`` of `NamedSharding`, each with its ``spec`` as the rule has it.

    Raises:
      ValueError: naming every leaf that no rule takes, every rule that takes no leaf, every spec that is longer than
        its leaf or names an axis that the mesh lacks, or one twice, and every size that its mesh axes do not divide.
    """
    leaves, treedef = named_leaves(params)
    wrong = [f"rule {problem}" for pattern, _ in rules if (problem := bad_pattern(pattern))]
    taker = {} if wrong else {path: _first(rules, path) for path in leaves}
    if not wrong:
        wrong = [*_untaken(leaves, taker, rules), *_idle(taker, rules), *_bad_specs(mesh, rules)]
        wrong += _uneven(leaves, taker, mesh, rules)
    if wrong:
        raise ValueError(
            f"shardings: {len(wrong)} problem(s) with the rules on {_told(mesh)}:{bullets(wrong)}\nExpected each leaf "
            "to be taken by the first rule that matches it, each rule to take a leaf, and the mesh axes of an axis to "
            "divide it: change the rule, put one of your own for that path before it, or use a mesh of another shape."
        )
    return treedef.unflatten([NamedSharding(mesh, rules[i][1]) for i in taker.values() if i is not None])


def adapter_shardings(adapters: Adapters | PyTree, shardings: PyTree) -> Any:
    """Where adapters lie, so that each factor is split as the axes of its weight that it follows.

    A has the weight's batch and input axes, B its batch and output axes, DoRA's magnitude batch and outputs; the rank
    is whole on every device. A leaf that is trained whole lies as its weight does.

    >>> start = lambda: jlora.init(jax.random.key(0), params, config, uses)
    >>> places = jlora.adapter_shardings(jax.eval_shape(start), jlora.shardings(params, mesh, rules))
    >>> adapters = jax.jit(start, out_shardings=places)()

    Of an attached tree, all leaves are told: its weights lie as ``shardings`` say, strengths and dropout keys on every
    device. Flax's boxes stay: ``flax.linen.get_sharding(params, mesh)`` of the boxed params tells where they lie.

    >>> step = jax.jit(step, in_shardings=jlora.adapter_shardings(tree, jlora.shardings(params, mesh, rules)))

    Args:
      adapters: from `init`, or an attached tree; or the shapes of one.
      shardings: of the weights: a tree like the params of `NamedSharding`, or one for all.

    Returns:
      A tree like ``adapters`` of `NamedSharding`, for ``in_shardings``, ``out_shardings`` and `jax.device_put`.

    Raises:
      KeyError: naming every path that ``shardings`` lack.
      TypeError: naming every weight whose sharding is of another kind, which does not tell what splits its axes, and
        every value that is no adapter.
      ValueError: naming every weight that is not split evenly, or has fewer axes than its sharding.
    """
    leaves, treedef = named_leaves(adapters)
    if any(map(is_attached, leaves.values())):
        places = _places({path: _trained(leaf) for path, leaf in leaves.items()}, shardings)
        return treedef.unflatten([_follow(leaf, places[path]) for path, leaf in leaves.items()])
    check_kinds(adapters, "adapter_shardings")
    places = _places(adapters, shardings)
    return {path: _follow(value, places[path]) for path, value in adapters.items()}


def _trained(leaf: Any) -> Any:
    """The adapter of a leaf of an attached tree; any other leaf lies as one that is trained whole."""
    return leaf.factors if isinstance(leaf, LoraWeight) else leaf.value if isinstance(leaf, FullWeight) else leaf


def _places(adapters: Adapters, shardings: PyTree) -> dict[Path, NamedSharding]:
    """The shardings of the weights that these adapters belong to."""
    given = dict.fromkeys(adapters, shardings) if isinstance(shardings, Sharding) else named_leaves(shardings)[0]
    check_paths(adapters, given, "adapter_shardings")
    places: dict[Path, Any] = {path: given[path] for path in adapters}
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
            f"adapter_shardings: {len(wrong)} weight(s) cannot lie so:{bullets(wrong)}\nExpected the shardings of the "
            "weights that these adapters were made for: jlora.shardings(params, mesh, rules)."
        )
    return places


def _follow(leaf: Any, place: NamedSharding) -> Any:
    """An adapter or a leaf of a tree, with shardings in the place of its arrays; its weight lies at ``place``."""
    match leaf:
        case LoraFactors():
            return _follow_axes(leaf, place)
        case LoraWeight(factors=f, path=path):
            everywhere = NamedSharding(place.mesh, PartitionSpec())
            strength, key = jax.tree.map(lambda _: everywhere, (leaf.strength, leaf.dropout_key))
            return LoraWeight(place, _follow_axes(f, place), strength, key, path)
        case FullWeight(path=path):
            return FullWeight(place, place, path)  # pyright: ignore[reportArgumentType]
        case _:
            return place


def _follow_axes(factors: LoraFactors, place: NamedSharding) -> LoraFactors:
    """The same factors, with shardings in the place of their arrays."""
    padded: Any = (*place.spec, *(None,) * (sum(map(len, factors.axes)) - len(place.spec)))
    batch, inputs, outputs = factors.axes.sizes(padded)

    def at(*entries: Any) -> Any:
        return NamedSharding(place.mesh, PartitionSpec(*entries))

    magnitude = None if factors.magnitude is None else at(*batch, *outputs)
    return dataclasses.replace(factors, a=at(*batch, *inputs, None), b=at(*batch, None, *outputs), magnitude=magnitude)


def _weight_shape(leaf: Any) -> tuple[int, ...]:
    """The shape of the weight that an adapter belongs to."""
    if not isinstance(leaf, LoraFactors):
        return np.shape(leaf)
    batch = len(leaf.axes.batch)
    sizes = (*leaf.a.shape[:-1], *leaf.b.shape[batch + 1 :])
    order = (axis for group in leaf.axes for axis in group)
    return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))


def _first(rules: ShardingRules, path: Path) -> int | None:
    """Which rule takes the leaf."""
    return next((i for i, (pattern, _) in enumerate(rules) if re.search(pattern, path)), None)


def _untaken(leaves: Mapping[Path, Any], taker: Mapping[Path, int | None], rules: ShardingRules) -> Iterable[str]:
    patterns = [pattern for pattern, _ in rules]
    for path, leaf in leaves.items():
        if is_attached(leaf):
            yield f"{path!r} is attached; give the plain params, jlora.detach(tree)[0], then adapter_shardings(tree, …)"
        elif taker[path] is None:
            yield f"{path!r} of shape {np.shape(leaf)} is matched by no rule{nearest(path, patterns)}"


def _idle(taker: Mapping[Path, int | None], rules: ShardingRules) -> Iterable[str]:
    for i, (pattern, _) in enumerate(rules):
        matched = [path for path in taker if re.search(pattern, path)]
        if not matched:
            yield f"rule {pattern!r} matches no leaf{nearest(pattern, taker)}"
        elif i not in taker.values():
            first = taker[matched[0]]
            assert first is not None
            yield (
                f"rule {pattern!r} takes no leaf: rules before it take all that it matches, such as {matched[0]!r} by "
                f"{rules[first][0]!r}"
            )


def _bad_specs(mesh: Mesh, rules: ShardingRules) -> list[str]:
    """What is wrong with the specs, whatever the leaves are."""
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
    leaves: Mapping[Path, Any], taker: Mapping[Path, int | None], mesh: Mesh, rules: ShardingRules
) -> Iterable[str]:
    for path, i in taker.items():
        if i is not None and not _bad_specs(mesh, [rules[i]]):
            pattern, spec = rules[i]
            yield from _misfits(f"{path!r} by rule {pattern!r}", np.shape(leaves[path]), mesh, spec)


def _misfits(where: str, shape: tuple[int, ...], mesh: Any, spec: PartitionSpec) -> list[str]:
    """What keeps an array of ``shape`` from being split so."""
    if len(spec) > len(shape):
        return [f"{where}: {spec} has {len(spec)} entries for an array of shape {shape}"]
    wrong = []
    for axis, (size, entry) in enumerate(zip(shape, spec, strict=False)):
        axes = {name: mesh.shape[name] for name in _mesh_axes(entry)}
        if size % (parts := math.prod(axes.values())):
            told = " x ".join(f"{name}={n}" for name, n in axes.items())
            wrong.append(f"{where}: axis {axis} of size {size} is not divisible by {parts} ({told})")
    return wrong


def _mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes that split one axis."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _told(mesh: Mesh) -> str:
    return f"the mesh ({', '.join(f'{name}={size}' for name, size in mesh.shape.items())})"
