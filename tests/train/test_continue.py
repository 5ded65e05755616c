"""The end of a run, and a run that is trained further: exact where the schedule allows, told where not, or refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import chex
import pytest

import jlora
from tests import tiny
from tests.runs import assert_same_run, content, program, records, stopping
from train.__main__ import parse
from train.config import ConfigError, FitConfig
from train.loop.extend import extend
from train.loop.run_files import RunFiles
from train.loop.state import Intervals, LoopState
from train.loop.stop import EXIT_CODE
from train.rundir.changes import LATER
from train.rundir.claim import ClaimedDirectory


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder's checkpoint and sentences of many lengths."""
    return tiny.write_sentiment(tmp_path_factory.mktemp("continue"))


def flags(work: Path, run_dir: Path | None, more: str = "") -> list[str]:
    """A run in which everything is random that can be; 8 steps an epoch, each with a line."""
    random = "--model.dropout --lora.dropout 0.1 --data.buckets 16 --learning-rate 0.01 --log-every 1"
    constant = "--fit.schedule constant --fit.warmup 0 --save.every-steps 5"
    return tiny.sentiment_flags(work, run_dir, random, constant, more)


def ran(*argv: str) -> str:
    code, printed = program(*argv)
    assert code == 0, printed
    return printed


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def four(work) -> Path:
    """A run that was planned with four epochs."""
    ran(*flags(work, work / "four", "--fit.epochs 4"))
    return work / "four"


@pytest.fixture(scope="module")
def two(work) -> Path:
    """A finished run of two epochs."""
    printed = ran(*flags(work, work / "two", "--fit.epochs 2"))
    assert "ended at step 16 of 16: all 2 epochs are done\nkept: step 16, the last one, validation_accuracy " in printed
    return work / "two"


@pytest.fixture
def copy(two, tmp_path) -> Path:
    return shutil.copytree(two, tmp_path / "run")


# Further


def test_a_finished_run_that_is_trained_further_is_the_one_that_was_planned_so(work, four, copy):
    """With a constant schedule, bit for bit: adapters, records, metrics; said before it trains."""
    printed = ran(*flags(work, copy, "--fit.epochs 4 --resume auto"))
    assert (
        "fit.epochs is 4 and was 2: step 17 of 32 is next. All learning rates, and so the result, are those of a run"
        in printed
    )
    assert_same_run(copy, four)
    assert json.loads((copy / "config.json").read_text())["fit"]["epochs"] == 4
    assert (summary(copy)["epochs_planned"], summary(four)["epochs_planned"]) == ([[0, 2], [16, 4]], [[0, 4]])
    assert "is finished: nothing is left to train. Pass more --fit.epochs" in ran(
        *flags(work, copy, "--fit.epochs 4 --resume auto")
    )


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_other_epochs_and_may_be_stopped_again(work, four, tmp_path):
    """From the middle of an epoch; from one to three to two to four, in either direction."""
    folder = tmp_path / "run"
    for epochs, steps in ((1, 4), (3, 10), (2, 1)):
        with stopping(steps):
            code, printed = program(*flags(work, folder, f"--fit.epochs {epochs}"))
        assert code == EXIT_CODE, printed
    assert "fit.epochs is 4 and was 2" in ran(*flags(work, folder, "--fit.epochs 4"))
    assert_same_run(folder, four)


@pytest.mark.slow
def test_one_that_was_killed_while_it_went_on_goes_on_again(work, four, copy):
    with stopping(3):
        code, printed = program(*flags(work, copy, "--fit.epochs 4"))
    assert (code, (copy / "summary.json").exists()) == (EXIT_CODE, False), printed
    printed = ran(*flags(work, copy, "--fit.epochs 4"))
    assert "fit.epochs is" not in printed
    assert_same_run(copy, four)


