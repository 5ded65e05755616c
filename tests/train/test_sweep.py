"""Laws of a sweep: each member is its single run, whatever the others do, and whenever the sweep is stopped."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import chex
import pytest

import jlora
from tests import tiny
from tests.runs import assert_same_curve, assert_same_run, content, program, records, start, stopping
from train.config import ConfigError
from train.loop.state import Intervals, PrimaryMetric
from train.loop.stop import EXIT_CODE
from train.sweep.files import MemberFiles
from train.sweep.halving import left_behind, rungs

RUN = "--fit.epochs 3 --eval-every-steps 4 --save.every-steps 3 --log-every 1"
TIMES = {
    "step_seconds", "examples_per_second", "tokens_per_second", "input", "peak_memory_bytes", "training_seconds",
    "run_dir", "seconds", "loss_tokens_per_second", "mfu",
}  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder without a head, and two data sets, the second of which has fewer rows."""
    work = tiny.write_sentiment(tmp_path_factory.mktemp("sweep"))
    tiny.write_jsonl(work / "other.jsonl", tiny.sentences(40, start=200))
    return work


def run(work: Path, folder: Path, *more: str) -> str:
    """What the program printed."""
    code, printed = program(*tiny.sentiment_flags(work, folder, RUN, *(one.format(work) for one in more)))
    assert code == 0, printed
    return printed


def refused(work: Path, folder: Path | None, *more: str) -> str:
    """The error of a run that is refused."""
    code, printed = program(*tiny.sentiment_flags(work, folder, RUN, *(one.format(work) for one in more)))
    assert code == 2, printed
    return printed


def member(folder: Path, name: str) -> Path:
    return folder / "members" / name


def summary_of(folder: Path) -> dict[str, Any]:
    """A summary without times."""
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in TIMES}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """How the members of a sweep ended, by name."""
    return {one["name"]: one for one in summary_of(folder)["members"]}


def assert_single_run(found: Path, single: Path) -> None:
    """Adapters, records and summary to 1e-5, and the same configuration, data and plan."""
    one, other = jlora.load(found / "adapters"), jlora.load(single / "adapters")
    chex.assert_trees_all_equal_shapes_and_dtypes(one, other)
    chex.assert_trees_all_close(one, other, rtol=0, atol=1e-5)
    assert_same_curve(*map(without_padding, (found, single)))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (found, single)]
    assert {**configs[0], "run_dir": None} == {**configs[1], "run_dir": None}
    assert [(found / name).read_bytes() for name in ("data.json", "plan.txt")] == [
        (single / name).read_bytes() for name in ("data.json", "plan.txt")
    ]
    summaries = [summary_of(folder) for folder in (found, single)]
    assert close(*summaries), summaries
    files = [{file.name for file in folder.iterdir()} - {"curves.png"} for folder in (found, single)]
    assert files[0] == files[1] - {"checkpoints", "run.lock"}


def without_padding(folder: Path) -> list[dict[str, Any]]:
    """Records; texts are padded to the longest of all members."""
    return [{name: value for name, value in one.items() if name != "padding"} for one in records(folder)]


def close(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, numbers to 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[name], other[name]) for name in one)
    return one == (pytest.approx(other, abs=1e-5) if isinstance(other, float) else other)


@pytest.fixture(scope="module")
def seeds(work) -> Path:
    """A sweep over two seeds and two ranks, kept where it was best."""
    run(work, work / "seeds", "--sweep.rank 2,3 --sweep.seed 0,1 --learning-rate 0.01 --keep best")
    return work / "seeds"


def test_a_member_is_a_finished_run_like_its_single_run(work, seeds, tmp_path):
    """Its head is of its own seed, as is that of the base to which it is compared."""
    run(work, tmp_path / "one", "--lora.rank 3 --seed 1 --learning-rate 0.01 --keep best")
    assert_single_run(member(seeds, "rank3-seed1"), tmp_path / "one")
    found = summary_of(seeds)
    assert [one["status"] for one in found["members"]] == ["finished"] * 4
    best = max(found["members"], key=lambda one: one["metric"])
    assert (found["best"], found["best_run_dir"]) == (best["name"], str(member(seeds, best["name"])))
    assert not (seeds / "checkpoints/0").exists()
    assert [one["name"] for one in found["members"] if (member(seeds, one["name"]) / "curves.png").is_file()] == [
        best["name"]
    ]


