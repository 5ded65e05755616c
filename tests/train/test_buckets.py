"""Runs, data and models in a bucket: the same run as on a local disk, whatever ends it and wherever it resumes."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import fsspec.config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import models
from jlora._src.tree import save
from jlora.files import buckets
from jlora.files.buckets import located
from jlora.models import ModelError, TensorError
from tests import tiny
from tests.bucket import NAME, Emulator, emulator
from tests.runs import assert_same_run, free_port, program, records, start
from train.__main__ import main
from train.config import ConfigError, SaveConfig
from train.loop import checkpoints
from train.rundir import lock as locks
from train.rundir.directory import RunDirectory
from train.rundir.finished import open_run
from train.rundir.records import BucketRecords


@pytest.fixture(scope="module")
def cloud() -> Iterator[Emulator]:
    yield from emulator()


@pytest.fixture(autouse=True)
def undisturbed(cloud) -> Iterator[None]:
    yield
    cloud.before = lambda method, name: None


@pytest.fixture
def brief(monkeypatch) -> None:
    """Locks that expire in a few seconds, and whose loss does not end the tests."""
    monkeypatch.setattr(locks, "RENEWAL", 0.3)
    monkeypatch.setattr(locks, "EXPIRY", 4.0)
    monkeypatch.setattr(locks.os, "_exit", lambda code: None)


@pytest.fixture(scope="module")
def work(tmp_path_factory, cloud) -> Path:
    """An encoder's checkpoint and sentences, also in the bucket."""
    folder = tiny.write_sentiment(tmp_path_factory.mktemp("buckets"))
    buckets.upload_folder(folder, located(f"gs://{NAME}/work"))
    return folder


def flags(work: Path | str, run_dir: Path | str, cache: Path, *more: str) -> list[str]:
    """A run of 24 steps with dropout; ``work`` and ``run_dir`` are local or in the bucket."""
    options = (
        "--data.limit None --task.max-length 16 --lora.rank 2 --fit.batch-size 8 --eval-batch-size 8 --model.dropout "
        "--lora.dropout 0.1 --learning-rate.lora 0.01 --log-every 1 --save.every-steps 9 --fit.epochs 3"
    )
    return [
        "configs/sst2_minilm.py", "--model.path", f"{work}/encoder", "--data.train", f"{work}/train.jsonl",
        "--cache-dir", str(cache), "--run-dir", str(run_dir), *options.split(), *more,
    ]  # fmt: skip


REMOTE = f"gs://{NAME}/work"


@pytest.fixture(scope="module")
def whole(work) -> Path:
    """A run on a local disk that was never interrupted."""
    code, printed = program(*flags(work, work / "whole", work / "cache"))
    assert code == 0, printed
    return work / "whole"


@pytest.fixture(scope="module")
def remote(work, whole, tmp_path_factory) -> str:
    """The same run in the bucket, with data and model from there."""
    url = f"gs://{NAME}/remote"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("downloads")))
        code, printed = program(*flags(REMOTE, url, work / "cache"))
    assert code == 0, printed
    assert f"written to {url}" in printed
    assert f"data.train: {REMOTE}/train.jsonl: 64 rows read" in printed
    return url


# The run


def test_a_run_in_a_bucket_is_the_run_on_a_disk(cloud, whole, remote):
    assert_same_run(located(remote), whole)
    config = json.loads((located(remote) / "config.json").read_text())
    assert (config["run_dir"], config["model"]["path"]) == (remote, f"{REMOTE}/encoder")
    names = {name.split("/")[0] for name in cloud.names("remote/")}
    assert names == {one.name for one in whole.iterdir()} - {"run.lock"}
    assert not [name for name in cloud.names() if name.endswith(".draft")]


def test_a_finished_run_is_left_alone(cloud, work, remote):
    before = {name: cloud.generation(f"remote/{name}") for name in cloud.names("remote/")}
    code, printed = program(*flags(REMOTE, remote, work / "cache"))
    assert (code, "is finished: nothing is left to train" in printed) == (0, True)
    assert {name: cloud.generation(f"remote/{name}") for name in cloud.names("remote/")} == before


