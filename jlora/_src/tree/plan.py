"""`plan`: which weights a config adapts, and how; every mistake in the patterns is found here."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import jax.numpy as jnp

from jlora._src import paths
from jlora._src.config import HEADS, LoraConfig
from jlora._src.table import table
from jlora._src.tree.state import is_linen, state
from jlora._src.types import NO_FORM, Axes, Path, PyTree, Target, Use, Uses, WeightUse


class Plan(dict[Path, Target]):
    """``{path: Target}`` in the tree's order; prints as a readable table.

    Attributes:
      total: number of parameters in the tree.
      left_out: ``{path: why}`` for what a product consumes and gets no adapter (excluded, integer or complex, state, or
        without a gradient), and for tables that are looked up, matrices that are used oddly, and unread leaves.
    """

    def __init__(self, targets: dict[Path, Target], total: int, left_out: dict[Path, str]):
        super().__init__(targets)
        self.total = total
        self.left_out = left_out

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(t.trainable for t in self.values())

    def __str__(self) -> str:
        header = ("weight", "shape", "adapter", "trainable", "used by")
        lines = [table(header, (t.describe() for t in self.values()), right=(3,))]
        share = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable: {self.trainable:,} of {self.total:,} ({share:.2f}%)")
        lines += [f"left out: {path} ({why})" for path, why in self.left_out.items()]
        return "\n".join(lines)


def plan(params: PyTree, config: LoraConfig, uses: Uses | None = None) -> Plan:
    """What `init` would make: a `Target` for every weight that ``config`` adapts or trains whole.

    Without ``uses`` only 2-D leaves named by explicit targets can be adapted, with axis 0 as their input.

    >>> print(jlora.plan(params, config, uses))

    Args:
      params: the parameters, or their shapes.
      config: what to adapt.
      uses: from `trace`.

    Raises:
      ValueError: naming every pattern that matches nothing (with the closest paths), every target that is no
        floating matrix, is never read, or has a shape that only ``uses`` can explain; and a config that
        leaves nothing to train.
    """
    leaves, _ = paths.named_leaves(params)
    leaves = {p: x for p, x in leaves.items() if hasattr(x, "shape") and hasattr(x, "dtype")}
    chooser = _Chooser(leaves, config, uses, params)
    targets: dict[Path, Target] = {}
    for path, leaf in leaves.items():
        if (target := chooser.choose(path, leaf)) is not None:
            targets[path] = target
    chooser.check(targets)
    return Plan(targets, sum(math.prod(x.shape) for x in leaves.values()), chooser.left_out)


class _Chooser:
    """One pass over the leaves, which keeps what matched and what is wrong."""

    def __init__(self, leaves: dict[Path, Any], config: LoraConfig, uses: Uses | None, params: PyTree):
        self.leaves, self.config, self.uses = leaves, config, uses
        self.state, self.collections = state(params), is_linen(params)
        self.left_out: dict[Path, str] = {}
        self.wrong: list[str] = []
        self.refused: dict[Path, str] = {}
        self.too_high: list[str] = []
        if config.targets == "all-linear" and uses is None:
            self.wrong.append(
                'targets="all-linear" needs uses=jlora.trace(fn, params, batch), which finds the linear weights; '
                "or name the weights with patterns"
            )
        if uses is not None and (unknown := [p for p in leaves if _floating(leaves[p]) and p not in uses]):
            self.wrong.append(f"uses come from another tree: they lack {unknown[:5]}")

    def choose(self, path: Path, leaf: Any) -> Target | None:
        if _matches(self.config.train_also, path):
            return self.trained(path, leaf)
        use = None if self.uses is None else self.uses.get(path)
        if self.config.targets == "all-linear":
            if (why := self.unwanted(path, leaf, use)) is not None:
                self.left_out |= {path: why} if why else {}
                return None
        elif not _matches(self.config.targets, path):
            return None
        if _matches(self.config.exclude, path):
            self.left_out[path] = "excluded"
            return None
        axes = self.axes(path, leaf, use)
        return None if axes is None else self.adapted(path, leaf, axes, use)

    def unwanted(self, path: Path, leaf: Any, use: WeightUse | None) -> str | None:
        """Why ``"all-linear"`` does not take a leaf, or ``""`` where nobody would expect it to; None if it does."""
        if use is None:
            return ""
        if use.kind in ("matmul", "lookup"):
            if path in self.state:
                return self.state[path]
            if self.collections and not path.startswith("params/"):
                return "in another collection than params; name it in targets to adapt it"
            if not _floating(leaf):
                return f"{leaf.dtype}, {_verb(use)}; {_way_out(leaf)}"
            return None if use.kind == "matmul" else f"{_verb(use)}; name it in targets to adapt it"
        expected = use.kind in ("unread", "stopped") or _odd(leaf, use)
        return _verb(use) if expected and path not in self.state else ""

    def axes(self, path: Path, leaf: Any, use: WeightUse | None) -> Axes | None:
        """The axes of a wanted weight; None when it cannot be adapted, with the reason kept."""
        shape = f"of shape {tuple(leaf.shape)} and dtype {leaf.dtype}"
        if path in self.state:
            self.refused[path] = f"{shape} is no parameter ({self.state[path]})"
        elif not _floating(leaf) or len(leaf.shape) < 2:
            way_out = f"; {_way_out(leaf)}" if len(leaf.shape) > 1 else ""
            self.refused[path] = f"{shape} is no floating matrix{way_out}"
        elif use is None and len(leaf.shape) > 2:
            self.refused[path] = (
                f"{shape} is ambiguous: which axes are inputs? Pass uses=jlora.trace(fn, params, batch)"
            )
        elif use is not None and (use.kind in ("unread", "stopped") or use.axes is None):
            self.refused[path] = f"{shape}: {_verb(use)}"
        else:
            return Axes() if use is None else use.axes
        return None

    def trained(self, path: Path, leaf: Any) -> Target | None:
        """A leaf that ``train_also`` matches; state stays as it is, and is named."""
        if path in self.state:
            self.left_out[path] = self.state[path]
        elif _floating(leaf):
            return self.whole(path, leaf)
        else:
            self.wrong.append(f"train_also matches {path!r} of dtype {leaf.dtype}; expected a floating leaf")
        return None

    def adapted(self, path: Path, leaf: Any, axes: Axes, use: WeightUse | None) -> Target:
        config = self.config.for_path(path)
        batch, inputs, outputs = (math.prod(sizes) for sizes in axes.sizes(leaf.shape))
        if config.rank > min(inputs, outputs):
            self.too_high.append(f"{path!r}: rank {config.rank}, min(fan_in, fan_out) = {min(inputs, outputs)}")
        trainable = batch * (config.rank * (inputs + outputs) + (outputs if config.use_dora else 0))
        return Target(
            path, tuple(leaf.shape), leaf.dtype, axes, config.rank, config.scale, config.dropout,
            config.use_dora, trainable, "" if use is None else _verb(use),
            lookup=use is not None and use.kind == "lookup",
        )  # fmt: skip

    def whole(self, path: Path, leaf: Any) -> Target:
        size = math.prod(leaf.shape)
        return Target(path, tuple(leaf.shape), leaf.dtype, None, 0, 1.0, 0.0, False, size, "train_also")

    def check(self, targets: dict[Path, Target]) -> None:
        """Raises one ValueError with everything that is wrong."""
        config, wrong = self.config, list(self.wrong)
        for pattern in () if isinstance(config.targets, str) else config.targets:
            hits = [p for p in self.leaves if re.search(pattern, p)]
            if not hits:
                wrong.append(f"target {pattern!r} matches no weight{paths.nearest(pattern, self.leaves)}")
            elif not any(p in targets or self.left_out.get(p) == "excluded" for p in hits):
                wrong += [
                    f"target {pattern!r} matches {p!r}, which {self.refused.get(p, 'train_also takes')}" for p in hits
                ]
            else:
                matrices = [p for p in hits if p in self.refused and len(self.leaves[p].shape) > 1]
                self.left_out |= {p: self.refused[p] for p in matrices}
        ambiguous = [p for p, why in self.refused.items() if "ambiguous" in why]
        wrong += [f"{p!r} {self.refused[p]}" for p in ambiguous if not any(repr(p) in w for w in wrong)]
        for name, patterns, pool in (
            ("train_also", config.train_also, self.leaves),
            ("exclude", () if config.exclude == HEADS else config.exclude, self.leaves),
            (
                "override",
                tuple(r.pattern for r in config.overrides),
                [p for p, t in targets.items() if t.axes is not None],
            ),
        ):
            wrong += [
                f"{name} {pattern!r} matches no {'adapted ' if name == 'override' else ''}weight"
                f"{paths.nearest(pattern, pool)}"
                for pattern in patterns
                if not any(re.search(pattern, p) for p in pool)
            ]
        for pattern in config.train_also:
            hits = [p for p in self.leaves if re.search(pattern, p)]
            if hits and all(p in self.state for p in hits):
                wrong += [f"train_also {pattern!r} matches {p!r}, which is {self.state[p]}" for p in hits]
        if not targets and not wrong:
            wrong.append(
                f"nothing is left to train among {len(self.leaves)} leaves"
                + paths.bullets(f"{p}: {why}" for p, why in self.left_out.items())
            )
        if wrong:
            raise ValueError(
                f"plan: {len(wrong)} problem(s) with what is to be adapted:{paths.bullets(wrong)}\n"
                "Expected patterns that each match a floating matrix of the params; print jlora.trace(...) to see "
                "every path and how it is used."
            )
        if self.too_high:
            warnings.warn(
                f"plan: the rank is above what {len(self.too_high)} weight(s) can have:"
                f"{paths.bullets(self.too_high)}\nTheir updates are not low-rank, and cost more than the weights "
                "themselves. Lower it with a Override.",
                stacklevel=4,
            )


def _matches(patterns: Any, path: Path) -> bool:
    return not isinstance(patterns, str) and any(re.search(p, path) for p in patterns)


def _way_out(leaf: Any) -> str:
    """How a weight that is no floating one can be adapted."""
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return "to adapt it, keep its real and imaginary parts as two leaves"
    return "to adapt it, attach to the dequantized tree, inside the loss"


def _floating(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _counting(use: WeightUse) -> Use:
    """The use by which one says what a weight is for: the first that a gradient passes, if there is one."""
    return (use.learning or use.uses)[0]


def _odd(leaf: Any, use: WeightUse) -> bool:
    """Whether a matrix is consumed by something that is neither a product nor a bias or scale of activations."""
    matrix = sum(size > 1 for size in leaf.shape) > 1
    if not matrix or use.kind != "other":
        return False
    one = _counting(use)
    return one.note != NO_FORM or one.primitive not in ("add", "sub", "mul", "div")


def _verb(use: WeightUse) -> str:
    """How a weight is consumed, in a word or two for a person."""
    match use.kind:
        case "unread":
            return "never read"
        case "stopped":
            direct = all(u.primitive == "stop_gradient" for u in use.uses)
            used = next((u.primitive for u in use.uses if u.primitive != "stop_gradient"), "")
            return "behind stop_gradient" if direct else f"{used}, but no gradient of a result reaches it"
        case "other":
            return f"consumed by {_counting(use).primitive}: {_counting(use).note}"
    axes = use.axes
    word = "looked up" if use.kind == "lookup" else next(u.primitive for u in use.uses if u.axes == axes)
    flipped = ", transposed too" if use.flipped else ""
    return word + flipped + (", materialized for some uses" if use.materialized else "")
