"""What is the overhead of the trainer over its step, and how soon does a resumed run take a step?

    python -m benchmarks.trainer [--rounds 7] [--steps 200] [--starts 5] [--json FILE]

- overhead: the time of `train.loop.loop.fit` (which builds batches, fetches, writes and prints metrics) for at least
  STEPS steps, in whole epochs, against the bare compiled step on batches in memory, for networks whose step takes
  about 1, 15 and 100 ms here. Both run the same compiled function, in turn. The time of a checkpoint is listed too.
- starts: seconds from starting ``python -m train`` (configs/digits.py, with a cached base) to the first step's
  metrics on disk, for a new run and one that resumes from a checkpoint, in turn, with and without compiled programs
  in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from benchmarks._measure import Bar, interleave, ratio, table
from train.__main__ import ROOT, parse
from train.compute.keys import random_key
from train.compute.layouts import Mesh
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import TrainState, init_state, make_step
from train.config import ComputeConfig, FitConfig, SaveConfig
from train.data.batches import batch_of, size, training_rows
from train.experiment import run
from train.job import make_job, start_adapters
from train.loop.checkpoints import Checkpoints
from train.loop.loop import Training, fit
from train.loop.state import LoopState, PrimaryMetric
from train.rundir.records import Records

MOST_OVERHEAD, MOST_START = 1.03, 1.2
NETWORKS = {
    "1 ms": "--model.width 16 --model.depth 1 --model.heads 2 --model.hidden 32",
    "15 ms": "",
    "100 ms": "--model.width 192 --model.depth 4 --model.heads 4 --model.hidden 768",
}


class Warm(Mesh):
    """One device, with one compiled step for all trainings; ``began`` is the time of its first call."""

    step: Any
    began = 0.0

    def __init__(self) -> None:
        super().__init__(ComputeConfig(data=1), [("", P())])

    def compile_step(self, step: Any, state: Any) -> Callable[..., Any]:
        self.began = 0.0

        def stepped(*args: Any) -> Any:
            self.began = self.began or time.perf_counter()
            return self.step(*args)

        return stepped


def overhead(
    flags: Sequence[str], rounds: int, steps: int, folder: Path, *, elsewhere: float | None = None
) -> tuple[float, float, float]:
    """Seconds of a bare step, the trainer's time relative to the bare steps', and the seconds of a checkpoint.

    Args:
      elsewhere: the seconds of a step that is computed elsewhere, as on an accelerator: this host waits for it.
    """
    own = f"--log-every {max(1, steps // 50)} --eval-every-steps {steps} --learning-rate.lora 1e-4"
    job = make_job(parse([*flags, *own.split(), "--cache-dir", str(folder / "cache")]), lambda: None)
    job = dataclasses.replace(job, layout=(layout := Warm()))
    layout.on_host = elsewhere is None
    epochs = -(-steps // job.intervals(job.config.fit, job.examples).epoch)
    job = dataclasses.replace(job, config=dataclasses.replace(job.config, fit=FitConfig(epochs=epochs)))
    network, fit_config = job.network, job.config.fit
    training = Training(
        job,
        "fit",
        job.examples,
        start=lambda base: start_adapters(job.config, network, base, job.plan),
        evaluate=lambda _: {"accuracy": 0.0},
        metric=PrimaryMetric("accuracy", True),
        log=Records(folder / "metrics.jsonl").write,
    )
    steps = training.intervals.steps
    base = layout.place_base(job.shapes, lambda places: jax.jit(network.init, out_shardings=places)(jax.random.key(0)))
    tx, schedule = make_optimizer(fit_config), make_schedule(fit_config, 1e-4, steps)
    rows = [training_rows(size(job.examples), fit_config.batch_size, 0, i) for i in range(steps)]
    batches = [batch_of(job.examples, one, job.buckets) for one in rows]
    key = random_key(0, "dropout")

    def fresh() -> Any:
        return layout.make_state(lambda base: init_state(tx, training.start(base)), base)

    step = layout.step = Mesh.compile_step(layout, make_step(network.forward, job.task, tx, schedule), fresh())

    if elsewhere is not None:
        metrics = jax.block_until_ready(step(fresh(), base, batches[0], key)[1])

        def wait(state: Any, *_: Any) -> Any:
            time.sleep(elsewhere)
            return state, metrics

        step = layout.step = wait

    def bare() -> float:
        state = fresh()
        began = time.perf_counter()
        for batch in batches:
            state, _ = step(state, base, batch, key)
        jax.block_until_ready(state)
        return time.perf_counter() - began

    def trained() -> float:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            jax.block_until_ready(fit(training, base).adapters)
        return time.perf_counter() - layout.began

    taken: dict[str, list[float]] = {"bare": [], "trainer": []}
    for i in range(rounds + 1):
        order: list[tuple[str, Callable[[], float]]] = [("bare", bare), ("trainer", trained)]
        for name, one in order[:: 1 if i % 2 else -1]:
            seconds = one()
            if i:
                taken[name].append(seconds)
    return (
        statistics.median(taken["bare"]) / steps,
        ratio(taken, "trainer", "bare"),
        saving(layout, fresh(), folder),
    )


def saving(layout: Mesh, state: TrainState, folder: Path) -> float:
    """The seconds that a checkpoint blocks training, with the previous one already on disk."""
    checkpoints = Checkpoints(folder / "checkpoints", SaveConfig(), keep_best=False)
    checkpoints.begin(0)
    taken = []
    for i in range(1, 8):
        began = time.perf_counter()
        checkpoints.save(layout, state, LoopState(step=i), jax.random.key(0), {})
        taken.append(time.perf_counter() - began)
        checkpoints.wait()
    checkpoints.close()
    shutil.rmtree(folder / "checkpoints")
    return statistics.median(taken[1:])


def starts(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds until the first step of new and of resumed runs, with compiled programs in the cache and without."""
    own = ["--cache-dir", str(folder / "cache"), "--log-every", "1"]
    with contextlib.redirect_stdout(io.StringIO()):
        run(parse([*own, "--run-dir", str(folder / "half"), "--save.every-steps", "100", "--save.max-to-keep", "9"]))
    for later in (folder / "half" / "checkpoints").iterdir():
        if int(later.name) > 100:
            shutil.rmtree(later)
    (folder / "half" / "summary.json").unlink()
    number = iter(range(10**6))

    def begin(source: Path | None, *more: str) -> None:
        target = folder / f"run{next(number)}"
        if source is not None:
            shutil.copytree(source, target)
        argv = [*own, "--run-dir", str(target), *more]
        seconds_to_first_step(argv, target / "metrics.jsonl", resumed=source is not None)

    compiles = "--compute.no-compilation-cache"
    return interleave(
        {
            "new": lambda: begin(None),
            "resumed": lambda: begin(folder / "half"),
            "new, compiled": lambda: begin(None, compiles),
            "resumed, compiled": lambda: begin(folder / "half", compiles),
        },
        rounds,
    )


