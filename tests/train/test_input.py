"""The input side: examples cached on disk and memory-mapped, batches built ahead of their steps, and what is read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.runs import ROOT, assert_same_run, free_port, program, records, stopping
from train.compute.layouts import Mesh
from train.config import CausalLM, ConfigError, SequenceClassification
from train.data import batches, tables
from train.data.cache_folder import filled
from train.data.ragged import Examples, Kind, Ragged, RaggedWriter
from train.data.tables import Table
from train.job import encoded_table
from train.loop import feed
from train.loop.state import LoopState
from train.loop.stop import EXIT_CODE
from train.networks.tokenizers import load_tokenizer, set_up
from train.tasks.classify import TextClassification, TextRegression
from train.tasks.encoding import Draft
from train.tasks.language import LanguageModel


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """An encoder and a decoder, and rows for every task on texts."""
    folder = tiny.write_sentiment(tmp_path_factory.mktemp("input"))
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm", chat=True)
    rows = tiny.sentences(64)
    for i, row in enumerate(rows):
        turns = [{"role": "user", "content": "the film"}, {"role": "assistant", "content": row["sentence"], "x": i}]
        row |= {"answer": "" if i % 7 == 0 else row["name"], "messages": turns[: 1 if i % 5 == 0 else 2]}
    tiny.write_jsonl(folder / "rows.jsonl", rows)
    return folder


TASKS: dict[str, Any] = {
    "classes": SequenceClassification(text="sentence", label="label", labels=("0", "1"), max_length=8),
    "pairs": SequenceClassification(text="sentence", pair="name", label="name", labels=("bad", "good"), max_length=16),
    "scores": SequenceClassification(text="sentence", label="score", regression=True, max_length=16),
    "texts": CausalLM(text="sentence", max_length=12, pack=False),
    "packed": CausalLM(text="sentence", max_length=12, pack=True),
    "answers": CausalLM(prompt="sentence", completion="answer", max_length=6, pack=False),
    "prompts too": CausalLM(prompt="sentence", completion="answer", max_length=6, pack=True, learn_prompt=True),
    "chats": CausalLM(messages="messages", max_length=32, pack=False),
}


def task_of(work: Path, name: str, **changes: Any) -> Any:
    config = TASKS[name] if not changes else TASKS[name].__class__(**{**vars(TASKS[name]), **changes})
    tokenizer = set_up(load_tokenizer(str(work / ("decoder" if isinstance(config, CausalLM) else "encoder"))), config)
    if isinstance(config, CausalLM):
        return LanguageModel(config, tokenizer)
    kind = TextRegression if config.regression else TextClassification
    return kind(config, config.labels or (), tokenizer)


def rows_of(work: Path, keep: Any = None) -> Table:
    table = tables.read(str(work / "rows.jsonl"), work / "cache", "data.train")
    return table if keep is None else table.keep(keep, "not kept")


def with_output(encode: Callable[[], Any]) -> tuple[Any, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return encode(), out.getvalue()


def assert_same(found: Examples, expected: Examples) -> None:
    assert list(found) == list(expected)
    for name, column in expected.items():
        other = found[name]
        if isinstance(column, Ragged):
            assert isinstance(other, Ragged)
            facts = ("kind", "longest", "largest", "truncation")
            assert [getattr(other, fact) for fact in facts] == [getattr(column, fact) for fact in facts]
            assert [one.tolist() for one in other] == [one.tolist() for one in column]
            assert (other.counts is None) == (column.counts is None)
            assert other.counts is None or other.counts.tolist() == column.counts.tolist()  # pyright: ignore
        else:
            assert isinstance(other, np.ndarray) and other.dtype == column.dtype and other.tolist() == column.tolist()


# The cache


@pytest.mark.parametrize("keep", [None, range(50, 10, -1)], ids=["all rows", "some rows"])
@pytest.mark.parametrize("name", TASKS)
def test_what_is_read_from_the_cache_is_what_was_encoded(work, tmp_path, monkeypatch, name, keep):
    """The same columns, messages, truncation and provenance, whether encoded in memory, to disk, or read from there."""
    task, memory, disk, again = task_of(work, name), *(rows_of(work, keep) for _ in range(3))
    assert memory.provenance and disk.provenance and again.provenance
    expected, printed = with_output(lambda: task.encode(memory)[""])
    assert with_output(lambda: encoded_table(task, disk, tmp_path)[""])[1] == printed
    assert (printed == "") == (name not in ("answers", "chats"))
    with monkeypatch.context() as patch:
        patch.setattr(type(task), "encode", None)
        found, repeated = with_output(lambda: encoded_table(task_of(work, name), again, tmp_path)[""])
    assert repeated == printed
    assert_same(found, expected)
    assert memory.provenance.to_json() == disk.provenance.to_json() == again.provenance.to_json()
    if name in ("answers", "chats"):
        assert any("without a token that carries loss" in why for why in again.provenance.dropped)
    assert isinstance(found["input_ids"], Ragged) and not found["input_ids"].values.flags.writeable


def test_the_cache_is_keyed_by_all_that_decides(work, tmp_path):
    """Rows and their order, the task's fields, the tokenizer; not the file's name or a tokenizer's past calls."""

    def entries() -> int:
        return len(list((tmp_path / "cache" / "examples").glob("*[!k]")))

    def encode(task: Any, table: Table) -> int:
        encoded_table(task, table, tmp_path / "cache")
        return entries()

    assert encode(task_of(work, "classes"), rows_of(work)) == 1
    used = task_of(work, "classes")
    used.tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    shutil.copytree(work / "encoder", tmp_path / "encoder")
    used.tokenizer = set_up(load_tokenizer(str(tmp_path / "encoder")), used.config)
    shutil.copyfile(work / "rows.jsonl", tmp_path / "copy.jsonl")
    assert encode(used, tables.read(str(tmp_path / "copy.jsonl"), work / "cache", "data.train")) == 1
    assert encode(task_of(work, "classes"), rows_of(work, range(30))) == 2
    assert encode(task_of(work, "classes"), rows_of(work, range(29, -1, -1))) == 3
    assert encode(task_of(work, "classes", max_length=9), rows_of(work)) == 4
    assert encode(task_of(work, "classes", truncation="left"), rows_of(work)) == 5
    assert encode(task_of(work, "classes", labels=("1", "0")), rows_of(work)) == 6
    file = tmp_path / "encoder" / "tokenizer.json"
    file.write_text(file.read_text().replace("film", "movie"))
    used.tokenizer = set_up(load_tokenizer(str(tmp_path / "encoder")), used.config)
    assert encode(used, rows_of(work)) == 7
    with (tmp_path / "copy.jsonl").open("a") as stream:
        stream.write((work / "rows.jsonl").read_text().splitlines()[0])
    assert encode(task_of(work, "classes"), tables.read(str(tmp_path / "copy.jsonl"), work / "cache", "x")) == 8


