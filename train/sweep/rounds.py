"""Members divided into programs: by what is compiled, and by what fits in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from jlora import HEADS, named_leaves
from train.compute.processes import say
from train.config import FitConfig, LearningRates, Pretrained
from train.job import Job
from train.sweep.program import Program
from train.sweep.stacked import Stacking


def groups_of(jobs: Sequence[Job]) -> list[list[int]]:
    """The indices of members that one program can train: their bases are one, and they differ only in what is an array.

    Dropout rates are compiled in, and so are the scales of LoRA-FA. A base trained from scratch depends on the seed,
    and so does a new head that is not trained whole. With dropout, members with other batches are padded to other
    lengths, on which the masks depend. Within a group, members with the same data and seed are neighbours.
    """
    found: list[tuple[Any, list[int]]] = []
    for i, job in enumerate(jobs):
        compiled = _compiled_in(job)
        same = next((group for other, group in found if other == compiled), None)
        found.append((compiled, [i])) if same is None else same.append(i)
    return [sorted(group, key=lambda i: (_place(jobs, i), jobs[i].config.seed)) for _, group in found]


def largest_program(
    jobs: Sequence[Job], base: Any, new: Sequence[str], most: int | None, report: Callable[[str], None] = say
) -> Program:
    """The program of a group's first members: of as many as fit in a device's memory, by the compiler's account.

    Args:
      base: parameters, or shapes with shardings.
      most: a given number instead.
      report: called with a line for each program that does not fit.
    """
    count = len(jobs) if most is None else min(most, len(jobs))
    while True:
        program = Program(jobs[:count], base, Stacking.of(jobs[:count], new))
        if count == 1 or most is not None or program.fits() is not False:
            return program
        smaller = -(-count // 2)
        report(f"{count} members at once do not fit in memory: trying {smaller}")
        count = smaller


def parts_of(group: Sequence[int], count: int) -> list[list[int]]:
    """A group in as few rounds of at most ``count`` members as there can be, of nearly equal sizes."""
    rounds = -(-len(group) // count)
    ends = [len(group) * i // rounds for i in range(rounds + 1)]
    return [list(group[start:end]) for start, end in zip(ends, ends[1:], strict=False)]


def _compiled_in(job: Job) -> Any:
    """What members of one program have in common."""
    config, plan = job.config, job.plan
    same = {"sweep": config.sweep, "run_dir": None, "data": None, "learning_rate": LearningRates()}
    fit = dataclasses.replace(config.fit, weight_decay=FitConfig.weight_decay, lora_plus=FitConfig.lora_plus)
    lora = dataclasses.replace(config.lora, rank=2, alpha=1.0)
    seed = config.seed if _base_has_seed(job) else 0
    scales = config.fit.optimizer == "lora-fa"
    targets = [dataclasses.replace(t, rank=0, trainable=0, scale=t.scale if scales else 1.0) for t in plan.values()]
    return dataclasses.replace(config, **same, fit=fit, lora=lora, seed=seed), targets, _padding(job)


def _base_has_seed(job: Job) -> bool:
    """Whether the frozen base depends on the seed."""
    if job.network.load is None:
        return True
    heads = [path for path in named_leaves(job.shapes)[0] if any(re.search(one, path) for one in HEADS)]
    whole = [path in job.plan and job.plan[path].axes is None for path in heads]
    return any(path in job.plan for path in heads) and not all(whole)


def _padding(job: Job) -> Any:
    """What the lengths of batches depend on, if dropout masks depend on these."""
    config = job.config
    if not config.lora.dropout and not (isinstance(config.model, Pretrained) and config.model.dropout):
        return None
    return job.buckets, (config.seed, id(job.examples)) if len(job.buckets) > 1 else None


def _place(jobs: Sequence[Job], i: int) -> int:
    """The first member with the same data."""
    return next(j for j, job in enumerate(jobs) if job.examples is jobs[i].examples)
