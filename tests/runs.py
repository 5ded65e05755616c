"""Helpers for tests of runs: the program, in this process or another one, and a run's records without times."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import pytest

import jlora
from train.__main__ import main
from train.loop.stop import Stop

ROOT = Path(__file__).parents[1]
TIMES = (
    "seconds", "step_seconds", "examples_per_second", "tokens_per_second", "loss_tokens_per_second", "input", "mfu",
)  # fmt: skip


def program(*argv: str) -> tuple[int, str]:
    """The exit code of the program, and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(argv))
    return code, out.getvalue()


def start(*argv: str, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """Start the program in a new process with emulated devices."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        [sys.executable, "-m", "train", *argv],
        cwd=ROOT,
        env={**known, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def records(folder: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """A run's records, or those of one phase, without times and speeds."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in one.items() if name not in TIMES}
        for one in found
        if phase in (None, one["phase"])
    ]


def content(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def assert_same_run(found: Path, expected: Path) -> None:
    """The same adapters, bit for bit, and the same records, without gaps or repetitions."""
    one, other = jlora.load(found / "adapters"), jlora.load(expected / "adapters")
    assert one.keys() == other.keys()
    chex.assert_trees_all_equal(one, other)
    assert records(found) == records(expected)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (found, expected)]
    assert summaries[0]["metrics"] == summaries[1]["metrics"]
    assert summaries[0]["kept_step"] == summaries[1]["kept_step"]


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list with an entry for every program that XLA compiles in this context."""
    seen: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@contextlib.contextmanager
def stopping(after: int) -> Iterator[None]:
    """Request a stop after so many questions, which come after each step and before each batch of an evaluation."""
    calls = 0

    def requested(self: Stop) -> bool:
        nonlocal calls
        calls += 1
        return calls > after

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stop, "requested", requested)
        patch.setattr(Stop, "check", lambda self: None)
        yield


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Losses and metrics within 1e-5, of the same steps."""
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"phase"}:
            slack = 1e-4 if name.endswith("perplexity") or name == "grad_norm" else 1e-5
            assert one[name] == pytest.approx(other[name], abs=slack, rel=slack), (name, one["step"])
