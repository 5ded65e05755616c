"""The programs of a sweep, compiled ahead of time for devices that may not be here: how many members fit at once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from train.ahead import StepCosts, costs_of, given_bytes, work_of
from train.compute.layouts import Mesh, placed, planned_layout
from train.compute.memory import bytes_on_device
from train.config import TrainConfig
from train.data.batches import default_buckets
from train.job import Job, plan_of, uses_of
from train.sweep.members import Member, members
from train.sweep.program import Program
from train.sweep.rounds import groups_of, largest_program, parts_of
from train.tasks.stand_in import StandIn, stand_in


@dataclass(frozen=True)
class ProgramCosts:
    """What a program costs that trains several members.

    Attributes:
      members: the names of all members that such programs train.
      at_once: how many of them one program trains.
      at_a_time: how many of these compute together; the others take turns in the step.
      rounds: how many programs train all of them, one after the other.
      step: of one step of the program.
    """

    members: Sequence[str]
    at_once: int
    at_a_time: int
    rounds: int
    step: StepCosts


def sweep_costs(config: TrainConfig, devices: Sequence[Any], report: Callable[[str], None]) -> list[ProgramCosts]:
    """Compile the programs of a sweep for ``devices``, each for as many members as fit in memory.

    Reads config.json, the names of data sets, and no weights or data.

    Args:
      report: called with a line for each program that does not fit.

    Raises:
      ConfigError: if checkpoint, targets, devices or members do not fit the configuration.
    """
    found = members(config)
    made = stand_in(found[0].config)
    layout = planned_layout(made.config, made.network.rules, devices)
    jobs = _jobs(made, found, layout)
    base = placed(jobs[0].shapes, layout.shardings(jobs[0].shapes))

    def costs(groups: Sequence[Sequence[int]]) -> ProgramCosts:
        began = time.perf_counter()
        program = largest_program([jobs[i] for i in groups[0]], base, (), config.sweep.at_once, report)
        _ = program.longest_step  # compiled now, if its memory did not matter
        at_once, seconds = len(program.jobs), time.perf_counter() - began
        step = _step_costs(made, program, layout, devices, compile_seconds=seconds)
        names, rounds = [found[i].name for group in groups for i in group], len(parts_of(groups[0], at_once))
        return ProgramCosts(names, at_once, program.at_a_time, len(groups) * rounds, step)

    alike: list[tuple[Any, list[list[int]]]] = []
    for group in groups_of(jobs):
        program = _determining([jobs[i] for i in group])
        same = next((groups for other, groups in alike if other == program), None)
        alike.append((program, [group])) if same is None else same.append(group)
    return [costs(groups) for _, groups in alike]


def _determining(jobs: Sequence[Job]) -> list[Any]:
    """What determines the program of a group: of seeds and data, only which members share them."""
    sources = [(id(job.examples), job.config.seed) for job in jobs]
    configs = [dataclasses.replace(job.config, seed=0, data=jobs[0].config.data) for job in jobs]
    return [(config, sources.index(source)) for config, source in zip(configs, sources, strict=True)]


def _jobs(made: StandIn, found: Sequence[Member], layout: Mesh) -> list[Job]:
    """The jobs of the members, with one row of zeros for each of their data sets, and batches of all lengths."""
    shapes = jax.eval_shape(made.network.init, jax.random.key(0))
    row = {name: np.zeros((1, *x.shape[1:]), x.dtype) for name, x in made.batch.items()}
    uses = uses_of(made.network, shapes, made.task.inputs(jax.tree.map(jnp.asarray, row)))
    rows = {one.values.get("data"): {"": dict(row)} for one in found}
    longest = getattr(made.config.task, "max_length", None)
    lengths = () if longest is None else tuple(sorted(made.config.data.buckets or default_buckets(longest)))

    def job(one: Member) -> Job:
        config = dataclasses.replace(one.config, task=made.config.task, model=made.config.model)
        plan, examples = plan_of(config, shapes, uses), rows[one.values.get("data")]
        parts = {"config": config, "data": {}, "network": made.network, "task": made.task, "train": examples}
        return Job(**parts, test=examples, layout=layout, shapes=shapes, buckets=lengths, plan=plan)

    return [job(one) for one in found]


def _step_costs(
    made: StandIn, program: Program, layout: Mesh, devices: Sequence[Any], *, compile_seconds: float
) -> StepCosts:
    given = given_bytes(program.base, program.state_like(), bytes_on_device(program.longest_batch()))
    plans = {str(job.plan): job.plan for job in program.jobs}  # members of one rank have one plan
    work = {text: work_of(made, plan) for text, plan in plans.items()}
    return costs_of(
        made,
        layout,
        devices,
        *program.longest_step,
        given,
        flops=sum(work[str(job.plan)] for job in program.jobs),
        compile_seconds=compile_seconds,
        members=len(program.jobs),
    )
