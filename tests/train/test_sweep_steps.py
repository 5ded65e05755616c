"""The members of a sweep, in one program, take the steps of their single runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import numpy as np
import pytest

from tests import tiny
from train.__main__ import parse
from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.experiment import frozen_base
from train.job import Job, make_jobs, start_adapters
from train.loop.feed import Batches
from train.loop.stop import Stop
from train.sweep.members import members
from train.sweep.program import Program
from train.sweep.rounds import groups_of
from train.sweep.stacked import Stacking, drawn_heads, rates_of

STEPS = 5
LAWS = {
    "rank, rate and seed": "--sweep.rank 2,3 --sweep.lr 0.01,0.003 --sweep.seed 0,1",
    "alpha, LoRA+ and decay": "--sweep.alpha 4,8 --sweep.lora-plus 1,4 --sweep.weight-decay 0,0.1",
    "dropout rates": "--sweep.dropout 0,0.2 --sweep.seed 0,1",
    "every dropout, in parts": "--sweep.rank 2,3 --lora.dropout 0.1 --model.dropout --compute.accumulate 2",
    "rsLoRA": "--sweep.rank 2,3 --lora.use-rslora",
    "DoRA": "--sweep.rank 2,3 --sweep.lr 0.01,0.003 --lora.use-dora",
    "LoRA-FA": "--sweep.lr 0.01,0.003 --sweep.rank 2,3 --fit.optimizer lora-fa",
    "Riemannian": "--sweep.rank 2,3 --sweep.lr 0.01,0.003 --fit.optimizer riemannian",
    "smoothed": "--sweep.rank 2,3 --sweep.seed 0,1 --fit.label-smoothing 0.1 --fit.clip 0.5 --fit.warmup 0.5",
    "a new head": "--mode head --sweep.lr 0.01,0.003 --sweep.seed 0,1",
    "all weights": "--mode full --sweep.weight-decay 0,0.1 --sweep.seed 0,1",
    "a new head under an adapter": "--sweep.seed 0,1 --lora.exclude embeddings --lora.targets classifier "
    "--lora.train-also",
    "a part of a new head": "--sweep.seed 0,1 --lora.train-also classifier.bias",
    "data sets": "--sweep.data {0}/train.jsonl,{0}/other.jsonl --sweep.rank 2,3",
}


class Trained(NamedTuple):
    """A member's adapters after some steps, and the loss of each of them."""

    adapters: dict[str, Any]
    losses: np.ndarray


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder without a head, and sentences of many lengths."""
    work = tiny.write_sentiment(tmp_path_factory.mktemp("steps"))
    tiny.write_jsonl(work / "other.jsonl", tiny.sentences(40, start=200))
    return work


def jobs_of(work: Path, *more: str) -> list[Job]:
    argv = tiny.sentiment_flags(
        work, None, "--data.buckets 10 16 --fit.batch-size 4", *(one.format(work) for one in more)
    )
    return make_jobs([member.config for member in members(parse(argv))], lambda: None)


def base_of(job: Job) -> Any:
    """The base of a job, a checkpoint's."""

    def never(*_: Any) -> Any:
        raise AssertionError("a checkpoint is not trained")

    return frozen_base(job, Path("none"), never, never, Stop()).params


def trained_alone(job: Job) -> Trained:
    """A job's single run."""
    fit, base = job.config.fit, base_of(job)
    tx = make_optimizer(fit)
    rate = make_schedule(
        fit, getattr(job.config.learning_rate, job.config.mode), job.intervals(fit, job.examples).steps
    )
    state = job.layout.make_state(
        lambda base: init_state(tx, start_adapters(job.config, job.network, base, job.plan)), base
    )
    step = make_step(
        job.network.forward, job.task, tx, rate, smoothing=fit.label_smoothing,
        accumulate=job.config.compute.accumulate, freeze_a=fit.optimizer == "lora-fa",
    )  # fmt: skip
    step = job.layout.compile_step(step, state)
    batches = Batches(job.examples, job.layout, fit.batch_size, job.buckets, job.config.seed, lambda _: 0.0)
    losses = []
    for k in range(STEPS):
        state, metrics = step(state, base, batches(k).batch, random_key(job.config.seed, "fit dropout"))
        losses.append(float(metrics["loss"]))
    return Trained(job.layout.to_host(state.adapters), np.array(losses))


def trained_together(jobs: list[Job], at_a_time: int | None = None) -> list[Trained]:
    """The members of a sweep, each group in a program."""
    found: dict[int, Trained] = {}
    for group in groups_of(jobs):
        these = [jobs[i] for i in group]
        base, rates = base_of(these[0]), rates_of(these)
        program = Program(these, base, Stacking.of(these, drawn_heads(these[0], base)), at_a_time=at_a_time)
        state, losses = program.make_state(), []
        for k in range(STEPS):
            settings = program.settings(rates[k], np.ones(len(these)))
            state, metrics = program.step(state, program.input(k).batch, settings)
            losses.append(np.asarray(metrics["loss"]))
        for place, i in enumerate(group):
            found[i] = Trained(program.own_adapters(state, place), np.array(losses)[:, place])
    return [found[i] for i in range(len(jobs))]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("law", "at_a_time"), [(law, (8, 1, 2)[i % 3]) for i, law in enumerate(LAWS)])
def test_each_member_ends_as_its_single_run_does(work, law, at_a_time):
    """To 1e-5, with batches of several lengths; ranks, scales, structure and dtypes are those of the single run."""
    jobs = jobs_of(work, LAWS[law])
    assert len({batch_length(jobs[0], k) for k in range(STEPS)}) > 1
    together = trained_together(jobs, at_a_time)
    for i in {0, len(jobs) - 1}:
        found, expected = together[i], trained_alone(jobs[i])
        chex.assert_trees_all_equal_shapes_and_dtypes(found.adapters, expected.adapters)
        assert jax.tree.structure(found.adapters) == jax.tree.structure(expected.adapters)
        for path in [one for one in expected.adapters if one.endswith("key/bias")]:
            del (
                found.adapters[path],
                expected.adapters[path],
            )  # with a gradient of 0, of which Adam scales the rounding up
        chex.assert_trees_all_close(found.adapters, expected.adapters, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.losses, expected.losses, rtol=0, atol=1e-5)


def batch_length(job: Job, k: int) -> int:
    batches = Batches(job.examples, job.layout, job.config.fit.batch_size, job.buckets, job.config.seed, lambda _: 0.0)
    return batches(k).shape[1]