def child(argv: list[str], printed: str, environment: dict[str, str]) -> None:
    """The program in a process that can be killed."""
    out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    fsspec.config.set_conf_env(fsspec.config.conf)
    acquire = locks._BucketLock._acquire

    def acquire_at_once(self: Any, directory: RunDirectory) -> bytes:
        """The other holder is dead: nothing is gained by watching its lock for a minute."""
        expiry, locks.EXPIRY = locks.EXPIRY, 1.0
        try:
            return acquire(self, directory)
        finally:
            locks.EXPIRY = expiry

    locks._BucketLock._acquire = acquire_at_once
    sys.exit(main(argv))


MOMENTS = {
    "before anything": r"run\.lock",
    "as it claims the run": r"config\.json",
    "with half a checkpoint": r"checkpoints/9/adapters/ocdbt.*manifest",
    "before the checksums of a checkpoint": r"checkpoints/9/SHA256SUMS",
    "before the mark of a checkpoint": r"checkpoints/9/commit_success",
    "as it deletes a checkpoint": r"DELETE checkpoints/9/",
    "with half of the adapters": r"adapters/adapters\.json",
    "before the checksums of the adapters": r"adapters/SHA256SUMS",
    "before the end": r"summary\.json",
}


@pytest.mark.parametrize(
    "every", [pytest.param(False, id="sample"), pytest.param(True, marks=pytest.mark.slow, id="all")]
)
def test_a_run_that_is_killed_again_and_again_is_the_run_that_is_not(cloud, whole, tmp_path, every):
    """SIGKILL before a write to the bucket; each time, the run resumes on a machine that has nothing of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train.experiment", "train.__main__"])
    name = f"killed-{every}"
    killed: list[str] = []

    def launch(moment: str | None) -> tuple[int | None, str]:
        machine, printed = tmp_path / f"machine-{len(killed)}", tmp_path / "printed.txt"
        environment = {**cloud.environment, "XDG_CACHE_HOME": str(machine), "HF_HUB_OFFLINE": "1"}
        argv = flags(REMOTE, f"gs://{NAME}/{name}", machine, *["--save.max-to-keep", "1"])
        one: Any = context.Process(target=child, args=(argv, str(printed), environment))

        def before(method: str, written: str) -> None:
            asked = f"{method} {written.removeprefix(f'{name}/')}" if method == "DELETE" else written
            if moment and method != "GET" and re.search(moment, asked) and one.exitcode is None:
                os.kill(one.pid, signal.SIGKILL)
                raise ConnectionError("the client is gone")

        cloud.before = before
        one.start()
        one.join(120)
        cloud.before = lambda method, name: None
        return one.exitcode, printed.read_text()

    for moment, pattern in list(MOMENTS.items())[0 if every else 2 :: 1 if every else 6]:
        code, printed = launch(pattern)
        assert code == -signal.SIGKILL, (moment, printed)
        killed.append(moment)
        with pytest.raises((ConfigError, TensorError)):
            open_run(located(f"gs://{NAME}/{name}"))
        if moment != "before the end":
            with pytest.raises(TensorError):
                jlora.load(f"gs://{NAME}/{name}/adapters")
    code, printed = launch(None)
    assert code == 0, printed
    assert_same_run(located(f"gs://{NAME}/{name}"), whole)


def test_every_last_byte_arrives(cloud, tmp_path):
    """Also one that could be taken for a part of a line's end."""
    for byte in range(256):
        (tmp_path / "file").write_bytes(content := bytes([byte, 7, byte]))
        buckets.upload(tmp_path / "file", located(f"gs://{NAME}/bytes/file"))
        with buckets.open_to_read(located(f"gs://{NAME}/bytes/file")) as file:
            assert file.read() == content


def test_an_upload_that_arrives_changed_is_an_error(cloud, tmp_path, monkeypatch):
    """The emulator's own parser drops the last byte here."""
    monkeypatch.setattr("gcp_storage_emulator.server.BytesParser", BytesParser)
    (tmp_path / "file").write_bytes(b"content\r")
    with pytest.raises(OSError, match=f"gs://{NAME}/changed"):
        buckets.upload(tmp_path / "file", located(f"gs://{NAME}/changed"))


