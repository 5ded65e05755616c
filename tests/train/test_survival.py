"""A run that is killed at any moment and resumed ends with the same adapters, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import pytest

from tests import tiny
from tests.runs import assert_same_run, content, program, records, stopping
from train.__main__ import main, parse
from train.loop.stop import EXIT_CODE, Stop
from train.rundir.changes import HOW
from train.rundir.claim import _new_below_runs
from train.rundir.directory import RunDirectory

KILLS = 20
STEPS = 320


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder's checkpoint and sentences of many lengths."""
    return tiny.write_sentiment(tmp_path_factory.mktemp("survival"))


def flags(work: Path, run_dir: Path | None, *more: str) -> list[str]:
    """A run in which everything is random that can be, with a line for each step."""
    random = "--model.dropout --lora.dropout 0.1 --learning-rate.lora 0.01 --compute.accumulate 2 --log-every 1"
    saved = f"--save.every-steps 3 --fit.epochs {STEPS // 8} --eval-every 4 --keep best"
    return [*tiny.sentiment_flags(work, run_dir, random, saved), *more]


SHORT = ("--fit.epochs", "3", "--eval-every", "1")
"""24 steps, measured after 8, 16 and 24."""


def child(argv: list[str], printed: str, limit: int | None) -> None:
    """The program, in a process that can be killed; no file may have more than ``limit`` bytes, as on a full disk."""
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(main(argv))


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.experiment", "train.__main__"])
    return context


def launch(processes: Any, argv: list[str], printed: Path, limit: int | None = None) -> Any:
    one = processes.Process(target=child, args=(argv, str(printed), limit))
    one.start()
    return one


def finish(processes: Any, argv: list[str], printed: Path) -> None:
    one = launch(processes, argv, printed)
    one.join(180)
    assert one.exitcode == 0, printed.read_text()


@pytest.fixture(scope="module")
def whole(work, processes) -> Path:
    """A run that was never interrupted."""
    finish(processes, flags(work, work / "whole"), work / "whole.txt")
    return work / "whole"


