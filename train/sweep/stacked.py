"""The adapters of several members as one tree, and what differs between the members as arrays.

Members of one program differ in seed, data, rank, scale, learning rate, weight decay and LoRA+ ratio. Ranks are padded
with zeros, which stay zero: their gradients are. Scales are strengths (`jlora.attach`), because a scale folded into B
would not scale its gradient.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import HEADS, LoraFactors, named_leaves
from train.compute.keys import random_key
from train.job import Job, start_adapters
from train.loop.extend import learning_rates


class Settings(NamedTuple):
    """What a step needs to know of each member: arrays with an axis of members, or None where all have one value.

    Attributes:
      rate: float32 [n], the learning rates of this step.
      active: bool [n], whether a member is trained; the state of one that is not stays as it is.
      decay: float32 [n], weight decay.
      ratio: float32 [n], of LoRA+.
      strength: by path, float32 [n], the scales of the adapters.
    """

    rate: Any
    active: Any
    decay: Any = None
    ratio: Any = None
    strength: Mapping[str, Any] | None = None


def rates_of(jobs: Sequence[Job]) -> np.ndarray:
    """The learning rate of each member in each step, float32 [steps, n]; 0 after a member's last step."""
    rates = []
    for job in jobs:
        config, intervals = job.config, job.intervals(job.config.fit, job.examples)
        peak, planned = getattr(config.learning_rate, config.mode), [[0, config.fit.epochs]]
        rates.append(learning_rates(config.fit, peak, intervals, planned, intervals.steps))
    most = max(map(len, rates))
    return np.stack([np.pad(rate, (0, most - len(rate))) for rate in rates], axis=1)


@dataclass(frozen=True)
class Stacking:
    """How the adapters of members become one tree: the same for all programs of a round.

    Attributes:
      rank: the padded rank by path.
      decay, ratio, strength: the `Settings` that are the same in all steps.
      new: the leaves trained whole that are drawn from a member's seed, see `drawn_heads`.
    """

    rank: Mapping[str, int]
    decay: np.ndarray | None
    ratio: np.ndarray | None
    strength: Mapping[str, np.ndarray] | None
    new: Sequence[str]

    @staticmethod
    def of(jobs: Sequence[Job], new: Sequence[str]) -> Stacking:
        """The stacking of these members."""
        plans = [job.plan for job in jobs]
        scales = {
            path: np.array([plan[path].scale for plan in plans], np.float32)
            for path, target in plans[0].items()
            if target.axes is not None
        }
        differ = any(len({*column}) > 1 for column in scales.values())
        return Stacking(
            rank={path: max(plan[path].rank for plan in plans) for path in plans[0]},
            decay=_if_different([job.config.fit.weight_decay for job in jobs]),
            ratio=_if_different([job.config.fit.lora_plus for job in jobs]),
            strength=scales if differ else None,
            new=new,
        )

    def part(self, kept: Sequence[int]) -> Stacking:
        """The stacking of some of the members."""
        index = np.asarray(kept)
        found = {name: jax.tree.map(lambda x: x[index], getattr(self, name)) for name in ("decay", "ratio", "strength")}
        return dataclasses.replace(self, **found)


def start_stacked(jobs: Sequence[Job], base: Any, stacking: Stacking) -> dict[str, Any]:
    """The adapters from which the members' single runs start, stacked.

    Members with one plan are drawn in one loop over their keys.

    Args:
      base: parameters, or shapes under `jax.eval_shape`.
    """
    groups: list[list[int]] = []
    for i, job in enumerate(jobs):
        same = next((group for group in groups if _is_one_plan(jobs[group[0]].plan, job.plan)), None)
        groups.append([i]) if same is None else same.append(i)
    parts = []
    for group in groups:
        one = jobs[group[0]]

        def start(keys: tuple[jax.Array, jax.Array], one: Job = one) -> dict[str, Any]:
            return start_adapters(one.config, one.network, base, one.plan, keys=keys, new=stacking.new)

        keys = [
            jnp.stack([random_key(jobs[i].config.seed, purpose) for i in group]) for purpose in ("adapters", "head")
        ]
        adapters: dict[str, Any] = jax.lax.map(start, tuple(keys))  # compiles in half the time of a vmap
        parts.append(
            {
                path: _padded(value, stacking.rank[path], stacking.strength is not None)
                for path, value in adapters.items()
            }
        )
    order = np.argsort([i for group in groups for i in group])
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *each: jnp.concatenate(each)[order], parts[0], *parts[1:])