def test_commands_take_a_member_and_not_a_sweep(seeds, tmp_path):
    """The error names the best member, which they take."""
    best = member(seeds, summary_of(seeds)["best"])
    commands = (
        ["predict", "--text", "a great film"],
        ["eval"],
        ["export", "--to", "peft", "--out", str(tmp_path / "peft")],
        ["report", "--out", str(tmp_path / "report.html")],
    )
    for name, *more in commands:
        code, printed = program(name, str(seeds), *more)
        assert (code, f"its best is {best}" in printed) == (2, True), printed
        code, printed = program(name, str(best), *more)
        assert code == 0, printed


def test_a_finished_sweep_is_not_trained_again(work, seeds):
    """The same command says so; another one is refused, that of a single run too; and no file changes."""
    before = content(seeds)
    swept = "--sweep.rank 2,3 --sweep.seed 0,1 --learning-rate 0.01 --keep best"
    assert "is finished: nothing is left to train" in run(work, seeds, swept)
    assert "a finished sweep, which is not trained further" in refused(work, seeds, swept, "--fit.epochs 4")
    assert "sweep.rank" in refused(work, seeds, "--sweep.rank 2,4 --sweep.seed 0,1 --learning-rate 0.01 --keep best")
    assert "sweep.rank" in refused(work, seeds, "--learning-rate 0.01 --keep best")
    single = member(seeds, "rank2-seed0")
    assert "sweep.rank" in refused(work, single, "--sweep.rank 2,3 --seed 0 --learning-rate 0.01 --keep best")
    after = content(seeds)
    assert {name: after[name] for name in before} == before
    assert {Path(name).name for name in after.keys() - before.keys()} <= {"run.lock"}


@pytest.fixture(scope="module")
def diverging(work) -> Path:
    run(work, work / "diverging", "--sweep.lr 0.01,1e30,0.02")
    return work / "diverging"


def test_a_member_that_diverges_ends_alone(work, diverging, tmp_path):
    """The others end bit for bit as beside one that does not."""
    run(work, tmp_path / "good", "--sweep.lr 0.01,0.03,0.02")
    for name in ("lr0.01", "lr0.02"):
        assert_same_run(member(diverging, name), member(tmp_path / "good", name))
    found = results(diverging)
    assert found["lr1e+30"]["status"].startswith("diverged in step 2: loss ")
    assert (found["lr1e+30"]["metric"], found["lr1e+30"]["run_dir"]) == (None, None)
    assert not (member(diverging, "lr1e+30") / "summary.json").exists()
    assert [found[name]["status"] for name in ("lr0.01", "lr0.02")] == ["finished"] * 2


@pytest.mark.slow
def test_a_sweep_of_which_all_members_diverge_ends_without_a_best_one(work, tmp_path):
    printed = run(work, tmp_path / "run", "--sweep.lr 1e30,1e31")
    assert "best:" not in printed
    assert summary_of(tmp_path / "run")["best"] is None
    code, printed = program("eval", str(tmp_path / "run"))
    assert (code, "none of its runs has a result" in printed) == (2, True), printed


SWEEPS = {
    "rounds": "--sweep.lr 0.01,0.02,0.03 --sweep.at-once 2 --lora.dropout 0.1",
    "best": "--sweep.rank 2,3 --sweep.seed 0,1 --keep best",
    "patience": "--sweep.lr 0.03,1e-9,1e-10 --fit.patience 2",
    "halving": "--sweep.rank 2,3 --sweep.lr 0.01,0.03 --sweep.halving 2",
    "data sets": "--sweep.data {0}/train.jsonl,{0}/other.jsonl --sweep.rank 2,3",
    "diverging": "--sweep.lr 0.01,1e30,1e31",
}


