"""What a run prints while it trains, with a terminal and without one; and Ctrl-C at any moment."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.runs import ROOT, program, records, stopping
from train.loop import steps
from train.loop.state import Averages, Intervals, LoopState, StepCounts, TimeEstimate
from train.loop.stop import EXIT_CODE, INTERRUPTED
from train.report.console import Progress, ending

LINE = re.compile(
    r"fit  step +(?P<step>\d+) of (?P<steps>\d+)  epoch (?P<epoch>\d+) of (?P<epochs>\d+)(?P<done> done  mean| ) "
    r"loss (?P<loss>[\d.]+)  lr (?P<lr>[\d.e+-]+)(?:  (?P<speed>[\d,.]+) (?P<unit>tokens|examples)/s)?"
    r"(?: \((?P<loss_speed>[\d,]+) with loss\))?(?:  padding (?P<padding>\d+)%)?(?:  input (?P<input>\d+)%)?"
    r"(?:  (?P<left>\d+:\d\d:\d\d) left)?(?P<figures>(?:  validation_\w+ [\d.-]+)*)"
)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder's checkpoint and sentences of many lengths."""
    return tiny.write_sentiment(tmp_path_factory.mktemp("logs"))


def flags(work: Path, run_dir: Path, more: str) -> list[str]:
    return tiny.sentiment_flags(work, run_dir, "--learning-rate 0.01 --data.buckets 16", more)


# Lines


def test_a_log_without_a_terminal_has_a_line_for_all_that_is_due(work, tmp_path):
    """By --log-every; those of evaluations have their metrics; each says what the records do."""
    code, printed = program(*flags(work, tmp_path / "run", "--fit.epochs 2 --log-every 3 --eval-every-steps 4"))
    assert code == 0 and "\r" not in printed
    assert "fit  16 of 16 steps, 8 in an epoch; logged every 3, evaluated every 4\n" in printed
    lines = [line for line in printed.splitlines() if line.startswith("fit  step")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    told = [one.groupdict() for one in found if one]
    assert [int(one["step"]) for one in told] == [3, 4, 6, 8, 9, 12, 15, 16]
    assert [bool(one["figures"]) for one in told] == [int(one["step"]) % 4 == 0 for one in told]
    assert ["done" in one["done"] for one in told] == [int(one["step"]) % 8 == 0 for one in told]
    assert {(one["steps"], one["epochs"], one["unit"]) for one in told} == {("16", "2", "tokens")}
    assert [int(one["epoch"]) for one in told] == [1, 1, 1, 1, 2, 2, 2, 2]
    assert all(one["left"] for one in told) and told[-1]["left"] == "0:00:00"
    for one, record in zip(told, records(tmp_path / "run"), strict=True):
        assert float(one["loss"]) == pytest.approx(record["loss"], abs=1e-4)
        assert float(one["lr"]) == pytest.approx(record["learning_rate"], rel=1e-2)
        assert int(one["padding"]) == pytest.approx(100 * record["padding"], abs=0.51)
        for name, value in re.findall(r"(validation_\w+) ([\d.-]+)", one["figures"]):
            assert float(value) == pytest.approx(record[name], abs=1e-4)
    # Buckets of 16: over the second epoch, the padding is what the lengths leave of them.
    epoch = records(tmp_path / "run")[-1]
    words = sum(len(row["sentence"].split()) + 2 for row in tiny.sentences(64))
    assert epoch["padding"] == pytest.approx(1 - words / (64 * 16))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: Any, out: io.StringIO, err: io.StringIO) -> tuple[str, str]:
    """What two records put on stdout and stderr."""
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    line = {"step": 5, "loss": 0.51234, "learning_rate": 9.1e-4, "tokens_per_second": 1234.5, "padding": 0.18}
    line |= {"loss_tokens_per_second": 617.4, "input": 0.031}
    end = {"epoch": 1, "step": 10, "loss": 0.4, "learning_rate": 8e-4, "examples_per_second": 3.25, "test_f1": 0.75}
    end["input"] = 0.004  # which is not worth a word
    with Progress("fit", Intervals(epoch=10, steps=40, log=5, eval=10), 0) as progress:
        for _ in range(5):
            progress.advance()
        progress.show(line, (), 3661.2)
        progress.show(end, ["test_f1"], None)
        progress.show({name: value for name, value in end.items() if name != "test_f1"})  # said by lines
    return out.getvalue(), err.getvalue()