@pytest.mark.slow
def test_a_base_trained_from_scratch_is_complete_or_not_there(cloud, tmp_path):
    """The run keeps it; a part of it is not taken for one."""
    options = (
        "--data.limit 64 --data.validation-limit 32 --base.epochs 1 --base.batch-size 16 --fit.epochs 1 "
        "--fit.batch-size 16 --model.depth 1 --model.width 8 --model.heads 2 --model.hidden 8"
    ).split()
    url = f"gs://{NAME}/scratch"

    def fails(method: str, name: str) -> bool | None:
        return False if method == "POST" and name.endswith("base/records.json") else None

    cloud.before = fails
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcsfs.retry.asyncio.sleep", _no_wait)
        code, printed = program("--run-dir", url, "--cache-dir", str(tmp_path / "one"), *options)
    cloud.before = lambda method, name: None
    assert code != 0 and "base/identity.json" in cloud.names("scratch/"), printed
    code, printed = program("--run-dir", url, "--cache-dir", str(tmp_path / "two"), *options)
    assert code == 0 and "base: trained and cached" in printed, printed
    code, printed = program("eval", url)
    assert code == 0, printed
    assert program("export", url, "--to", "orbax")[0] == 0
    assert "orbax/_METADATA" in cloud.names("scratch/")


async def _no_wait(seconds: float) -> None:
    del seconds


@pytest.mark.slow
def test_two_processes_share_a_run(cloud, work, whole, tmp_path):
    """The first writes the run's files, both their parts of the checkpoints; stopped once, the run resumes."""
    url, more = f"gs://{NAME}/two", ["--compute.layout", "mesh", "--lora.dropout", "0", "--model.no-dropout"]
    assert program(*flags(work, tmp_path / "one", work / "cache", *more))[0] == 0

    def pair(*options: str) -> list[str]:
        port = free_port()
        both = [
            start(
                *flags(REMOTE, url, tmp_path / f"cache-{i}", *more, *options),
                "--processes.coordinator", f"localhost:{port}", "--processes.count", "2", "--processes.index", str(i),
                XDG_CACHE_HOME=str(tmp_path / f"downloads-{i}"), devices=4,
            )
            for i in range(2)
        ]  # fmt: skip
        found = [one.communicate(timeout=180)[0] for one in both]
        assert [one.returncode for one in both] == [0, 0], found
        return found

    pair("--fit.epochs", "2")
    pair("--resume", "auto")
    found, expected = records(located(url)), records(tmp_path / "one")
    assert {one["step"] for one in found} == {one["step"] for one in expected}


@pytest.mark.parametrize("place", ["bucket", "disk"])
def test_no_process_changes_a_folder_before_all_have_looked_at_it(cloud, tmp_path, monkeypatch, place):
    """A process that comes late would find half of the old adapters, and end."""
    folder = f"gs://{NAME}/late" if place == "bucket" else tmp_path / "late"
    adapters = jlora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, jlora.LoraConfig(rank=1, targets=("w",)))
    jlora.save(folder, adapters)
    events: list[str] = []

    def noted(name: str, done: Any, *args: Any, **more: Any) -> Any:
        events.append(name)
        return done(*args, **more)

    for name in ("_check_savable", "_from_first_process", "remove_folder", "_replace"):
        monkeypatch.setattr(save, name, functools.partial(noted, name, getattr(save, name)))
    jlora.save(folder, adapters)
    changed = "remove_folder" if place == "bucket" else "_replace"
    assert events.index("_check_savable") < events.index("_from_first_process") < events.index(changed)


