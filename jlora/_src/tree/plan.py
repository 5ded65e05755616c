"""`plan`: which weights a config adapts, and how. Reports every mistake in its patterns."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp

from jlora._src.config import HEADS, LoraConfig
from jlora._src.paths import named_leaves
from jlora._src.quantized import QuantizedArray
from jlora._src.tree.state import is_linen, state
from jlora._src.types import NO_FORM, Axes, Path, PyTree, Target, Use, Uses, WeightUse
from jlora.messages import bullets, nearest, table


class Plan(dict[Path, Target]):
    """``{path: Target}`` in the tree's order, for `init`; prints as a readable table.

    Attributes:
      config: the config behind it.
      total: the number of parameters in the tree.
      left_out: ``{path: why}`` for weights of products that get no adapter (excluded, integer or complex, state, or
        without a gradient), for tables that are looked up, matrices with an unusual use, and unread leaves.
    """

    def __init__(self, targets: dict[Path, Target], config: LoraConfig, total: int, left_out: dict[Path, str]):
        super().__init__(targets)
        self.config = config
        self.total = total
        self.left_out = left_out

    @property
    def trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(t.trainable for t in self.values())

    def __str__(self) -> str:
        header = ("weight", "shape", "adapter", "trainable", "used by")
        lines = [table(header, (t.describe() for t in self.values()), right=(3,))]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} ({share:.2f}%)")
        lines += [f"left out: {path} ({why})" for path, why in self.left_out.items()]
        return "\n".join(lines)


def plan(params: PyTree, config: LoraConfig, uses: Uses | None = None) -> Plan:
    """A `Target` for every weight that ``config`` adapts or trains whole, for `init`.

    Without ``uses``, only 2-D leaves named by explicit targets can be adapted, with axis 0 as their input.

    >>> plan = jlora.plan(params, config, jlora.trace(model.apply, params, batch))
    >>> print(plan)
    >>> adapters = jlora.init(key, params, plan)

    Args:
      params: the parameters, or their shapes.
      config: what to adapt.
      uses: from `trace`.

    Raises:
      ValueError: listing every pattern that matches nothing (with the closest paths), every target that is not a
        floating matrix, is never read, or has a shape that only ``uses`` can explain; or if nothing is left to train.
      TypeError: if the config or the uses are of another kind, as when two arguments are swapped.
    """
    _check_types(config, uses)
    leaves, _ = named_leaves(params)
    leaves = {p: x for p, x in leaves.items() if hasattr(x, "shape") and hasattr(x, "dtype")}
    choose = _Chooser(config, uses, state(params), is_linen(params))
    choices = {path: choose(path, leaf) for path, leaf in leaves.items()}
    targets = {path: choice for path, choice in choices.items() if isinstance(choice, Target)}
    left_out = {path: no.why for path, no in choices.items() if isinstance(no, _No) and no.listed}
    of_patterns = [
        *(f"{path!r}: {no.why}" for path, no in choices.items() if isinstance(no, _No) and no.error == "always"),
        *_wrong_targets(config, choices),
        *_unmatched(config, choices, leaves),
        *_state_alone(config, choose.state, leaves),
    ]
    wrong = [*_wrong_uses(config, uses, leaves), *of_patterns]
    if not targets and not wrong:
        reasons = bullets(f"{path}: {why}" for path, why in left_out.items())
        wrong = [f"nothing is left to train among {len(leaves)} leaves{reasons}"]
    if wrong:
        hint = (
            "\nExpected each pattern to match a floating matrix of the params, or, in train_also, a floating leaf. "
            'print(*jlora.trace(fn, params, batch), sep="\\n") lists their paths.'
        )
        text = f"plan: {len(wrong)} problem(s) with the config for these params:{bullets(wrong)}"
        raise ValueError(text + (hint if of_patterns else ""))
    _warn_of_ranks(targets)
    _warn_of_no_updates(config, targets, left_out)
    return Plan(targets, config, sum(math.prod(x.shape) for x in leaves.values()), left_out)


def _check_types(config: Any, uses: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"plan: got a {type(config).__name__} as the config; expected a jlora.LoraConfig, as in "
            "jlora.plan(params, config, uses)"
        )
    if uses is not None and not (
        isinstance(uses, Mapping) and all(isinstance(use, WeightUse) for use in uses.values())
    ):
        raise TypeError(
            f"plan: got a {type(uses).__name__} as the uses; expected those of jlora.trace(fn, params, batch)"
        )


class _No(NamedTuple):
    """The reason not to train a leaf.

    Attributes:
      why: the reason, for a person.
      error: whether that is an error: never, always, or only ``alone``: if its pattern matches nothing that trains.
      listed: whether it is in `Plan.left_out`.
    """

    why: str
    error: Literal["never", "alone", "always"] = "never"
    listed: bool = True


_EXCLUDED = _No("excluded")
_Choice: TypeAlias = Target | _No | None
"""The decision about a leaf; None for one that nobody would look for in the plan."""


class _Chooser(NamedTuple):
    """Chooses for one leaf at a time.

    Attributes:
      config, uses: as given to `plan`.
      state: ``{path: what it is}`` for leaves that are state, not parameters.
      linen: whether the tree has Linen's variable collections.
    """

    config: LoraConfig
    uses: Uses | None
    state: Mapping[Path, str]
    linen: bool

    def __call__(self, path: Path, leaf: Any) -> _Choice:
        if _matches(self.config.train_also, path):
            return self.whole(path, leaf)
        use = None if self.uses is None else self.uses.get(path)
        if self.config.targets == "all-linear":
            if use is None or not self.is_notable(path, leaf, use):
                return None
            if (why := self.why_not_linear(path, leaf, use)) is not None:
                return _No(why)
        elif not _matches(self.config.targets, path):
            return None
        return _EXCLUDED if _matches(self.config.exclude, path) else self.adapted(path, leaf, use)

    def is_notable(self, path: Path, leaf: Any, use: WeightUse) -> bool:
        """Whether a reader would look for the leaf in the plan: not biases, scales, state."""
        if use.kind in ("matmul", "lookup"):
            return True
        return path not in self.state and (use.kind in ("unread", "stopped") or _is_unusual(leaf, use))

    def why_not_linear(self, path: Path, leaf: Any, use: WeightUse) -> str | None:
        """Why ``"all-linear"`` does not adapt a leaf; None if it does."""
        if use.kind not in ("matmul", "lookup"):
            return _used_by(use)
        if path in self.state:
            return self.state[path]
        if self.linen and not path.startswith("params/"):
            return "in another collection than params; name it in targets to adapt it"
        if not _is_floating(leaf):
            return f"{leaf.dtype}, {_used_by(use)}; {_instead(leaf)}"
        return None if use.kind == "matmul" else f"{_used_by(use)}; name it in targets to adapt it"

    def adapted(self, path: Path, leaf: Any, use: WeightUse | None) -> Target | _No:
        """The target of a leaf that matches the config's targets."""
        matrix = len(leaf.shape) > 1

        def no(why: str, error: Literal["alone", "always"] = "alone") -> _No:
            return _No(f"shape {tuple(leaf.shape)}, dtype {leaf.dtype}: {why}", error, listed=matrix)

        if path in self.state:
            return no(f"not a parameter ({self.state[path]})")
        if not _is_floating(leaf) or not matrix:
            return no("not a floating matrix" + (f"; {_instead(leaf)}" if matrix else ""))
        if use is None:
            if len(leaf.shape) > 2:
                return no("ambiguous: which axes are inputs? Pass uses=jlora.trace(fn, params, batch)", "always")
            return _target(path, leaf, Axes(), self.config.for_path(path))
        if use.kind in ("unread", "stopped") or use.axes is None:
            return no(_used_by(use))
        return _target(path, leaf, use.axes, self.config.for_path(path), use)

    def whole(self, path: Path, leaf: Any) -> Target | _No:
        """The target of a leaf that ``train_also`` matches. State is left out."""
        if path in self.state:
            return _No(self.state[path])
        if not _is_floating(leaf):
            return _No(f"dtype {leaf.dtype}; train_also expects a floating leaf", "always", listed=False)
        size = math.prod(leaf.shape)
        return Target(
            path, tuple(leaf.shape), leaf.dtype, None, 0, 1.0, 0.0, False, size, "train_also", scheme=_scheme(leaf)
        )