def flipped(file: Path) -> None:
    file.write_bytes(bytes([255 - file.read_bytes()[0]]) + file.read_bytes()[1:])


DAMAGE = {
    "flipped": lambda folder: flipped(folder / "input_ids"),
    "cut short": lambda folder: (folder / "offsets").write_bytes(b"12345678"),
    "without a file": lambda folder: (folder / "label").unlink(),
    "without checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "garbled": lambda folder: (folder / "examples.json").write_text("{"),
    "empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_written_again(work, tmp_path, damage):
    expected = encoded_table(task_of(work, "classes"), rows_of(work), tmp_path)[""]
    (folder,) = (one for one in (tmp_path / "examples").iterdir() if one.is_dir())
    before = {name: list(map(np.array, column)) for name, column in expected.items()}
    DAMAGE[damage](folder)
    found = encoded_table(task_of(work, "classes"), rows_of(work), tmp_path)[""]
    for name, column in found.items():
        for one, other in zip(column, before[name], strict=True):
            np.testing.assert_array_equal(one, other)
    assert [one for one in (tmp_path / "examples").iterdir() if one.is_dir()] == [folder]


def test_an_error_leaves_nothing_and_is_repeated(work, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match="none of the 64 examples has a token that carries loss"):
            encoded_table(task_of(work, "answers", max_length=1), rows_of(work), tmp_path)
        assert not [one for one in (tmp_path / "examples").iterdir() if one.is_dir()]


WRITER = """if True:
    import os, sys, time
    from pathlib import Path
    from train.data.cache_folder import filled
    def write(draft):
        (draft / "values").write_bytes(b"half")
        print(os.getpid(), flush=True)
        time.sleep(float(sys.argv[2]))
        (draft / "values").write_bytes(b"whole")
    filled(Path(sys.argv[1]), write)
    assert (Path(sys.argv[1]) / "values").read_bytes() == b"whole"
"""


def writer(folder: Path, seconds: float) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", WRITER, str(folder), str(seconds)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_leaves_nothing_half(tmp_path):
    with writer(tmp_path / "entry", 60) as one:
        assert one.stdout is not None and int(one.stdout.readline()) == one.pid
        one.send_signal(signal.SIGKILL)
    assert not (tmp_path / "entry").exists()

    def write(draft: Path) -> None:
        (draft / "values").write_bytes(b"whole")

    filled(tmp_path / "entry", write)
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_dir()) == ["entry"]
    assert (tmp_path / "entry" / "values").read_bytes() == b"whole"


def test_of_processes_that_share_a_cache_one_writes(tmp_path):
    found = [writer(tmp_path / "entry", 1.0) for _ in range(3)]
    printed = [one.communicate(timeout=60)[0] for one in found]
    assert [one.returncode for one in found] == [0, 0, 0]
    assert sum(bool(text) for text in printed) == 1


@pytest.mark.parametrize("name", ["classes", "packed"])
def test_memory_does_not_grow_with_the_rows(work, tmp_path, monkeypatch, name):
    """Ten times the rows take as much memory to encode, but for a few numbers a row."""
    monkeypatch.setattr(tables, "SLICE", 500)
    task, peaks = task_of(work, name), []
    source = tiny.sentences(64)
    for count in (2_000, 20_000):
        table = Table.from_dict({key: [source[i % 64][key] for i in range(count)] for key in ("sentence", "label")})
        (folder := tmp_path / str(count)).mkdir()
        tracemalloc.start()
        examples = task.encode(table, Draft(folder))[""]
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert batches.size(examples) > count // 4
    assert peaks[1] < 1.25 * peaks[0] + 20 * 18_000, peaks  # the tokens alone would be ten times the first


# Columns and batches


def padded(rows: list[list[int]], length: int, fill: int, left: bool) -> list[list[int]]:
    return [[fill] * (length - len(row)) + row if left else row + [fill] * (length - len(row)) for row in rows]


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "files"])
def test_batches_are_padded_rows(tmp_path, folder):
    """Of columns of any lengths, 0 too, written in any parts, on both sides; and a column of ones is not stored."""
    rng = np.random.default_rng(0)
    for case in range(20):
        kinds = {"x": Kind(-1, left=case % 2 == 1), "ones": Kind(7, None), "mask": Kind(3, "uint8", counted=True)}
        rows = [rng.integers(0, 9, rng.integers(0, 6)).tolist() for _ in range(case)]
        masks = [[int(value > 4) for value in row] for row in rows]
        with RaggedWriter(kinds, tmp_path if folder else None) as writer:
            for start in range(0, case, 3):
                writer.add({"x": rows[start : start + 3], "mask": masks[start : start + 3]})
        columns = writer.columns()
        assert [one.tolist() for one in columns["x"]] == rows
        assert columns["x"].lengths().tolist() == list(map(len, rows))
        assert columns["x"].largest == max((max(row, default=0) for row in rows), default=0)
        assert columns["x"].longest == max(map(len, rows), default=0)
        chosen = rng.permutation(case)[: case // 2 + 1]
        batch, ones = batches.batch_of(columns, chosen, (4, 8)), [[1] * len(row) for row in rows]
        length = 4 if max((len(rows[row]) for row in chosen), default=0) <= 4 else 8
        for name, values in (("x", rows), ("ones", ones), ("mask", masks)):
            wanted = padded([values[row] for row in chosen], length, kinds[name].fill, kinds[name].left)
            assert batch[name].tolist() == wanted and batch[name].dtype == np.int32
        counted = sum(sum(masks[row][1:]) for row in chosen)
        assert batches.token_counts(columns, chosen) == (sum(len(rows[row]) for row in chosen), counted)
        assert set(file.name for file in tmp_path.iterdir()) <= {"x", "mask", "offsets", "counts"}


class Watched(np.ndarray):
    """Values that record which of them are read."""

    read: set[int]

    def __getitem__(self, index: Any) -> Any:
        self.read |= set(np.arange(self.size)[index].ravel().tolist())
        return np.asarray(self)[index]


def test_a_batch_reads_its_own_rows_only():
    column = Ragged.of([[i] * (1 + i % 5) for i in range(40)])
    values = column.values.view(Watched)
    values.read = set()
    column = Ragged(column.kind, values, column.offsets, column.longest, column.largest)
    rows = np.array([3, 17, 30])
    batches.batch_of({"x": column}, rows, batches.bucket_of({"x": column}, np.arange(40), (8,)))
    assert values.read == {place for row in rows for place in range(column.offsets[row], column.offsets[row + 1])}


# Ahead of the step


def sentiment(work: Path, folder: Path, *more: str) -> list[str]:
    return tiny.sentiment_flags(work, folder, "--learning-rate 0.01 --data.buckets 16 --log-every 1", *more)


@pytest.fixture(params=["on the host's cores", "elsewhere"])
def devices(request, monkeypatch):
    """Where steps run: where they are computed elsewhere, a thread builds the batches."""
    if request.param == "elsewhere":
        monkeypatch.setattr(Mesh, "on_host", property(lambda self: False, lambda self, value: None), raising=False)


def input_threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("input")]