PLAIN = (
    "fit  40 of 40 steps, 10 in an epoch; logged every 5, evaluated every 10\n"
    "fit  step  5 of 40  epoch 1 of 4  loss 0.5123  lr 9.10e-04  1,234 tokens/s (617 with loss)"
    "  padding 18%  input 3%  1:01:01 left\n"
    "fit  step 10 of 40  epoch 1 of 4 done  mean loss 0.4000  lr 8.00e-04  3.2 examples/s  test_f1 0.7500\n"
)


def test_a_bar_says_the_same_as_lines(monkeypatch):
    """Lines go to stdout where it is a file, or where stderr shows no bar; a bar to a terminal on stderr."""
    plain, nothing = shown(monkeypatch, io.StringIO(), io.StringIO())
    assert (plain, nothing) == (PLAIN, "")
    assert shown(monkeypatch, Terminal(), io.StringIO()) == (PLAIN, "")
    monkeypatch.setenv("COLUMNS", "200")
    both, bar = shown(monkeypatch, io.StringIO(), Terminal())
    assert both == PLAIN
    nothing, again = shown(monkeypatch, Terminal(), Terminal())
    assert nothing == ""
    for one in (bar, again):
        for line in PLAIN.splitlines()[1:]:
            assert line.split("  epoch ")[1] in one, one
        assert "of 40" in one


