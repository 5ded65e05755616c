"""One compiled step of several members, and its placement on devices.

The step is that of a single run under `jax.vmap`: the base is not mapped, and a batch that several members share is not
either, so what depends on no adapter is computed once for them. On a CPU it is a loop over the members.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train.compute.keys import random_key
from train.compute.layouts import Mesh, placed
from train.compute.memory import bytes_on_device, compile_or_measure, device_memory
from train.compute.optimizer import make_optimizer
from train.compute.step import Metrics, TrainState, init_state, make_step
from train.data.batches import Batch, batch_of, bucket_of, size, training_rows
from train.data.ragged import Examples
from train.job import Job
from train.loop.feed import StepInput, counts_of
from train.loop.state import StepCounts
from train.sweep.stacked import Settings, Stacking, own_adapters, start_stacked, with_scales
from train.sweep.turns import at_a_time as members_at_a_time
from train.sweep.turns import in_turns


class Program:
    """A step that trains several members at once.

    The members are one more axis of every batch. Where all of them are too many at a time (`train.sweep.turns`), parts
    of them take turns within the step.

    On a mesh the members lie along ``data`` if it divides their number, and the rows of a batch along ``fsdp``; if not,
    the rows are divided as in a single run.

    Attributes:
      jobs: of the members; those with the same data and seed are neighbours.
      base: parameters on their devices, or their shapes with shardings.
      at_a_time: the number of members that compute together.
    """

    def __init__(self, jobs: Sequence[Job], base: Any, stacking: Stacking, *, at_a_time: int | None = None):
        """A program of ``jobs``; ``at_a_time`` of them compute together, by default as in `train.sweep.turns`."""
        self.jobs, self.base, self._stacking = jobs, base, stacking
        first = jobs[0]
        assert isinstance(first.layout, Mesh)
        self._layout, self._fit = first.layout, first.config.fit
        self._keys = jnp.stack([random_key(job.config.seed, "fit dropout") for job in jobs])
        self._tx = make_optimizer(self._fit, decay=stacking.decay, ratio=stacking.ratio)
        data = self._layout.mesh.shape["data"]
        self._axis = "data" if data > 1 and len(jobs) % data == 0 else None
        local = len(jobs) // data if self._axis else len(jobs)
        self.at_a_time = at_a_time or members_at_a_time(first, local, self._layout.mesh.devices.flat[0].platform)
        self._sources = self._batch_sources()
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def _batch_sources(self) -> list[int]:
        """A member for each different batch of a step. All are followed by equally many members with the same batch."""
        first = [i for i, job in enumerate(self.jobs) if i == 0 or not _is_one_feed(job, self.jobs[i - 1])]
        uneven = len({*np.diff([*first, len(self.jobs)]).tolist()}) > 1
        return [*range(len(self.jobs))] if uneven or self._axis and len(first) > 1 else first

    # The state

    def make_state(self) -> TrainState:
        """The state before the first step, on its devices."""
        return jax.block_until_ready(jax.jit(self._make, out_shardings=self._places)(self.base))

    def state_like(self) -> TrainState:
        """The shapes of the state, with shardings."""
        return placed(self._shapes, self._places)

    def part_of(self, state: TrainState, kept: Sequence[int]) -> TrainState:
        """The state of this program, of the members ``kept`` of another one's."""
        index = np.asarray(kept)
        return jax.jit(lambda state: jax.tree.map(lambda x: x[index], state), out_shardings=self._places)(state)

    def _make(self, base: Any) -> TrainState:
        return jax.vmap(lambda adapters: init_state(self._tx, adapters))(start_stacked(self.jobs, base, self._stacking))

    @functools.cached_property
    def _shapes(self) -> Any:
        return jax.eval_shape(self._make, self.base)

    @functools.cached_property
    def _own_places(self) -> TrainState:
        """The shardings of one member's state."""
        one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self._shapes)
        return self._layout.state_shardings(one, jax.tree.map(lambda x: x.sharding, self.base))

    @functools.cached_property
    def _places(self) -> Any:
        return jax.tree.map(lambda s: NamedSharding(s.mesh, P(self._axis, *s.spec)), self._own_places)

    # A step

    def input(self, step: int) -> StepInput:
        """The batches of a step, counted from 0. Members that are done get their last step's."""
        pairs, bucket = self._rows(step)
        placed = self._placed([batch_of(*pair, bucket) for pair in pairs])
        total = StepCounts(*(sum(column) for column in zip(*self.counts(step), strict=True)))
        return StepInput(placed, (self._fit.batch_size, *bucket), total)

    def counts(self, step: int) -> list[StepCounts]:
        """The size of each member's part of a step, counted from 0."""
        pairs, bucket = self._rows(step)
        each = [counts_of(*pair, bucket) for pair in pairs]
        return [each[i * len(each) // len(self.jobs)] for i in range(len(self.jobs))]

    def _rows(self, step: int) -> tuple[list[tuple[Examples, np.ndarray]], tuple[int, ...]]:
        """For each different batch of a step, its examples and their rows; and the length to which all are padded."""
        jobs = [self.jobs[i] for i in self._sources]
        pairs = [(job.examples, _rows_of(job, step)) for job in jobs]
        return pairs, max(bucket_of(*pair, job.buckets) for pair, job in zip(pairs, jobs, strict=True))

    def settings(self, rates: np.ndarray, active: np.ndarray) -> Settings:
        """The settings of a step; both of shape [n]."""
        how = self._stacking
        return Settings(np.asarray(rates, np.float32), np.asarray(active, bool), how.decay, how.ratio, how.strength)

    def step(self, state: TrainState, batch: Any, settings: Settings) -> tuple[TrainState, Metrics]:
        """One step. Metrics are float32 [n]. The state is donated."""
        shape = _shape(batch)
        if shape not in self._compiled:
            self._compiled[shape] = self._lowered(state, batch, settings).compile()
        return self._compiled[shape](state, self.base, batch, self._keys, settings)

    def fits(self) -> bool | None:
        """Whether a device has the memory for the step with the longest batch, by the compiler's account; None if its
        memory is unknown."""
        memory = device_memory(self._layout.mesh.devices.flatten().tolist())
        if memory is None:
            return None
        compiled, peak = self.longest_step
        return compiled is not None and peak <= memory

    @functools.cached_property
    def longest_step(self) -> tuple[Any, int]:
        """The step with the longest batch as from `train.compute.memory.compile_or_measure`; compiled once."""
        state, batch, none = self.state_like(), self.longest_batch(), np.zeros(len(self.jobs))
        lowered = self._lowered(state, batch, self.settings(none, none))
        compiled, peak = compile_or_measure(lowered, bytes_on_device((state, self.base, batch)))
        if compiled is not None:
            self._compiled[_shape(batch)] = compiled
        return compiled, peak

    def longest_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of the longest batch of all members, with shardings."""
        bucket, parts = max(job.buckets[-1:] for job in self.jobs), len(self._sources)
        one = batch_of(self.jobs[0].examples, np.zeros(self._fit.batch_size, np.int64), bucket)
        place = self._batch_place(parts)
        return {name: jax.ShapeDtypeStruct((parts, *x.shape), x.dtype, sharding=place) for name, x in one.items()}

    def _lowered(self, state: Any, batch: Any, settings: Settings) -> Any:
        whole = NamedSharding(self._layout.mesh, P())
        step = jax.jit(self._steps(), donate_argnums=0, out_shardings=(self._places, whole))
        return step.lower(state, self.base, batch, self._keys, settings)

    def _steps(self) -> Any:
        """``step(state, base, batch, keys, settings)`` of all members."""
        job, fit = self.jobs[0], self._fit

        def one(state: TrainState, base: Any, batch: Batch, key: jax.Array, settings: Settings) -> Any:
            step = make_step(
                job.network.forward,
                job.task,
                make_optimizer(fit, decay=settings.decay, ratio=settings.ratio),
                lambda _: settings.rate,
                smoothing=fit.label_smoothing,
                accumulate=job.config.compute.accumulate,
                freeze_a=fit.optimizer == "lora-fa",
                strength=settings.strength,
            )
            new, metrics = step(state, base, batch, key)
            return jax.tree.map(lambda new, old: jnp.where(settings.active, new, old), new, state), metrics

        def steps(state: Any, base: Any, batches: Any, keys: jax.Array, settings: Settings) -> Any:
            def of_one_batch(members: Any, batch: Batch) -> Any:
                return in_turns(lambda member: one(member[0], base, batch, *member[1:]), members, self.at_a_time)

            groups = len(next(iter(batches.values())))
            members = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), (state, keys, settings))
            turns = max(1, self.at_a_time // jax.tree.leaves(members)[0].shape[1])
            found = in_turns(lambda group: of_one_batch(*group), (members, batches), turns)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

        if self._axis is None:
            return steps
        members = P(self._axis)
        batches = members if len(self._sources) > 1 else P()
        specs = {"in_specs": (members, P(), batches, members, members), "out_specs": (members, members)}
        # Not checked: in a step of one device, whose loops start from constants, nothing varies over devices.
        return jax.shard_map(steps, mesh=self._layout.mesh, **specs, axis_names={self._axis}, check_vma=False)

    def _placed(self, parts: Sequence[Batch]) -> Any:
        batch = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
        if self._layout.devices == 1 and self._layout.on_host:
            return batch
        return jax.device_put(batch, self._batch_place(len(parts)))

    def _batch_place(self, parts: int) -> NamedSharding:
        """The sharding of ``parts`` batches."""
        members = self._axis if parts > 1 else None
        return NamedSharding(self._layout.mesh, P(members, "fsdp" if self._axis else ("data", "fsdp")))

    # The members

    def adapters(self, state: TrainState, i: int) -> dict[str, Any]:
        """A member's adapters on the devices, with the program's rank and its own scale, to evaluate."""
        return self._slice(state.adapters, i)

    def own_adapters(self, state: TrainState, i: int) -> dict[str, Any]:
        """A member's adapters on the host, as from its single run."""
        padded = self._layout.to_host(self._plain_slice(state.adapters, i))
        return own_adapters(self.jobs[i], padded)

    @functools.cached_property
    def _slice(self) -> Any:
        strength = self._stacking.strength
        return jax.jit(
            lambda stacked, i: _at(with_scales(stacked, strength), i), out_shardings=self._own_places.adapters
        )

    @functools.cached_property
    def _plain_slice(self) -> Any:
        return jax.jit(_at, out_shardings=self._own_places.adapters)


def _shape(batch: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: x[i], tree)


def _rows_of(job: Job, step: int) -> np.ndarray:
    fit, last = job.config.fit, job.intervals(job.config.fit, job.examples).steps - 1
    return training_rows(size(job.examples), fit.batch_size, job.config.seed, min(step, last))


def _is_one_feed(job: Job, other: Job) -> bool:
    """Whether two members have the same batches."""
    return job.examples is other.examples and job.config.seed == other.config.seed