@pytest.mark.parametrize("end", ["done", "stopped", "diverged", "patience"])
def test_no_thread_survives_a_run(work, tmp_path, end, devices):
    argv = sentiment(work, tmp_path / "run", "--fit.epochs 3")
    if end == "stopped":
        with stopping(5):
            assert program(*argv)[0] == EXIT_CODE
    elif end == "diverged":
        argv[argv.index("--learning-rate") + 1] = "1e30"
        code, printed = program(*argv, "--fit.warmup", "0", "--fit.clip", "None")
        assert (code, "training diverged" in printed) == (2, True), printed
    elif end == "patience":
        assert program(*argv, "--fit.patience", "1", "--eval-every-steps", "1")[0] == 0
    else:
        assert program(*argv)[0] == 0
    assert not input_threads()


def test_an_error_in_building_a_batch_is_the_run_s_own(work, tmp_path, monkeypatch, devices):
    """With the traceback of the place where it happened."""
    real, calls = feed.batch_of, []

    def broken(*args: Any) -> Any:
        calls.append(1)
        if len(calls) > 4:
            raise RuntimeError("the disk is gone")
        return real(*args)

    monkeypatch.setattr(feed, "batch_of", broken)
    code, printed = program(*sentiment(work, tmp_path / "run", "--fit.epochs 3"))
    assert code == 1 and "in broken" in printed and "RuntimeError: the disk is gone" in printed, printed
    assert not input_threads()
    assert len(records(tmp_path / "run")) <= 4


