"""How many members compute at a time within a step: together they read the base once, but too many leave the caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from train.compute import flops
from train.compute.step import init_state, make_step
from train.data.batches import batch_of
from train.job import Job, start_adapters

CACHE_BYTES = 6 * 2**20
"""What the activations of an adapted layer may take on a CPU, by `Size`. XLA computes each operation for all members
before the next one: beyond the caches that is slower than members one after the other."""

TOKENS = {"tpu": 2048, "gpu": 8192}
"""The tokens of members that compute together on an accelerator. Fewer leave it waiting for the weights; with more they
gain nothing from each other (`benchmarks.many_adapters`, `benchmarks.gpu_step`)."""


class Size(NamedTuple):
    """The size of a member's step.

    Attributes:
      tokens: positions that the adapted weights see; more if other weights have much of the FLOPs.
      bytes: of the inputs and outputs of all adapted weights, in float32.
    """

    tokens: float
    bytes: float


def size_of(job: Job) -> Size:
    """The size of a step with the longest batch, from its FLOPs."""
    tx, fit = optax.identity(), job.config.fit

    def make(base: Any) -> Any:
        return init_state(tx, start_adapters(job.config, job.network, base, job.plan))

    batch = batch_of(job.examples, np.zeros(fit.batch_size, np.int64), job.buckets[-1:])
    step = make_step(job.network.forward, job.task, tx, optax.constant_schedule(0.0))
    work = flops.count(step, jax.eval_shape(make, job.shapes), job.shapes, batch, jax.random.key(0))
    weights = [target.axes.sizes(target.shape) for target in job.plan.values() if target.axes is not None]
    each = [tuple(map(math.prod, sizes)) for sizes in weights]
    # Forward and backward; the gradients of the factors are small.
    tokens = work / (4 * sum(math.prod(sizes) for sizes in each))
    return Size(tokens, 4 * tokens * sum(batch * (inputs + outputs) for batch, inputs, outputs in each))


def at_a_time(job: Job, count: int, platform: str) -> int:
    """How many of ``count`` members compute at a time; it divides ``count``.

    With a new head alone all do: what is below it is the same for all, and computed once. If every weight is trained,
    members have nothing in common.
    """
    if job.config.mode != "lora":
        return count if job.config.mode == "head" else 1
    size = size_of(job)
    most = CACHE_BYTES / size.bytes if platform == "cpu" else TOKENS.get(platform, TOKENS["gpu"]) / size.tokens
    return largest_part(count, most)


def largest_part(count: int, most: float) -> int:
    """The largest divisor of ``count`` that is at most ``most``; at least 1."""
    return max((k for k in range(1, count + 1) if count % k == 0 and k <= most), default=1)


def in_turns(fn: Callable[[Any], Any], members: Any, most: int) -> Any:
    """``fn`` of each member: mapped over a leading axis, at most ``most`` at a time."""
    count = len(jax.tree.leaves(members)[0])
    together = largest_part(count, most)
    if together == count:
        return jax.vmap(fn)(members)
    parts = jax.tree.map(lambda x: x.reshape(count // together, together, *x.shape[1:]), members)
    found = jax.lax.map(jax.vmap(fn), parts)
    return jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), found)