def seconds_to_first_step(argv: list[str], file: Path, *, resumed: bool) -> None:
    """Start the program, and end it as soon as ``file`` has this process's record of the first step."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wanted = '"step": 101,' if resumed else '"phase": "fit"'
    cut = not resumed  # a resumed run first truncates its records to the checkpoint's
    while process.poll() is None:
        text = file.read_text() if file.exists() else ""
        there = any('"phase": "fit"' in line and wanted in line for line in text.splitlines())
        if cut and there:
            break
        cut = cut or not there
        time.sleep(0.002)
    process.kill()
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trainer_") as scratch:
        folder = Path(scratch)
        found = {name: overhead(flags.split(), args.rounds, args.steps, folder) for name, flags in NETWORKS.items()}
        rows = [
            [name, f"{1000 * step:.2f}", f"{share:.3f}", f"{1000 * (share - 1) * step:.3f}", f"{1000 * wait:.0f}"]
            for name, (step, share, wait) in found.items()
        ]
        print(table(["step of", "bare ms", "trainer / bare", "overhead ms", "checkpoint ms"], rows))
        times = starts(args.starts, folder)
    print(f"\nfirst step after: {', '.join(f'{name} {statistics.median(t):.2f} s' for name, t in times.items())}")
    bars = [Bar(f"trainer / bare step, {name}", share, MOST_OVERHEAD) for name, (_, share, _) in found.items()]
    bars.append(Bar("first step, resumed / new", ratio(times, "resumed", "new"), MOST_START))
    print(f"\n{table(['bar', 'measured', 'limit', ''], [bar.row() for bar in bars])}")
    if args.json:
        args.json.write_text(json.dumps({"bars": [bar.record() for bar in bars]}, indent=2))


if __name__ == "__main__":
    main()