def test_batches_are_those_of_the_steps_from_wherever_a_run_resumes(work, tmp_path, monkeypatch, devices):
    """The order is a function of the step alone: built ahead or not, interrupted or not."""
    rows: list[list[int]] = []
    real = feed.batch_of
    monkeypatch.setattr(feed, "batch_of", lambda *args: rows.append(args[1].tolist()) or real(*args))
    assert program(*sentiment(work, tmp_path / "whole", "--fit.epochs 2"))[0] == 0
    expected = [batches.training_rows(64, 8, 0, step).tolist() for step in range(16)]
    assert rows == expected
    rows.clear()
    with stopping(6):
        assert program(*sentiment(work, tmp_path / "half", "--fit.epochs 2"))[0] == EXIT_CODE
    assert rows[:6] == expected[:6] and len(rows) <= 6 + feed.AHEAD + 1
    rows.clear()
    assert program(*sentiment(work, tmp_path / "half", "--fit.epochs 2"))[0] == 0
    assert rows == expected[-len(rows) :]
    assert_same_run(tmp_path / "half", tmp_path / "whole")


# What is logged


def test_waiting_for_input_is_measured_and_shown(work, tmp_path, monkeypatch, devices):
    real = feed.batch_of

    def slow(*args: Any) -> Any:
        time.sleep(0.05)
        return real(*args)

    monkeypatch.setattr(feed, "batch_of", slow)
    argv = tiny.sentiment_flags(
        work, tmp_path / "run", "--log-every 16 --data.buckets 16 --fit.epochs 8 --eval-every 8"
    )
    code, printed = program(*argv)
    assert code == 0, printed
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert 0.3 < lines[-1]["input"] <= 1
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert 0.3 < summary["input"] <= 1 and "waiting for input" in printed
    assert f"  input {lines[-1]['input']:.0%}" in printed