def test_no_checkpoint_is_deleted_before_all_have_listed_them(whole, tmp_path, monkeypatch):
    """A process that misses one does not take part in its deletion, for which the others wait."""
    folder = shutil.copytree(whole / "checkpoints", tmp_path / "checkpoints")
    there = sorted(one.name for one in folder.iterdir())

    def late(what: str) -> None:
        raise TimeoutError(what)

    monkeypatch.setattr(checkpoints, "wait_for_all", late)
    found = checkpoints.Checkpoints(folder, SaveConfig(), keep_best=False)
    with pytest.raises(TimeoutError):
        found.begin(0)
    assert found.steps() and sorted(one.name for one in folder.iterdir()) == there
    found.close()


# The lock


def directory(name: str) -> RunDirectory:
    return RunDirectory(located(f"gs://{NAME}/{name}"))


def abandon(one: Any) -> None:
    """What SIGKILL does to a lock: it is not renewed, and not removed."""
    one._released.set()
    one._thread.join()


def test_a_run_in_use_is_refused_and_its_holder_named(cloud, work, brief):
    run = directory("locked")
    held = locks.lock(run)
    with pytest.raises(
        ConfigError, match=f"is in use by another training process, process {os.getpid()} on .*run.lock"
    ):
        locks.lock(run)
    code, printed = program(*flags(work, run.path, work / "cache"))
    assert (code, "in use by another training process" in printed) == (2, True)
    held.release()
    assert cloud.names("locked/") == set()
    locks.lock(run).release()


def test_a_dead_holder_is_replaced(cloud, brief, capsys):
    run = directory("stale")
    abandon(locks.lock(run))
    began = time.monotonic()
    locks.lock(run).release()
    assert 4 <= time.monotonic() - began < 20
    assert "watching for up to 4 s" in capsys.readouterr().out