def size(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.stat().st_size if file.exists() else 0


def wait_until_it_trained(one: Any, folder: Path, more: int) -> None:
    """Until metrics.jsonl was written to ``more`` times; a resumed run cuts it first."""
    seen, grown = size(folder), 0
    until = time.monotonic() + 60
    while grown < more and one.is_alive() and time.monotonic() < until:
        now = size(folder)
        grown, seen = grown + (now > seen), now
        time.sleep(0.001)


def is_saving(folder: Path) -> bool:
    return any("tmp" in one.name for one in folder.glob("checkpoints/*"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_again_and_again_is_the_run_that_is_not(work, processes, whole, tmp_path, number):
    """At 20 random moments: while it starts, steps, measures, and saves; SIGTERM saves and says so by its exit code."""
    rng, folder, during_saves, kills = random.Random(number), tmp_path / "run", 0, 0
    while kills < (KILLS if number == signal.SIGKILL else 4):
        one = launch(processes, flags(work, folder), tmp_path / "printed.txt")
        if kills % 7 == 3 and number == signal.SIGKILL:  # while it starts
            time.sleep(rng.uniform(0, 1))
        else:
            wait_until_it_trained(one, folder, rng.randint(1, 10))
            time.sleep(rng.uniform(0, 0.05))
        if kills % 3 == 1:  # as soon as it saves
            until = time.monotonic() + 10
            while not is_saving(folder) and one.is_alive() and time.monotonic() < until:
                pass
        during_saves += is_saving(folder)
        os.kill(one.pid, number)
        one.join(60)
        printed = (tmp_path / "printed.txt").read_text()
        assert one.exitcode == (-number if number == signal.SIGKILL else EXIT_CODE), printed
        assert number == signal.SIGKILL or "the same command resumes from there" in printed
        kills += 1
    assert not (folder / "summary.json").exists()
    if number == signal.SIGKILL:
        assert during_saves >= 3
    finish(processes, flags(work, folder), tmp_path / "printed.txt")
    assert_same_run(folder, whole)


# One process is enough for the rest: the question whether to stop is answered with yes


def stopped(work: Path, folder: Path, after: int, *more: str) -> None:
    with stopping(after):
        code, printed = program(*flags(work, folder, *SHORT, *more))
    assert code == EXIT_CODE, printed


@pytest.fixture(scope="module")
def short(work) -> Path:
    """A short run that was never interrupted."""
    code, printed = program(*flags(work, work / "short", *SHORT))
    assert code == 0, printed
    return work / "short"


@pytest.mark.slow
def test_a_measurement_that_was_stopped_is_done_first(work, short, tmp_path):
    """The step is saved at once, however long its evaluation would take; the resumed run writes its record."""
    stopped(work, tmp_path / "run", after=8)  # 7 steps, and then the question before the first measured batch
    assert len(records(tmp_path / "run")) == 7
    stopped(work, tmp_path / "run", after=1)  # within the same measurement
    assert len(records(tmp_path / "run")) == 7
    assert program(*flags(work, tmp_path / "run", *SHORT))[0] == 0
    assert_same_run(tmp_path / "run", short)


@pytest.fixture(scope="module")
def half(work, tmp_path_factory) -> Path:
    """A short run that was stopped in its second epoch, with checkpoints of the steps 8 (the best), 9, 12 and 13."""
    folder = tmp_path_factory.mktemp("half") / "run"
    stopped(work, folder, after=15)
    assert steps(folder) == [8, 9, 12, 13]
    return folder


def steps(folder: Path) -> list[int]:
    return sorted(int(one.name) for one in (folder / "checkpoints").iterdir() if one.name.isdigit())


@pytest.fixture
def copy(half, tmp_path) -> Path:
    return shutil.copytree(half, tmp_path / "run")


def truncated(folder: Path) -> None:
    for file in (folder / "adapters").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(folder: Path) -> None:
    for file in (folder / "opt_state").rglob("*"):
        if file.is_file() and file.name != "manifest.ocdbt" and file.parent.name == "d":
            file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))


DAMAGE = {
    "truncated": truncated,
    "flipped": flipped,
    "without optimizer": lambda folder: shutil.rmtree(folder / "opt_state"),
    "without the loop's state": lambda folder: shutil.rmtree(folder / "loop"),
    "garbled state": lambda folder: (folder / "loop" / "metadata").write_text('{"step": 13, '),
    "state of something else": lambda folder: (folder / "loop" / "metadata").write_text("{}"),
    "empty": lambda folder: [shutil.rmtree(one) for one in folder.iterdir() if one.is_dir()],
}


# Reads that are under way when one fails end after the failure was told, and tensorstore complains of that.
@pytest.mark.sampled(1)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_checkpoint_is_told_and_the_older_ones_are_used(work, short, copy, damage):
    """Nothing is changed by the refusal; going on from an older one gives the same run."""
    DAMAGE[damage](copy / "checkpoints/13")
    before = content(copy / "checkpoints")
    code, printed = program(*flags(work, copy, *SHORT))
    assert code == 2
    assert f"{copy}/checkpoints/13: the checkpoint cannot be read" in printed
    assert "Usable: step 8, step 9, step 12. Nothing was changed; pass --resume 12 " in printed
    assert content(copy / "checkpoints") == before
    code, printed = program(*flags(work, copy, *SHORT, "--resume", "12"))
    assert code == 0, printed
    assert_same_run(copy, short)


def test_a_run_without_a_checkpoint_says_that_it_starts_over(work, short, copy):
    shutil.rmtree(copy / "checkpoints")
    code, printed = program(*flags(work, copy, *SHORT))
    assert code == 0, printed
    assert f"{copy} was stopped before its first checkpoint: training starts over" in printed
    assert_same_run(copy, short)


def test_any_checkpoint_can_be_gone_on_from(work, short, copy):
    code, printed = program(*flags(work, copy, *SHORT, "--resume", "7"))
    assert (code, "resume: got step 7; there are checkpoints of 8, 9, 12, 13" in printed) == (2, True)
    code, printed = program(*flags(work, copy, *SHORT, "--resume", "8"))
    assert code == 0, printed
    assert_same_run(copy, short)


def test_nothing_is_given_up_before_the_older_checkpoint_is_read(work, copy):
    """A broken one that was asked for leaves the later ones, and the records, as they are."""
    truncated(copy / "checkpoints/8")
    before, written = content(copy / "checkpoints"), size(copy)
    code, printed = program(*flags(work, copy, *SHORT, "--resume", "8"))
    assert (code, "checkpoints/8: the checkpoint cannot be read" in printed) == (2, True), printed
    assert content(copy / "checkpoints") == before and size(copy) == written


def test_a_run_without_its_best_checkpoint_finds_a_new_one(work, copy):
    shutil.rmtree(copy / "checkpoints/8")
    code, printed = program(*flags(work, copy, *SHORT))
    assert code == 0, printed
    assert "the best checkpoint, of step 8" in printed
    assert json.loads((copy / "summary.json").read_text())["kept_step"] in (16, 24)


def test_records_that_were_cut_short_are_told_and_the_run_goes_on(work, copy):
    file = copy / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    code, printed = program(*flags(work, copy, *SHORT))
    assert (code, "has changed since the checkpoint" in printed) == (0, True), printed
    assert [one["step"] for one in records(copy)][-2:] == [24, 24]


def test_a_stop_says_how_the_run_goes_on(work, copy):
    with stopping(3):
        code, printed = program(*flags(work, copy, *SHORT, "--resume", "9"))
    assert code == EXIT_CODE
    assert "fit: stopped after step 13 of 24; the same command with --resume auto resumes" in printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "requested", lambda self: True)
        code, printed = program(*flags(work, copy, *SHORT))
    assert (code, "stopped before training" in printed) == (EXIT_CODE, True)