def stop_again_and_again(work: Path, folder: Path, swept: str, times: int, rng: random.Random) -> int:
    """How often a sweep was stopped, at random questions, before it ended."""
    for stops in range(times):
        with stopping(after=rng.randint(0, 9)):
            code, printed = program(*tiny.sentiment_flags(work, folder, RUN, swept))
        assert code in (0, EXIT_CODE), printed
        if code == 0:
            return stops
    run(work, folder, swept)
    return times


@pytest.mark.slow
@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_that_is_stopped_again_and_again_is_the_sweep_that_is_not(work, tmp_path, kind):
    swept = SWEEPS[kind].format(work)
    run(work, tmp_path / "whole", swept)
    assert stop_again_and_again(work, tmp_path / "run", swept, 10, random.Random(kind)) >= 4
    ended = [summary_of(tmp_path / name) for name in ("run", "whole")]
    for one, other in zip(*(summary["members"] for summary in ended), strict=True):
        assert {**one, "run_dir": None} == {**other, "run_dir": None}
        found, whole = (member(tmp_path / name, one["name"]) for name in ("run", "whole"))
        if one["run_dir"] is not None:
            assert_same_run(found, whole)
            assert summary_of(found) == summary_of(whole)
        assert records(found) == records(whole)


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_is_the_sweep_that_is_not(work, tmp_path):
    """At 10 random moments: while it compiles, steps, measures, saves, and begins the next round."""
    swept = "--sweep.lr 0.01,0.02,0.03 --sweep.at-once 2 --keep best --fit.epochs 20".split()
    argv = [tiny.sentiment_flags(work, tmp_path / name, RUN, *swept) for name in ("whole", "run")]
    finish(argv[0])
    rng, stages = random.Random(0), set()
    for _ in range(10):
        one, seen = start(*argv[1]), lines(tmp_path / "run")
        wait_for = rng.randint(1, 60)
        until = time.monotonic() + 60
        while lines(tmp_path / "run") in range(seen - 60, seen + wait_for) and one.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.002)
        one.kill()
        one.communicate()
        stages.add(json.dumps(json.loads((tmp_path / "run/sweep.json").read_text())["rounds"], sort_keys=True))
    assert not (tmp_path / "run/summary.json").exists() and len(stages) == 2
    finish(argv[1])
    for name in results(tmp_path / "whole"):
        found, whole = (member(tmp_path / folder, name) for folder in ("run", "whole"))
        assert_same_run(found, whole)
        assert summary_of(found) == summary_of(whole)


def finish(argv: list[str]) -> None:
    one = start(*argv)
    printed = one.communicate(timeout=120)[0]
    assert one.returncode == 0, printed


def lines(folder: Path) -> int:
    """How many records all members have."""
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("members/*/metrics.jsonl"))


@pytest.mark.slow
def test_halving_and_patience_drop_members_alone(work, tmp_path):
    """What is dropped, and what trained on in a smaller program, is the part of a single run or all of it."""
    run(work, tmp_path / "run", SWEEPS["halving"])
    found = results(tmp_path / "run")
    left = [one for one in found.values() if one["status"] == "finished"]
    assert len(left) == 1
    dropped = [one["status"] for one in found.values() if one is not left[0]]
    assert (
        sorted(dropped)
        == ["dropped: 1 of 2 were better (sweep.halving)"] + ["dropped: 2 of 4 were better (sweep.halving)"] * 2
    )
    values = left[0]["values"]
    run(work, tmp_path / "one", f"--lora.rank {values['rank']} --learning-rate {values['lr']}")
    assert_single_run(member(tmp_path / "run", left[0]["name"]), tmp_path / "one")


@pytest.mark.slow
def test_a_file_that_cannot_be_written_ends_a_sweep_which_then_resumes(work, diverging, tmp_path, monkeypatch):
    """As on a full disk: an error with the file, and no member is lost or counted twice."""
    write, count = MemberFiles.save, 0

    def save(self: MemberFiles, adapters: Any) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(28, "No space left on device", str(self.directory.adapters))
        write(self, adapters)

    monkeypatch.setattr(MemberFiles, "save", save)
    printed = refused(work, tmp_path / "run", "--sweep.lr 0.01,1e30,0.02")
    assert "error: [Errno 28] No space left on device" in printed and "lr0.02/adapters" in printed
    monkeypatch.undo()
    run(work, tmp_path / "run", "--sweep.lr 0.01,1e30,0.02")
    for name in ("lr0.01", "lr0.02"):
        assert_same_run(member(tmp_path / "run", name), member(diverging, name))