@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_claimants_one_gets_the_lock(cloud, brief, is_stale):
    run, got = directory(f"raced-{is_stale}"), []
    if is_stale:
        abandon(locks.lock(run))

    def claim() -> None:
        try:
            got.append(locks.lock(run))
        except ConfigError:
            got.append(None)

    threads = [threading.Thread(target=claim) for _ in range(6)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    winners = [one for one in got if one is not None]
    assert (len(got), len(winners)) == (6, 1)
    winners[0].release()


def test_a_holder_that_lost_its_lock_ends(cloud, brief, monkeypatch, capsys):
    """As after a suspension: it does not write on beside the run that took over."""
    run, ended = directory("lost"), threading.Event()
    monkeypatch.setattr(locks.os, "_exit", lambda code: ended.set())
    held: Any = locks.lock(run)
    run.lock_file.write_text("{}")
    assert ended.wait(10)
    assert "another process has taken the lock, so this process ends now" in capsys.readouterr().err
    abandon(held)


def test_a_lock_survives_a_short_failure_of_the_network(cloud, monkeypatch):
    monkeypatch.setattr(locks, "RENEWAL", 0.3)
    run = directory("flaky")
    held: Any = locks.lock(run)
    first = held._generation
    cloud.before = lambda method, name: False if method == "POST" else None
    time.sleep(1)
    cloud.before = lambda method, name: None
    until = time.monotonic() + 20
    while held._generation == first and time.monotonic() < until:
        time.sleep(0.1)
    assert held._generation != first
    held.release()


# Metrics


def test_records_are_uploaded_at_times_and_with_each_checkpoint(cloud, monkeypatch):
    one = BucketRecords(located(f"gs://{NAME}/records/metrics.jsonl"))
    one.cut(0)
    uploads: list[str] = []
    cloud.before = lambda method, name: uploads.append(name) if method == "POST" else None
    for step in range(1, 1001):
        one.write({"phase": "fit", "step": step})
    assert not uploads
    size, digest = one.sync()
    assert len(uploads) == 1 and one.sync() == (size, digest) and len(uploads) == 1
    one.write({"phase": "fit", "step": 1001})
    monkeypatch.setattr("train.rundir.records.UPLOAD_SECONDS", 0)
    one.write({"phase": "fit", "step": 1002})
    assert len(uploads) == 2 and len(one.read()) == 1002
    other = BucketRecords(one.file)
    other.cut(size, digest)
    assert [record["step"] for record in other.read()] == list(range(1, 1001))


# Commands


def test_commands_take_a_run_in_a_bucket(cloud, whole, remote, tmp_path):
    """They print the same as for the run on a disk."""
    text = "a lovely film"
    assert program("predict", remote, "--text", text) == program("predict", str(whole), "--text", text)
    one, other = (program("eval", run)[1].splitlines() for run in (remote, str(whole)))
    assert one[1:] == other[1:] and one[0].startswith(f"{REMOTE}/validation.jsonl")
    code, printed = program("report", remote, str(whole), "--out", str(tmp_path / "report.html"))
    assert code == 0, printed
    code, printed = program("export", remote, "--to", "peft")
    assert code == 0 and f"written to {remote}/peft: " in printed, printed
    assert program("export", str(whole), "--to", "peft", "--out", str(tmp_path / "peft"))[0] == 0
    exported = tmp_path / "peft" / "adapter_model.safetensors"
    assert (located(remote) / "peft" / exported.name).read_bytes() == exported.read_bytes()
    assert program("export", remote, "--to", "hf", "--out", str(tmp_path / "hf"))[0] == 0
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (whole.parent / "encoder/tokenizer.json").read_bytes()
    code, printed = program("predict", f"gs://{NAME}/nothing", "--text", text)
    assert code == 2 and f"gs://{NAME}/nothing is not a run directory" in printed and remote in printed


@pytest.mark.slow
def test_generate_takes_a_run_in_a_bucket(cloud, tmp_path):
    tiny.write_checkpoint(tmp_path / "decoder", tiny.DECODER, task="causal-lm")
    tiny.write_jsonl(tmp_path / "train.jsonl", [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(8)])
    url = f"gs://{NAME}/language"
    code, printed = program(
        "configs/instruct_llama.py", "--model.path", str(tmp_path / "decoder"), "--data.train",
        str(tmp_path / "train.jsonl"), "--data.validation", "None", "--data.holdout", "0.25", "--cache-dir",
        str(tmp_path / "cache"), "--run-dir", url, *(
            "--task.max-length 32 --task.no-pack --task.messages None --task.prompt question --task.completion answer "
            "--lora.rank 2 --fit.epochs 1 --fit.batch-size 2 --model.dtype float32 --model.param-dtype float32"
        ).split(),
    )  # fmt: skip
    assert code == 0, printed
    code, printed = program("generate", url, "--prompt", "1 + 1 =", "--max-new-tokens", "4")
    assert code == 0 and printed.startswith("> 1 + 1 =\n"), printed


@pytest.mark.slow
def test_tensorboard_is_written_to_the_bucket(cloud, work):
    url = f"gs://{NAME}/logged"
    # In its own process: tensorboardX uploads once more when it is collected, until the emulator answers.
    one = start(*flags(work, url, work / "cache", "--fit.epochs", "1", "--log", "tensorboard"))
    printed, _ = one.communicate(timeout=120)
    assert one.returncode == 0, printed
    assert any(name.startswith("tensorboard/fit/events") for name in cloud.names("logged/"))


# Data and models


def test_data_are_downloaded_once_for_each_content(cloud, work, tmp_path):
    from train.data.sources import find_validation, read_source, source_digest

    source, got = f"gs://{NAME}/data/train.jsonl", []
    located(source).write_text('{"text": "one"}\n')
    cloud.before = lambda method, name: got.append(name) if method == "GET" and name.endswith(".jsonl") else None
    for _ in range(2):
        rows, provenance = read_source(source, tmp_path, "data.train", None, False)
        assert [*rows["text"]] == ["one"] and provenance.source == source and provenance.files == {source: 1}
    downloads = len(got)
    digest = source_digest(source)
    located(source).write_text('{"text": "two"}\n')
    assert source_digest(source) != digest
    assert [*read_source(source, tmp_path, "data.train", None, False)[0]["text"]] == ["two"]
    assert downloads < len(got)
    with pytest.raises(ConfigError, match="no file next to gs://bucket/data/train.jsonl is named validation"):
        find_validation(source)
    located(f"gs://{NAME}/data/dev.csv").write_text("text\nthree\n")
    assert find_validation(source) == (f"gs://{NAME}/data/dev.csv", "found next to train.jsonl")


def test_splits_of_files_and_folders_in_a_bucket(cloud, tmp_path):
    from train.data import tables

    folder = located(f"gs://{NAME}/folder")
    (folder / "train.csv").write_text("text,split\none,a\ntwo,b\n")
    (folder / "test.csv").write_text("text,split\nthree,a\n")
    assert len(tables.read(f"{folder}:test", tmp_path, "data.train")) == 1
    table = tables.read(f"{folder}/train.csv:b", tmp_path, "data.train")
    assert tables.column(table, "text", "text") == ["two"]
    assert table.provenance is not None and table.provenance.files == {f"{folder}/train.csv": 2}
    found = tables.read(str(folder), tmp_path, "data.train").provenance
    assert found is not None and found.files == {f"{folder}/train.csv": 2}
    with pytest.raises(ConfigError, match="data.train: gs://bucket/none.csv cannot be read: there are no files"):
        tables.read(f"gs://{NAME}/none.csv", tmp_path, "data.train")


def test_a_model_is_loaded_from_and_saved_to_a_bucket(cloud, work, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, params = models.load(f"{REMOTE}/encoder", task="features")
    models.save(f"gs://{NAME}/saved", model, params, max_shard_bytes=4000)
    assert "model.safetensors.index.json" in cloud.names("saved/")
    _, again = models.load(f"gs://{NAME}/saved")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    with pytest.raises(ModelError, match="gs://bucket/nothing cannot be downloaded"):
        models.load(f"gs://{NAME}/nothing")


def test_adapters_are_saved_to_a_bucket_as_a_whole(cloud):
    """Also over others; a flipped bit is found."""
    url = f"gs://{NAME}/adapters"
    for value in (1.0, 2.0):
        adapters: Any = {"w": jnp.full((3, 2), value)}
        jlora.save(url, adapters)
        np.testing.assert_array_equal(np.asarray(jlora.load(url)["w"]), adapters["w"])
    cloud.before = lambda method, name: False if method == "POST" and "SHA256SUMS" in name else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gcsfs.retry.asyncio.sleep", _no_wait)
        with pytest.raises(Exception, match="503"):
            jlora.save(url, {"w": jnp.full((3, 2), 3.0)})
    with pytest.raises(TensorError, match="SHA256SUMS cannot be read"):
        jlora.load(url)
    cloud.before = lambda method, name: None
    jlora.save(url, {"w": jnp.full((3, 2), 3.0)})
    (located(url) / "adapters.json").write_text((located(url) / "adapters.json").read_text() + " ")
    with pytest.raises(TensorError, match="adapters.json differs"):
        jlora.load(url)


# Refusals


def test_paths_and_urls(cloud, monkeypatch):
    assert located("runs/one") == Path("runs/one")
    assert str(located("gs:/bucket/run")) == str(located(Path("gs://bucket/run"))) == "gs://bucket/run"
    for url in ("gs://", "s3://bucket/run"):
        with pytest.raises(TensorError, match="expected a local path, or gs://BUCKET/NAME"):
            located(url)
    code, printed = program("--run-dir", "gs://bucket", "--cache-dir", "gs://bucket/cache")
    assert code == 2 and "run_dir: got gs:/bucket, expected" in printed and "expected a local path" in printed
    with monkeypatch.context() as patch:
        patch.setattr("gcsfs.retry.asyncio.sleep", _no_wait)
        cloud.before = lambda method, name: False
        for argv in (("--run-dir", "gs://bucket/down"), ("predict", "gs://bucket/down", "--text", "a")):
            code, printed = program(*argv)
            assert code == 2 and "error: " in printed and "gs://bucket/down" in printed and "503" in printed
        cloud.before = lambda method, name: None
    code, printed = program("--run-dir", "gs://no-such-bucket/run")
    assert code == 2 and "run_dir: gs://no-such-bucket/run/run.lock cannot be written" in printed
    buckets._filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(TensorError, match=re.escape("pip install 'jlora[gcs]'")):
        located("gs://bucket/run")
