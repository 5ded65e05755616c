"""Compiled programs, kept for later runs: they change no result, and whatever is wrong with the cache stops no run."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.runs import assert_same_run, program
from train.__main__ import parse
from train.compute import compilation_cache as cache
from train.config import TrainConfig

TINY = (
    "--model.width 16 --model.depth 1 --model.heads 2 --model.hidden 24 --lora.rank 2 --base.epochs 1 --fit.epochs 1 "
    "--lora.dropout 0.1"
).split()


@pytest.fixture
def every_program(monkeypatch) -> None:
    """Keep programs that compile fast too: how fast is up to the machine."""
    monkeypatch.setattr(cache, "MIN_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path) -> TrainConfig:
    return parse(["--cache-dir", str(tmp_path)])


@contextlib.contextmanager
def requests() -> Iterator[Counter[str]]:
    """The programs that were looked up in the cache, and those that were found, counted while in this context."""
    seen: Counter[str] = Counter()

    def listen(event: str, **_: str | int) -> None:
        if event.startswith("/jax/compilation_cache/"):
            seen[event.rsplit("/", 1)[1]] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_listener(listen)


def fit(folder: Path, name: str) -> Counter[str]:
    """A run's requests to the cache."""
    with requests() as seen:
        code, printed = program(*TINY, "--cache-dir", str(folder / "cache"), "--run-dir", str(folder / name))
    assert code == 0, printed
    return seen


def test_a_later_run_compiles_nothing_and_computes_the_same_bits(every_program, tmp_path):
    settings = jax.config.values.copy()
    fit(tmp_path, "first")
    again = fit(tmp_path, "second")  # finds the base, too
    assert again["cache_hits"] == again["compile_requests_use_cache"] > 0
    assert_same_run(tmp_path / "second", tmp_path / "first")
    assert jax.config.values == settings, "a run changes JAX's settings while it runs"


def test_it_can_be_turned_off(tmp_path):
    with cache.compilation_cache(parse(["--cache-dir", str(tmp_path), "--compute.no-compilation-cache"])):
        assert jax.config.values["jax_compilation_cache_dir"] is None
    assert not any(tmp_path.iterdir())


def test_settings_of_jax_take_precedence(config, tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    with cache.compilation_cache(config):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")
    with cache.compilation_cache(config):
        assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "compiled")
        assert jax.config.values["jax_compilation_cache_max_size"] == -1
        assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == cache.MIN_SECONDS


def test_what_a_killed_process_left_is_compiled_again(every_program, config):
    """JAX writes a program and then the time of its last use; without that, the program may be incomplete."""

    def compile_and_run() -> Counter[str]:
        with cache.compilation_cache(config), requests() as seen:
            assert jax.jit(lambda x: x * 3.5 + 1)(2.0) == 8.0
        return seen

    compile_and_run()
    for file in (config.cache_dir / "compiled").glob("jit_*"):
        if file.name.endswith("-atime"):
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])
    assert compile_and_run()["cache_hits"] == 0
    again = compile_and_run()
    assert again["cache_hits"] == again["compile_requests_use_cache"] > 0


def test_a_folder_that_cannot_be_written_is_no_error(config):
    (config.cache_dir / "compiled").write_text("a file is in its place")
    with cache.compilation_cache(config):
        assert jax.config.values["jax_compilation_cache_dir"] is None
        assert jax.jit(lambda x: x + 7)(1) == 8


def test_processes_that_do_not_see_the_same_folder_use_none(config, monkeypatch):
    monkeypatch.setattr(cache, "first_decides", lambda _: "shared-elsewhere")
    monkeypatch.setattr(cache, "is_first", lambda: False)
    with cache.compilation_cache(config):
        assert jax.config.values["jax_compilation_cache_dir"] is None