@pytest.mark.slow
def test_generate_takes_a_member_of_a_language_models_sweep(tmp_path):
    tiny.write_checkpoint(tmp_path / "decoder", tiny.DECODER, task="causal-lm")
    rows = [{"question": f"{i} + {j} =", "answer": str(i + j)} for i in range(5) for j in range(4)]
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    code, printed = program(
        "configs/instruct_llama.py", "--model.path", str(tmp_path / "decoder"), "--data.train",
        str(tmp_path / "train.jsonl"), "--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run"),
        *(
            "--data.validation None --data.holdout 0.2 --model.dtype float32 --model.param-dtype float32 "
            "--task.max-length 32 --task.no-pack --task.messages None --task.prompt question --task.completion answer "
            "--fit.epochs 1 --fit.batch-size 4 --compute.layout jit --sweep.rank 1,2 --lora.dropout 0.1"
        ).split(),
    )  # fmt: skip
    assert code == 0, printed
    best = member(tmp_path / "run", summary_of(tmp_path / "run")["best"])
    code, printed = program("generate", str(best), "--prompt", "1 + 1 =", "--max-new-tokens", "3")
    assert code == 0, printed
    code, printed = program("generate", str(tmp_path / "run"), "--prompt", "1 + 1 =")
    assert (code, f"its best is {best}" in printed) == (2, True), printed


# Several data sets


@pytest.mark.slow
def test_each_data_set_has_the_adapters_of_its_single_run(work, tmp_path):
    """A folder of data sets, or their names: a run directory for each, of as many steps as it has rows for."""
    folder = tmp_path / "customers"
    for name, rows in (("acme", 40), ("umbrella", 24)):
        tiny.write_jsonl(folder / f"{name}.jsonl", tiny.sentences(rows, start=rows))
    shutil.copy(work / "validation.jsonl", folder)
    files = f"{folder}/acme.jsonl,{folder}/umbrella.jsonl"
    run(work, tmp_path / "run", f"--data.train {files}")
    found = results(tmp_path / "run")
    assert {name: one["steps"] for name, one in found.items()} == {"acme": 15, "umbrella": 9}
    summary = summary_of(tmp_path / "run")
    assert (summary["best"], summary["best_of_data"]) == (
        None,
        {f"{folder}/{name}.jsonl": name for name in ("acme", "umbrella")},
    )
    run(work, tmp_path / "one", f"--data.train {folder}/umbrella.jsonl")
    assert_single_run(member(tmp_path / "run", "umbrella"), tmp_path / "one")
    code, printed = program("eval", str(tmp_path / "run"))
    assert code == 2 and all(str(member(tmp_path / "run", name)) in printed for name in found), printed
    assert "is finished" in run(work, tmp_path / "run", f"--data.train {files}")
    assert "sweep.data" in refused(work, tmp_path / "run", f"--sweep.data {folder}")