def test_lines_are_flushed(monkeypatch):
    """Each is there when it is due, however the stream is buffered."""

    class Counted(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            assert self.getvalue().endswith("\n")
            self.flushed = self.getvalue().count("\n")

    out = Counted()
    shown(monkeypatch, out, io.StringIO())
    assert out.flushed == 3


def test_there_are_as_many_lines_as_asked_for_whatever_an_epoch_is():
    """With epochs shorter than a line, too; the records of epochs are beside them."""
    intervals = Intervals.of(500, 2, log_every=None, eval_every=1, eval_every_steps=None)
    assert [done for done in range(1, 101) if intervals.is_log_due(done)] == [20, 40, 60, 80, 100]
    intervals = Intervals.of(3, 8, log_every=10, eval_every=3, eval_every_steps=None)
    assert [done for done in range(1, 25) if intervals.is_log_due(done)] == [10, 20]
    intervals = Intervals.of(3, 8, log_every=8, eval_every=3, eval_every_steps=None)
    assert not any(intervals.is_log_due(done) for done in range(1, 25))  # the epochs' records are the same


# What a line says


def test_the_time_left_is_that_of_steps_and_evaluations():
    intervals = Intervals.of(3, 10, log_every=None, eval_every=1, eval_every_steps=7)
    for done in range(31):
        assert intervals.evals_after(done) == sum(intervals.is_eval_due(step) for step in range(done + 1, 31))
    estimate = TimeEstimate()
    assert estimate.left(5, intervals) is None
    for seconds in (1.0, 3.0):
        estimate.add(seconds)
    assert estimate.left(20, intervals) == 20.0
    estimate.eval_seconds = 5.0
    assert estimate.left(20, intervals) == 20.0 + 3 * 5.0  # after 21, 28 and 30
    assert estimate.left(30, intervals) == 0


def test_averages_have_the_newest_learning_rate_and_the_share_of_padding():
    """Of all steps, compiled or not, and through a checkpoint."""
    state = LoopState()
    for rate in (0.1, 0.2, 0.4):
        state.since_log.add({"loss": 1.0, "learning_rate": rate}, StepCounts(8, 30, 0.0, padded_tokens=40))
        state = LoopState.from_json(json.loads(json.dumps(state.to_json())))
    averages = state.since_log.compute()
    assert (averages["learning_rate"], averages["padding"], averages["loss"]) == (0.4, 0.25, 1.0)
    assert "padding" not in Averages(1).compute()


def test_an_ending_says_what_was_kept():
    told: dict[str, Any] = {
        "steps": 9, "planned_steps": 24, "ended": "so it is", "primary_metric": "test_f1", "kept": "last",
        "kept_step": 9, "kept_metric": 0.25, "best_step": 3, "best_metric": 0.75,
    }  # fmt: skip
    first = "ended at step 9 of 24: so it is\nkept: step 9, the last one"
    assert ending(told) == f"{first}, test_f1 0.2500 (step 3 had 0.7500; --keep best keeps it)"
    assert ending(told | {"best_metric": 0.25}) == f"{first}, test_f1 0.2500"
    assert ending(told | {"kept_metric": None, "best_step": None, "best_metric": None}) == first


# Ctrl-C


def interrupted(
    argv: list[str], when: Callable[[Path, float], bool], again: float | None = None
) -> tuple[int, str, str, float]:
    """Exit code, stdout, stderr of the program after a Ctrl-C as soon as ``when``, and the seconds until it ended."""
    folder = Path(argv[argv.index("--run-dir") + 1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TRANSFORMERS_VERBOSITY": "warning"}
    one = subprocess.Popen(
        [sys.executable, "-m", "train", *argv], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    began = time.monotonic()
    while not when(folder, time.monotonic() - began):
        assert one.poll() is None and time.monotonic() - began < 120
        time.sleep(0.01)
    one.send_signal(signal.SIGINT)
    asked = time.monotonic()
    out, err = one.communicate(timeout=60)
    return one.returncode, out, err, time.monotonic() - asked


FOREVER = "--fit.epochs 100000 --eval-every 1000 --log-every 8"


@pytest.mark.parametrize("seconds", [0.5, 2.0])
def test_ctrl_c_ends_a_run_that_starts(work, tmp_path, seconds):
    """While it imports: one line, and no traceback."""
    argv = flags(work, tmp_path / "run", FOREVER)
    code, _, err, took = interrupted(argv, lambda folder, since: since > seconds)
    assert (code, err.count("\n"), err[:7]) == (INTERRUPTED, 1, "stopped"), err
    assert took < 2


@pytest.mark.slow
def test_ctrl_c_ends_a_run_that_compiles(work, tmp_path):
    """A compiler does not look up for minutes; nothing was trained that could be saved."""
    argv = flags(work, tmp_path / "run", FOREVER)
    code, out, err, took = interrupted(argv, lambda folder, since: (folder / "plan.txt").is_file())
    assert (code, err.count("\n")) == (INTERRUPTED, 1), err
    assert "stopped" in err and took < 2
    assert "trainable: " in out


@pytest.mark.slow
def test_ctrl_c_saves_a_run_that_trains_and_it_resumes(work, tmp_path):
    """Within two seconds of a step, with the exit code of Ctrl-C; what was not asked for is not printed."""
    argv = flags(work, tmp_path / "run", FOREVER)
    trained = lambda folder, _: (folder / "metrics.jsonl").is_file() and bool(records(folder))  # noqa: E731
    code, out, err, took = interrupted(argv, trained)
    found = re.fullmatch(r"fit: stopped after step (\d+) of 800000; the same command resumes from there\n", err)
    assert found and code == INTERRUPTED, err
    assert took < 20  # of a machine that does much else: to save, and to leave Python; alone it takes two or three
    assert (tmp_path / "run/checkpoints" / found[1]).is_dir()
    assert "PyTorch" not in out and LINE.search(out)
    code, out, err, _ = interrupted(argv, lambda folder, _: len(records(folder)) > int(found[1]) // 8)
    assert (code, f"after step {found[1]}\n" in out) == (INTERRUPTED, True), out


@pytest.mark.slow
def test_what_may_be_lost_is_saved_before_something_is_compiled(work, tmp_path, monkeypatch):
    """The first measurement compiles, after four steps: they are saved, with the measurement that is due."""
    monkeypatch.setattr(steps, "UNSAVED_SECONDS", -1)
    argv = flags(work, tmp_path / "run", "--fit.epochs 1 --eval-every-steps 4 --save.every-steps 1000 --log-every 1")
    with stopping(after=4):  # at the question of the measurement
        assert program(*argv)[0] == EXIT_CODE
    assert [one.name for one in (tmp_path / "run/checkpoints").iterdir()] == ["4"]
    assert len(records(tmp_path / "run")) == 3
    assert program(*argv)[0] == 0
    assert [one["step"] for one in records(tmp_path / "run") if "validation_accuracy" in one] == [4, 8]


def test_ctrl_c_ends_a_command(work, tmp_path):
    argv = [sys.executable, "-m", "train", "predict", str(tmp_path), "--text", "a"]
    one = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    one.send_signal(signal.SIGINT)
    assert (one.communicate(timeout=20)[1], one.returncode) == ("stopped\n", INTERRUPTED)