def test_a_run_of_a_version_with_fewer_fields_goes_on(work, short, copy):
    config = json.loads((copy / "config.json").read_text())
    del config["fit"]["lora_plus"], config["save"]
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "config.json.draft").write_text("{")
    assert program(*flags(work, copy, *SHORT))[0] == 0
    assert_same_run(copy, short)


def test_another_configuration_is_refused_field_by_field(work, copy):
    """But how it is computed, watched and saved may be another."""
    code, printed = program(*flags(work, copy, *SHORT, "--lora.rank", "3", "--fit.clip", "None"))
    assert code == 2
    assert "holds a run with another configuration:\n  - fit.clip: the run has 1.0, got null\n" in printed
    assert "  - lora.rank: the run has 2, got 3\n" in printed
    assert HOW == (
        "cache_dir", "compute", "log", "model.attention", "processes", "resume", "run_dir", "save", "sweep.at_once",
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_resumes_in_another_layout(work, short, copy):
    """To 1e-6; without dropout, which each device draws for its rows."""
    plain = ("--lora.dropout", "0", "--model.no-dropout")
    folder = copy.parent / "plain"
    stopped(work, folder, 15, *plain)
    for layout in ("pmap", "mesh --compute.fsdp 4"):
        with stopping(3):
            code, printed = program(
                *flags(work, folder, *SHORT, *plain, "--compute.accumulate", "1", "--compute.layout", *layout.split())
            )
        assert code == EXIT_CODE, printed
    code, printed = program(*flags(work, folder, *SHORT, *plain))
    assert code == 0, printed
    assert program(*flags(work, copy.parent / "one", *SHORT, *plain))[0] == 0
    for one, other in zip(records(folder), records(copy.parent / "one"), strict=True):
        assert one.pop("phase") == other.pop("phase")
        assert one == pytest.approx(other, abs=1e-6, rel=1e-6)


def test_a_run_directory_belongs_to_one_run_at_a_time(work, copy):
    with filelock.FileLock(RunDirectory(copy).lock_file):
        code, printed = program(*flags(work, copy, *SHORT))
    assert (code, "is in use by another training process" in printed) == (2, True)


def test_a_finished_run_is_left_alone(work, short):
    before = content(short)
    code, printed = program(*flags(work, short, *SHORT, "--compute.accumulate", "1"))
    assert (code, "is finished: nothing is left to train" in printed) == (0, True)
    code, printed = program(*flags(work, short, *SHORT, "--resume", "8"))
    assert (code, "resume: got step 8, and" in printed and "is finished" in printed) == (2, True)
    assert content(short) == before


def test_what_is_no_run_is_refused(work, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    code, printed = program(*flags(work, tmp_path, *SHORT))
    assert (code, "holds letter.txt and no run (it has no config.json)" in printed) == (2, True)
    assert [one.name for one in tmp_path.iterdir()] == ["letter.txt"]


def test_resume_never_and_nothing_to_resume(work, copy, tmp_path):
    code, printed = program(*flags(work, copy, *SHORT, "--resume", "never"))
    assert (code, "holds a run, and resume is never" in printed) == (2, True)
    code, printed = program(*flags(work, tmp_path / "new", *SHORT, "--resume", "8"))
    assert (code, "resume: got step 8, and there is no run in" in printed) == (2, True)


def test_the_same_command_finds_its_unfinished_run(work, short, tmp_path, monkeypatch):
    """Without a run directory: the newest of this configuration that has a checkpoint; finished ones are left alone."""
    config = Path("configs/sst2_minilm.py").resolve()
    monkeypatch.chdir(tmp_path)
    argv = [str(config), *flags(work, None, *SHORT)[1:]]
    with stopping(15):
        assert program(*argv)[0] == EXIT_CODE
    code, printed = program(*argv, "--resume", "never", "--fit.epochs", "1")
    assert code == 0, printed
    code, printed = program(*argv)
    assert code == 0, printed
    folders = sorted(Path("runs").iterdir())
    assert f"resuming {folders[0]} after step 13" in printed
    assert_same_run(folders[0], short)
    assert len(folders) == 2
    assert folders[1].name.startswith(folders[0].name[:-6])
    names = [_new_below_runs(parse([*argv])).name for _ in range(3)]
    assert len(set(names)) == 3


# Disks


@pytest.mark.slow
def test_a_full_disk_leaves_older_checkpoints_usable(work, processes, short, copy):
    before = steps(copy)
    one = launch(processes, flags(work, copy, *SHORT), copy.parent / "printed.txt", limit=size(copy) + 2000)
    one.join(60)
    printed = (copy.parent / "printed.txt").read_text()
    assert one.exitcode == 2, printed
    assert "a checkpoint could not be written" in printed and "Usable: " in printed
    assert set(before[-2:]) <= set(steps(copy))
    code, printed = program(*flags(work, copy, *SHORT))
    assert code == 0, printed
    assert_same_run(copy, short)


def test_a_directory_that_cannot_be_written_is_told(work, tmp_path):
    (tmp_path / "file").touch()
    code, printed = program(*flags(work, tmp_path / "file" / "run", *SHORT))
    assert (code, "expected a directory that is writable; pass --run-dir DIR" in printed) == (2, True), printed
    (tmp_path / "run").mkdir()
    code, printed = program(*flags(work, Path("/proc/run"), *SHORT))
    assert (code, "expected a directory that is writable" in printed) == (2, True), printed


# Trainings that end early


def test_a_training_that_diverges_is_stopped_before_it_is_saved(work, tmp_path):
    """The step, its examples and the newest checkpoint are named, and every checkpoint is finite."""
    argv = flags(work, tmp_path / "run", *SHORT, "--learning-rate.lora", "1e18", "--fit.clip", "None")
    code, printed = program(*argv, "--fit.schedule", "linear", "--fit.warmup", "0.9", "--save.every-steps", "1")
    assert code == 2
    found = re.search(r"error: fit: .* loss \S+ and gradient norm (?:nan|inf) in step (\d+)", printed)
    assert found, printed
    step = int(found[1])
    saved = steps(tmp_path / "run")
    assert f"; the newest checkpoint, of step {saved[-1]}, is from before" in printed
    assert saved[-1] == step - 1 >= 1
    assert "on the training examples " in printed


@pytest.mark.slow
def test_early_stopping_ends_when_nothing_became_better(work, tmp_path):
    """Two measurements without a new best after the first; a run that is stopped meanwhile counts on."""
    more = ("--learning-rate.lora", "1e-9", "--fit.patience", "2", "--eval-every-steps", "3", "--eval-every", "9")
    folder = tmp_path / "run"
    stopped(work, folder, 10, *more)
    assert program(*flags(work, folder, *SHORT, *more))[0] == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["kept_step"]) == (9, 3)
    measured = [one["step"] for one in records(folder) if "validation_accuracy" in one]
    assert measured == [3, 6, 9]