def test_tokens_with_loss_all_tokens_and_padding_are_counted_apart(work, tmp_path):
    folder = tmp_path / "run"
    argv = [
        "configs/instruct_llama.py", "--model.path", str(work / "decoder"), "--data.train", str(work / "rows.jsonl"),
        "--data.validation", str(work / "rows.jsonl"), "--cache-dir", str(work / "cache"), "--run-dir", str(folder),
        *"--task.messages None --task.prompt sentence --task.completion name --task.no-pack".split(),
        *"--model.dtype float32 --model.param-dtype float32 --lora.rank 2 --fit.epochs 2 --fit.batch-size 8".split(),
        *"--eval-batch-size 8 --data.buckets 16 --task.max-length 16".split(),
    ]  # fmt: skip
    code, printed = program(*argv)
    assert code == 0, printed
    epochs = [one for one in records(folder) if "epoch" in one]
    tokens = sum(1 + len(row["sentence"].split()) + 1 for row in tiny.sentences(64))  # an answer joins the last word
    assert [(one["tokens"], one["loss_tokens"]) for one in epochs] == [(tokens, 2 * 64)] * 2
    assert epochs[-1]["padding"] == pytest.approx(1 - tokens / (64 * 16))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["loss_tokens_per_second"] < summary["tokens_per_second"] and 0 < summary["padding"] < 1
    assert " with loss)  padding " in printed
    assert program("report", str(folder), "--out", str(tmp_path / "page.html"))[0] == 0
    assert "tokens with loss per second" in (tmp_path / "page.html").read_text()


def test_averages_of_a_checkpoint_of_an_earlier_version_are_read():
    state = LoopState(step=3)
    state.since_log.tokens = 5
    old = state.to_json()
    for averages in (old["since_log"], old["since_epoch"]):
        for name in ("loss_tokens", "timed_loss_tokens", "input_seconds"):
            del averages[name]
    assert LoopState.from_json(old) == state


# Two processes

RECORDER = """if True:
    import json, os, sys
    import train.loop.feed as feed
    real = feed.batch_of
    def batch_of(examples, rows, bucket):
        with open(os.environ["ROWS"], "a") as stream:
            stream.write(json.dumps(rows.tolist()) + "\\n")
        return real(examples, rows, bucket)
    feed.batch_of = batch_of
    import train.__main__ as program
    from train.compute.processes import leave
    leave(program.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["pmap", "mesh --compute.fsdp 2"])
@pytest.mark.parametrize("shared", [True, False], ids=["one cache", "a cache each"])
def test_two_processes_read_their_own_rows_only(work, tmp_path, layout, shared):
    """Of every batch one half each; and where they share a cache, one of them encodes."""
    port = free_port()
    own = ["--processes.coordinator", f"localhost:{port}", "--processes.count", "2", "--processes.index"]
    found = []
    for i in range(2):
        cache = tmp_path / ("cache" if shared else f"cache{i}")
        argv = sentiment(work, tmp_path / "run", f"--fit.epochs 1 --compute.layout {layout}")
        argv += ["--cache-dir", str(cache), *own, str(i)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "ROWS": f"{tmp_path}/rows{i}"}
        command = [sys.executable, "-c", RECORDER, *argv]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        found.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    printed = [one.communicate(timeout=200)[0] for one in found]
    assert [one.returncode for one in found] == [0, 0], printed
    read = [[json.loads(line) for line in (tmp_path / f"rows{i}").read_text().splitlines()] for i in range(2)]
    for i, rows in enumerate(read):
        # Two devices each: a mesh asks for each device's rows, and devices of the same rows share them.
        together = [sum(rows[k : k + len(rows) // 8], []) for k in range(0, len(rows), len(rows) // 8)]
        batches_of = [batches.training_rows(64, 8, 0, step).tolist() for step in range(8)]
        assert together == [rows_[4 * i : 4 * i + 4] for rows_ in batches_of]