def drawn_heads(job: Job, base: Any) -> list[str]:
    """The leaves of a new head, trained whole, which every member draws from its own seed.

    The checkpoint lacks them if those of the placed ``base`` are what the job's seed gives, up to the rounding of
    another program.
    """
    heads = [p for p, t in job.plan.items() if t.axes is None and any(re.search(one, p) for one in HEADS)]
    if job.network.load is None or not heads:
        return []

    def compare(base: Any) -> list[jax.Array]:
        drawn, found = (named_leaves(x)[0] for x in (job.network.init(random_key(job.config.seed, "head")), base))
        return [jnp.allclose(drawn[path], found[path], rtol=1e-2, atol=1e-6) for path in heads]

    return [path for path, same in zip(heads, job.layout.call(compare, base), strict=True) if bool(same)]


def own_heads(job: Job, base: Any, new: Sequence[str]) -> dict[str, Any] | None:
    """The leaves ``new`` of the base of a member's single run, to attach; None if there are none."""

    def draw(base: Any) -> dict[str, Any]:
        drawn, found = (named_leaves(x)[0] for x in (job.network.init(random_key(job.config.seed, "head")), base))
        return {path: drawn[path].astype(found[path].dtype) for path in new}

    return job.layout.call(draw, base) if new else None


def with_scales(stacked: Mapping[str, Any], strength: Mapping[str, Any] | None) -> dict[str, Any]:
    """The stack with strengths folded into B, in float32: the same updates, to evaluate and not to train."""
    if strength is None:
        return dict(stacked)

    def folded(path: str, value: Any) -> Any:
        if not isinstance(value, LoraFactors):
            return value
        s = jnp.asarray(strength[path]).reshape(-1, *(1,) * (value.b.ndim - 1))
        return dataclasses.replace(value, b=value.b.astype(jnp.float32) * s)

    return {path: folded(path, value) for path, value in stacked.items()}


def own_adapters(job: Job, padded: Mapping[str, Any]) -> dict[str, Any]:
    """A member's adapters with its rank and scale, as from its single run: its part of a stack, without padding."""

    def own(path: str, value: Any) -> Any:
        if not isinstance(value, LoraFactors):
            return value
        target = job.plan[path]
        assert target.axes is not None
        before = (slice(None),) * len(target.axes.batch)
        a, b = value.a[..., : target.rank], value.b[(*before, slice(target.rank))]
        return dataclasses.replace(value, a=a, b=b, scale=target.scale)

    return {path: own(path, value) for path, value in padded.items()}


def _if_different(values: Sequence[float]) -> np.ndarray | None:
    return np.array(values, np.float32) if len({*values}) > 1 else None


def _is_one_plan(one: jlora.Plan, other: jlora.Plan) -> bool:
    """Whether adapters of these plans are drawn alike, up to their scales."""
    both = ([dataclasses.replace(target, scale=1.0) for target in plan.values()] for plan in (one, other))
    return next(both) == next(both)


def _padded(value: Any, rank: int, strengths: bool) -> Any:
    """Stacked factors with a larger rank, and with the scale 1 if strengths replace it."""
    if not isinstance(value, LoraFactors):
        return value

    def grown(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, rank - value.rank if i == axis else 0) for i in range(x.ndim)])

    a, b = grown(value.a, value.a.ndim - 1), grown(value.b, 1 + len(value.axes.batch))
    return dataclasses.replace(value, a=a, b=b, scale=1.0 if strengths else value.scale)
