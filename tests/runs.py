"""What tests of runs share: the program, in this process or in another, and a run's records without its times."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from train.__main__ import main

ROOT = Path(__file__).parents[1]
TIMES = ("seconds", "step_seconds", "examples_per_second", "tokens_per_second", "mfu")


def program(*argv: str) -> tuple[int, str]:
    """Exit code of the program and what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = main(list(argv))
    return code, out.getvalue()


def start(*argv: str, devices: int = 1, **environment: str) -> subprocess.Popen[str]:
    """The program in a process of its own, with so many emulated devices."""
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
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def records(folder: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """A run's records, or those of a phase, without what depends on the machine's speed."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in one.items() if name not in TIMES}
        for one in found
        if phase in (None, one["phase"])
    ]