@pytest.mark.slow
def test_data_sets_of_other_labels_are_refused_until_all_are_stated(work, tmp_path):
    """The error names the field to pass, which works."""
    rows = [{"sentence": f"a {word} film", "label": name} for word, name in (("great", "up"), ("dull", "down"))] * 8
    files = [tiny.write_jsonl(tmp_path / f"{i}/train.jsonl", rows[i:]) for i in range(2)]
    files.append(tiny.write_jsonl(tmp_path / "2/train.jsonl", [*rows, {"sentence": "a film", "label": "so"}] * 2))
    swept = f"--task.labels None --data.validation None --data.holdout 0.25 --sweep.data {','.join(map(str, files))}"
    printed = refused(work, tmp_path / "run", swept)
    assert "needs another task than" in printed and "--task.labels" in printed
    assert not (tmp_path / "run").exists()
    run(work, tmp_path / "run", swept.replace("--task.labels None", "--task.labels down so up"), "--fit.epochs 1")
    assert len(results(tmp_path / "run")) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sweep.rank 2,2", "sweep.rank: got (2, 2), expected whole numbers >= 1, each once"),
        ("--sweep.rank 2,0", "sweep.rank: got (2, 0), expected whole numbers >= 1, each once"),
        ("--sweep.lr 0.01 --sweep.halving 2", "halving: got 2 with one training"),
        ("--sweep.data {0}/train.jsonl,{0}/other.jsonl --sweep.halving 2", "metrics on different data do not compare"),
        ("--sweep.at-once 2", "at_once: got 2, but nothing is swept"),
        ("--sweep.rank 2,3 --mode head", "sweep.rank: got (2, 3) with mode 'head', which has no adapters"),
        ("--sweep.rank 2,3 --compute.layout pmap", "compute.layout: got 'pmap' with a sweep"),
        ("--sweep.rank 2,3 --resume 3", "resume: got step 3 with a sweep"),
        ("--sweep.data {0}/train.jsonl,{0}/none.jsonl", "none.jsonl"),
        ("--sweep.lr 0.01,0.02 --sweep.halving 2 --eval-every-steps 99", "pass a smaller --eval-every-steps"),
    ],
)
def test_what_cannot_be_swept_is_refused(work, tmp_path, flags, message):
    assert message in refused(work, tmp_path / "run", flags)
    assert not (tmp_path / "run/members").exists()


# Rounds


@pytest.mark.slow
def test_members_that_do_not_fit_in_memory_are_trained_in_rounds(work, tmp_path, monkeypatch):
    """By the compiler's account of the step; a resumed sweep keeps the rounds, wherever it is resumed."""
    swept = "--sweep.lr 0.01,0.02,0.03"
    run(work, tmp_path / "whole", swept)
    monkeypatch.setattr("train.sweep.program.device_memory", lambda _: 1)
    with stopping(after=4):
        code, printed = program(*tiny.sentiment_flags(work, tmp_path / "run", RUN, swept))
    assert code == EXIT_CODE, printed
    assert "3 members at once do not fit in memory: trying 2" in printed
    assert "2 members at once do not fit in memory: trying 1" in printed
    assert json.loads((tmp_path / "run/sweep.json").read_text())["at_once"] == {"0": 1}
    monkeypatch.undo()
    printed = run(work, tmp_path / "run", swept)
    assert "do not fit" not in printed and "round 3: lr0.03" in printed
    for name in results(tmp_path / "whole"):
        assert_single_run(member(tmp_path / "run", name), member(tmp_path / "whole", name))


# Halving


def every(steps: int) -> Intervals:
    return Intervals(epoch=10, steps=100, log=1, eval=steps)


@pytest.mark.parametrize(
    ("count", "factor", "expected"),
    [
        (8, 2, {15: 4, 25: 2, 50: 1}),
        (9, 3, {15: 3, 35: 1}),
        (12, 4, {25: 3}),
        (2, 2, {50: 1}),
        (3, 4, {25: 1}),
        (27, 3, {5: 9, 15: 3, 35: 1}),
    ],
)
def test_rungs(count, factor, expected):
    """Each rung is at the first evaluation from its share of the steps on, and leaves count // factor**k."""
    assert rungs(every(5), count, factor) == expected


def test_rungs_of_few_evaluations_are_one_and_without_any_there_is_no_halving():
    assert rungs(every(60), 8, 2) == {60: 1}
    with pytest.raises(ConfigError, match="pass a smaller --eval-every-steps"):
        rungs(every(100), 8, 2)


@pytest.mark.parametrize("higher", [True, False])
def test_the_best_go_on(higher):
    """Nothing and NaN are the worst, and the first goes on where two are equal."""
    sign = 1 if higher else -1
    metric = PrimaryMetric("x", higher)
    values = [None, sign * 1.0, float("nan"), sign * 3.0, sign * 3.0, sign * 2.0]
    for keep, left in ((6, []), (4, [0, 2]), (2, [0, 1, 2, 5]), (1, [0, 1, 2, 4, 5])):
        assert left_behind(values, keep, metric) == left
