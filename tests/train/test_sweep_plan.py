"""`plan` of a sweep: the programs that a run would compile, from a configuration alone."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import pytest

from tests import tiny
from tests.runs import program
from train.__main__ import parse
from train.compute.layouts import Mesh, placed
from train.job import make_jobs
from train.sweep.ahead import ProgramCosts, sweep_costs
from train.sweep.members import members
from train.sweep.program import Program
from train.sweep.rounds import groups_of
from train.sweep.stacked import Stacking

ONE_LENGTH = "--data.buckets 16 --task.labels bad good"
MESH = "--compute.layout mesh --compute.data 4 --compute.fsdp 2"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tiny.write_sentiment(tmp_path_factory.mktemp("plan"))
    tiny.write_jsonl(work / "other.jsonl", tiny.sentences(64, start=200))
    return work


def flags(work: Path, *more: str) -> list[str]:
    return tiny.sentiment_flags(work, None, ONE_LENGTH, *(one.format(work) for one in more))


def planned(argv: list[str]) -> list[ProgramCosts]:
    return sweep_costs(parse(argv), jax.devices(), lambda line: None)


SWEEPS = {
    "ranks and rates": ("--sweep.rank 2,3 --sweep.lr 0.01,0.003", 1),
    "seeds": ("--sweep.seed 0,1,2", 1),
    "data sets": ("--sweep.data {0}/train.jsonl,{0}/other.jsonl --sweep.rank 2,3", 1),
    "dropout rates": ("--sweep.dropout 0,0.2 --sweep.seed 0,1", 2),
    "along data": (f"--sweep.rank 2,3 --sweep.seed 0,1 {MESH}", 1),
    "rows along data": (f"--sweep.seed 0,1,2 {MESH}", 1),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SWEEPS)
def test_its_programs_are_those_of_the_run(work: Path, name: str) -> None:
    """The same members at once and at a time, and to the byte the same memory."""
    argv, count = flags(work, SWEEPS[name][0]), SWEEPS[name][1]
    jobs = make_jobs([member.config for member in members(parse(argv))], lambda: None)
    found, groups = planned(argv), groups_of(jobs)
    assert len(found) == len(groups) == count
    for one, group in zip(found, groups, strict=True):
        own = [jobs[i] for i in group]
        layout = own[0].layout
        assert isinstance(layout, Mesh)
        base = placed(own[0].shapes, layout.shardings(own[0].shapes))
        expected = Program(own, base, Stacking.of(own, ()))
        assert (one.at_once, one.rounds, len(one.members)) == (len(group), 1, len(group))
        assert one.at_a_time == expected.at_a_time
        assert one.step.peak_bytes == expected.longest_step[1]
        assert one.step.rows == len(group) * own[0].config.fit.batch_size
        assert one.step.tokens == one.step.rows * 16


def test_what_does_not_fit_goes_in_rounds(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the members at once, and half of these, as in the run; what fits is printed, and nothing else as JSON."""
    argv = flags(work, "--sweep.rank 2,3 --sweep.lr 0.01,0.003")
    (whole,) = planned(argv)
    (few,) = planned([*argv, "--sweep.at-once", "2"])
    assert (few.at_once, few.rounds) == (2, 2) and few.step.peak_bytes < whole.step.peak_bytes
    for module in ("train.sweep.program", "train.ahead"):
        monkeypatch.setattr(f"{module}.device_memory", lambda _: few.step.peak_bytes)
    code, printed = program("plan", *argv)
    assert code == 0, printed
    assert "4 members at once do not fit in memory: trying 2" in printed
    assert "4 members: rank2-lr0.01, " in printed and "in 2 rounds, 2 at once" in printed
    code, printed = program("plan", "--json", *argv)
    (found,) = json.loads(printed)
    assert code == 0 and (found["at_once"], found["rounds"], found["step"]["fits"]) == (2, 2, True), printed
    for module in ("train.sweep.program", "train.ahead"):
        monkeypatch.setattr(f"{module}.device_memory", lambda _: 1)
    code, printed = program("plan", *argv)
    assert code == 0 and "does not fit" in printed and "without --sweep" in printed, printed
    code, printed = program("plan", *argv, "--sweep.at-once", "2")
    assert code == 0 and "2 at once do not fit" in printed and "--sweep.at-once" in printed, printed


def test_programs_that_differ_in_seeds_alone_are_compiled_once() -> None:
    """A base from scratch depends on the seed, so that seeds train one after the other."""
    options = "--task.side 8 --task.labels a b --lora.rank 2 --sweep.seed 0,1 --sweep.lr 1,2"
    (found,) = planned(["configs/digits.py", *options.split()])
    assert list(found.members) == ["lr1-seed0", "lr2-seed0", "lr1-seed1", "lr2-seed1"]
    assert (found.at_once, found.rounds) == (2, 2)