def _target(path: Path, leaf: Any, axes: Axes, config: LoraConfig, use: WeightUse | None = None) -> Target:
    batch, inputs, outputs = (math.prod(sizes) for sizes in axes.sizes(leaf.shape))
    trainable = batch * (config.rank * (inputs + outputs) + (outputs if config.use_dora else 0))
    return Target(
        path, tuple(leaf.shape), leaf.dtype, axes, config.rank, config.scale, config.dropout,
        config.use_dora, trainable, "" if use is None else _used_by(use),
        lookup=use is not None and use.kind == "lookup", scheme=_scheme(leaf),
    )  # fmt: skip


def _scheme(leaf: Any) -> str:
    return leaf.scheme if isinstance(leaf, QuantizedArray) else ""


def _wrong_uses(config: LoraConfig, uses: Uses | None, leaves: Mapping[Path, Any]) -> Iterable[str]:
    if uses is None:
        if config.targets == "all-linear":
            yield (
                'targets="all-linear" needs uses=jlora.trace(fn, params, batch), which finds the linear weights; or '
                "name the weights by patterns"
            )
    elif unknown := [p for p in leaves if _is_floating(leaves[p]) and p not in uses]:
        yield f"uses come from another tree: they lack {unknown[:5]}; trace with the params that are given here"