def test_an_older_checkpoint_of_a_finished_run_is_gone_on_from(work, four, copy):
    assert "step 11 of 32 is next" in ran(*flags(work, copy, "--fit.epochs 4 --resume 10"))
    assert_same_run(copy, four)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_falling_schedule_stretches_over_the_new_steps_and_it_is_told(work, tmp_path, schedule):
    """From the step at which it is resumed, its learning rates are those of the longer run."""
    shape = f"--fit.schedule {schedule} --fit.warmup 0.1"
    ran(*flags(work, tmp_path / "run", f"--fit.epochs 1 {shape}"))
    printed = ran(*flags(work, tmp_path / "run", f"--fit.epochs 2 {shape}"))
    ran(*flags(work, tmp_path / "planned", f"--fit.epochs 2 {shape}"))
    found, planned = (
        {one["step"]: one["learning_rate"] for one in records(tmp_path / name)} for name in ("run", "planned")
    )
    assert [found[step] for step in range(9, 17)] == [planned[step] for step in range(9, 17)]
    assert found[8] != planned[8]
    told = re.search(r"learning rate, (\S+), .*[ (]step (\d+): (\S+) instead of (\S+)\), so the result", printed)
    assert told, printed
    step = int(told[2])
    expected = [f"{rate:.2e}" for rate in (planned[9], found[step], planned[step])]
    assert [told[1], told[3], told[4]] == expected
    assert abs(found[step] - planned[step]) == max(abs(found[i] - planned[i]) for i in range(1, 9))


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.02, 0.2])
def test_what_is_told_is_what_the_schedules_are(name, warmup):
    """Over plans of plans: exact if and only if no step had another learning rate."""
    fit = FitConfig(schedule=name, warmup=warmup, epochs=6)
    intervals = Intervals.of(6, 10, log_every=1, eval_every=1, eval_every_steps=None)
    for planned in ([[0, 3]], [[0, 4], [10, 3]], [[0, 6], [20, 2]], [[0, 6], [25, 3], [30, 3]]):
        state = LoopState(step=30, planned_epochs=[list(one) for one in planned])
        told = extend(fit, 1e-3, intervals, state, finished=False)
        assert state.planned_epochs == [one for one in planned if one[0] < 30] + [[30, 6]]
        exact = name == "constant" and round(warmup * 60) == round(warmup * 10 * planned[0][1])
        assert ("and so the result" in told) == exact, (planned, told)
    assert extend(fit, 1e-3, intervals, LoopState(step=30, planned_epochs=[[0, 6]]), finished=False) == ""


@pytest.mark.slow
def test_a_measurement_that_a_longer_run_would_not_have_is_told(work, tmp_path):
    ran(*flags(work, tmp_path / "run", "--fit.epochs 1 --eval-every 2"))
    printed = ran(*flags(work, tmp_path / "run", "--fit.epochs 2 --eval-every 2"))
    assert "Step 8 was evaluated as the last one, which that run would skip" in printed


@pytest.mark.slow
def test_a_run_is_found_by_asking_for_it(work, tmp_path, monkeypatch):
    """Below runs/, with --resume auto; without it the finished run is left alone, and a new one begins."""
    config = str(Path("configs/sst2_minilm.py").resolve())
    monkeypatch.chdir(tmp_path)
    argv = [config, *flags(work, None)[1:]]
    ran(*argv, "--fit.epochs", "1")
    first = next(Path("runs").iterdir())
    printed = ran(*argv, "--fit.epochs", "2", "--resume", "auto", "--eval-every", "2")
    assert f"resuming {first} after step 8\nfit.epochs is 2 and was 1" in printed
    assert [one for one in Path("runs").iterdir()] == [first]
    ran(*argv, "--fit.epochs", "3", "--eval-every", "2")
    assert len(list(Path("runs").iterdir())) == 2


# Refused