def _wrong_targets(config: LoraConfig, choices: Mapping[Path, _Choice]) -> Iterable[str]:
    """Targets that match nothing, or nothing that can be adapted."""
    for pattern in () if isinstance(config.targets, str) else config.targets:
        matched = {path: choice for path, choice in choices.items() if re.search(pattern, path)}
        if not matched:
            yield f"target {pattern!r} matches no weight{nearest(pattern, choices)}"
        elif not any(isinstance(choice, Target) or choice is _EXCLUDED for choice in matched.values()):
            for path, choice in matched.items():
                if isinstance(choice, _No) and choice.error != "always":
                    yield f"target {pattern!r} matches {path!r}: {choice.why}"


def _unmatched(config: LoraConfig, choices: Mapping[Path, _Choice], leaves: Mapping[Path, Any]) -> Iterable[str]:
    """The other patterns that match nothing."""
    adapted = [path for path, choice in choices.items() if isinstance(choice, Target) and choice.axes is not None]
    overrides = tuple(override.pattern for override in config.overrides)
    excluded = () if config.exclude == HEADS else config.exclude
    for name, patterns, what, pool in (
        ("train_also", config.train_also, "weight", leaves),
        ("exclude", excluded, "weight", leaves),
        ("override", overrides, "adapted weight", adapted),
    ):
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in pool):
                found = [path for path in leaves if re.search(pattern, path)]
                instead = f": {found[0]!r} is {_state_of(choices[found[0]])}" if found else nearest(pattern, pool)
                yield f"{name} {pattern!r} matches no {what}{instead}"


def _state_of(choice: _Choice) -> str:
    """What becomes of a leaf that is not adapted, in a few words."""
    if isinstance(choice, Target):
        return "trained whole"
    return "not a target" if choice is None else choice.why


def _state_alone(config: LoraConfig, state: Mapping[Path, str], leaves: Mapping[Path, Any]) -> Iterable[str]:
    """Patterns of ``train_also`` that match nothing but state."""
    for pattern in config.train_also:
        matched = [path for path in leaves if re.search(pattern, path)]
        if matched and all(path in state for path in matched):
            yield from (f"train_also {pattern!r} matches {path!r}, which is {state[path]}" for path in matched)


def _warn_of_ranks(targets: Mapping[Path, Target]) -> None:
    too_high = []
    for path, target in targets.items():
        if target.axes is not None:
            _, inputs, outputs = (math.prod(sizes) for sizes in target.axes.sizes(target.shape))
            if target.rank > min(inputs, outputs):
                too_high.append(f"{path!r}: rank {target.rank}, min(fan_in, fan_out) = {min(inputs, outputs)}")
    if too_high:
        warnings.warn(
            f"plan: the rank exceeds that of {len(too_high)} weight(s):{bullets(too_high)}\nTheir updates are not "
            "low-rank, and cost more than the weights themselves. Lower the rank with an Override.",
            stacklevel=3,
        )


def _warn_of_no_updates(config: LoraConfig, targets: Mapping[Path, Target], left_out: Mapping[Path, str]) -> None:
    if config.targets == "all-linear" and all(target.axes is None for target in targets.values()):
        warnings.warn(
            f'plan: targets="all-linear" adapts no weight; only {len(targets)} leaves of train_also are trained. Left '
            f"out:{bullets(f'{path}: {why}' for path, why in left_out.items())}\nIf they are never read, the traced "
            "function closes over its parameters: pass it the tree. To train only these leaves, set targets=().",
            stacklevel=3,
        )


def _matches(patterns: Iterable[str], path: Path) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def _instead(leaf: Any) -> str:
    """How to adapt a weight that is not floating."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return "to adapt it, keep its real and imaginary parts as two leaves"
    return "to adapt it, make it a jlora.QuantizedArray, or attach to the dequantized tree, inside the loss"


def _is_floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _main_use(use: WeightUse) -> Use:
    """A weight's defining use: the first through which a gradient reaches it, if any."""
    return (use.learning or use.uses)[0]


def _is_unusual(leaf: Any, use: WeightUse) -> bool:
    """Whether a matrix is consumed other than by a product, and is not a bias or scale of activations."""
    matrix = sum(size > 1 for size in leaf.shape) > 1
    if not matrix or use.kind != "other":
        return False
    main = _main_use(use)
    return main.note != NO_FORM or main.primitive not in ("add", "sub", "mul", "div")


def _used_by(use: WeightUse) -> str:
    """How a weight is consumed, in a few words."""
    match use.kind:
        case "unread":
            return "never read"
        case "stopped":
            direct = all(u.primitive == "stop_gradient" for u in use.uses)
            used = next((u.primitive for u in use.uses if u.primitive != "stop_gradient"), "")
            return "behind stop_gradient" if direct else f"{used}, but no gradient of a result reaches it"
        case "other":
            return f"consumed by {_main_use(use).primitive}: {_main_use(use).note}"
    axes = use.axes
    word = "looked up" if use.kind == "lookup" else next(u.primitive for u in use.uses if u.axes == axes)
    flipped = ", transposed too" if use.flipped else ""
    return word + flipped + (", materialized for some uses" if use.materialized else "")