REFUSED = {
    "fewer epochs": ("--fit.epochs 1", "fit.epochs: got 1, which is 8 steps, and the run is at step 16: nothing"),
    "another rate": ("--fit.epochs 4 --learning-rate.lora 0.02", "learning_rate.lora: the run has 0.01, got 0.02"),
    "another schedule": ("--fit.epochs 4 --fit.schedule linear", 'fit.schedule: the run has "constant", got "linear"'),
    "another batch": ("--fit.epochs 4 --fit.batch-size 4", "fit.batch_size: the run has 8, got 4"),
    "another seed": ("--fit.epochs 4 --seed 1", "seed: the run has 0, got 1"),
    "what is kept": ("--fit.epochs 2 --keep best", "a finished run with another configuration:\n  - keep: the run has"),
    "patience": ("--fit.epochs 2 --fit.patience 3", "fit.epochs: got 2, which is 16 steps, and the run is at step 16"),
    "a step": ("--fit.epochs 4 --resume 7", "resume: got step 7; there are checkpoints of"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gone_on_with_is_refused_by_name_and_changes_nothing(work, copy, case):
    more, message = REFUSED[case]
    before = content(copy)
    argv = flags(work, copy, more)
    if "--learning-rate.lora" in argv:
        at = argv.index("--learning-rate")
        del argv[at : at + 2]
    code, printed = program(*argv)
    assert (code, message in printed) == (2, True), printed
    assert content(copy) == before


@pytest.mark.slow
def test_an_earlier_checkpoint_is_the_way_to_fewer_epochs(work, tmp_path):
    more = "--fit.epochs 1 --save.max-to-keep 9"
    ran(*flags(work, tmp_path / "run", f"{more} --fit.epochs 2"))
    code, printed = program(*flags(work, tmp_path / "run", more))
    assert (code, "pass --fit.epochs 3 or more, or --resume STEP for an earlier one" in printed) == (2, True), printed
    ran(*flags(work, tmp_path / "run", f"{more} --resume 5"))
    ran(*flags(work, tmp_path / "one", more))
    assert_same_run(tmp_path / "run", tmp_path / "one")


def test_a_damaged_or_stripped_run_is_refused(work, copy):
    shutil.rmtree(copy / "checkpoints")
    code, printed = program(*flags(work, copy, "--fit.epochs 4"))
    assert (code, "has no checkpoint to resume from" in printed) == (2, True), printed
    with (copy / "metrics.jsonl").open("ab") as stream:
        stream.write(b"{}\n")
    code, printed = program(*flags(work, copy, "--fit.epochs 4"))
    assert (code, "metrics.jsonl" in printed) == (2, True), printed
    assert (copy / "summary.json").exists()


def test_the_fields_that_may_be_others_later_are_those():
    assert LATER == (
        "eval_batch_size", "eval_every", "eval_every_steps", "fit.epochs", "fit.patience", "keep", "log_every",
    )  # fmt: skip


def test_opening_the_files_of_a_run_changes_nothing(work, copy):
    """Metrics and checkpoints are as they were, and so is what an interrupted save left, until the run resumes."""
    (copy / "checkpoints/17.orbax-checkpoint-tmp").mkdir()
    (copy / "metrics.jsonl").write_bytes((copy / "metrics.jsonl").read_bytes() + b"{}\n")
    before = content(copy), sorted(copy.rglob("*"))
    config = parse(flags(work, copy, "--fit.epochs 4 --resume 10"))
    intervals = Intervals.of(4, 8, log_every=1, eval_every=1, eval_every_steps=None)
    with RunFiles(config, ClaimedDirectory(copy, finished=True, extends=True, lock=None), "", intervals) as files:
        assert (files.state.step, files.state.planned_epochs) == (10, [[0, 2], [10, 4]])
    assert (content(copy), sorted(copy.rglob("*"))) == before


# The end


@pytest.mark.slow
def test_patience_keeps_the_best_and_says_so(work, tmp_path):
    """Unless --keep last says otherwise; then the end of the run names the better step."""
    found, argv = {}, flags(work, None, "--fit.epochs 9 --eval-every-steps 3 --seed 1")
    argv[argv.index("--learning-rate") + 1] = "0.04"  # which is too much
    for keep in ("", "--keep best", "--keep last"):
        folder = tmp_path / f"run{keep}"
        printed = ran(*argv, "--run-dir", str(folder), "--fit.patience", "2", *keep.split())
        told = summary(folder)
        measured = {one["step"]: one["validation_accuracy"] for one in records(folder) if "validation_accuracy" in one}
        best = max(measured, key=lambda step: measured[step])
        last = max(measured)
        assert measured[last] < measured[best] and last - best == 6 and told["steps"] == last < 72
        kept = last if keep == "--keep last" else best
        assert (told["kept_step"], told["kept_metric"]) == (kept, pytest.approx(measured[kept]))
        assert (told["best_step"], told["best_metric"]) == (best, pytest.approx(measured[best]))
        assert told["metrics"]["adapted"]["validation"]["accuracy"] == pytest.approx(measured[kept])
        assert f"ended at step {last} of 72: 2 evaluations in a row had no better validation_accuracy" in printed
        which = "last" if kept == last else "best"
        assert f"kept: step {kept}, the {which} one, validation_accuracy {measured[kept]:.4f}" in printed
        assert (f"(step {best} had {measured[best]:.4f}; --keep best keeps it)" in printed) == (kept == last)
        found[keep] = jlora.load(folder / "adapters")
    chex.assert_trees_all_equal(found[""], found["--keep best"])

    argv += ["--run-dir", str(tmp_path / "run")]
    before = content(tmp_path / "run")
    code, printed = program(*argv, "--fit.patience", "1")
    assert (code, "fit.patience: got 1, and the run ended after 2 evaluations in a row" in printed) == (2, True)
    assert content(tmp_path / "run") == before
    ran(*argv, "--fit.patience", "3")  # the way out
    assert summary(tmp_path / "run")["steps"] > summary(tmp_path / "run--keep best")["steps"]


def test_going_on_needs_something_to_train():
    intervals = Intervals.of(2, 8, log_every=1, eval_every=1, eval_every_steps=None)
    with pytest.raises(ConfigError, match=r"fit.epochs: got 2.*pass --fit.epochs 3 or more"):
        extend(FitConfig(epochs=2), 1e-3, intervals, LoopState(step=20, planned_epochs=[[0, 4]]), finished=False)
    with pytest.raises(ConfigError, match=r"fit.patience: got 2.*pass --fit.patience 5 or more, or None"):
        state = LoopState(step=8, evals_since_best=4, planned_epochs=[[0, 2]])
        extend(FitConfig(epochs=2, patience=2), 1e-3, intervals, state, finished=True)
    # One that was killed before it wrote its summary only has to write that.
    assert (
        extend(FitConfig(epochs=2), 1e-3, intervals, LoopState(step=16, planned_epochs=[[0, 2]]), finished=False) == ""
    )
