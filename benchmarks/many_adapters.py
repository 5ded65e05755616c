"""How much faster are many adapters trained in one program than one after the other?

    python -m benchmarks.many_adapters [--part runs steps tpu] [--rounds 9] [--tables]

- ``runs``: ``python -m train`` of configs/digits.py with a batch of 4 and 8 learning rates, start-up included: 8
  commands one after the other, against one sweep. Both start from a cache with the base, and without compiled programs.

- ``steps``: 8 adapters of one small network on this CPU, without start-up: a call of the compiled step for each,
  against one program for all. In it, `jax.vmap` of the step runs them at once, and `jax.lax.map` in turn,
  or two at a time. Runs are interleaved; a gain is the median over rounds of the ratios of times.
- ``tpu``: 16 adapters of a Llama with 4 layers of the 1B shape, each with one row, on one v5e chip, by the TPU's
  compiler (see `benchmarks.tpu_step`): 16 times the cycles of a step with one row, over those of the program for all.

With ``--cpu-seconds``, times are CPU seconds, which other users of the machine affect less.

Results are kept in ``results/many_adapters.json``, and computed again only if their code changed. The tables are
written into docs/speed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import resource
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
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks import _tpu, tpu_step
from benchmarks._measure import interleave, ratio
from configs.digits import config as digits
from jlora import models
from train.__main__ import ROOT
from train.compute.optimizer import make_optimizer
from train.compute.step import Step, TrainState, init_state, make_step
from train.config import CausalLM, FitConfig, PatchTransformer, SequenceClassification
from train.data.batches import Batch
from train.networks.scratch import from_scratch
from train.tasks.classify import TextClassification
from train.tasks.images import Images
from train.tasks.language import LanguageModel

FILE = _tpu.RESULTS / "many_adapters.json"
PARTS = ("runs", "steps", "tpu")
OURS = (*tpu_step.OURS, "train/compute/step.py")

RATES = ("0.001", "0.0015", "0.002", "0.003", "0.005", "0.007", "0.01", "0.015")
RUN_FLAGS = "configs/digits.py --fit.batch-size 4 --fit.epochs 4".split()

MEMBERS, VOCABULARY = len(RATES), 1000
RANKS = {"8": (8,), "4, 8, 16": (4, 8, 16)}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "max_position_embeddings": 128,
}
LLAMA = _tpu.llama(256, 704, 4, 4, 64, vocab_size=VOCABULARY, num_key_value_heads=2, dtype="float32")

TPU_MEMBERS, TPU_LENGTHS = 16, (32, 128, 512)
TPU_NETWORK = "Llama 3.2 1B, 4 layers"


# Whole runs


def run_times(rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of the commands, in every round."""
    with tempfile.TemporaryDirectory(prefix="many_adapters_") as scratch:
        folder, number = Path(scratch), iter(range(10**6))
        _train(folder / "cache", folder / "first", ["--fit.epochs", "1"])

        def every(*commands: Sequence[str]) -> None:
            own = folder / f"{next(number)}"
            shutil.copytree(folder / "cache", own / "cache", ignore=shutil.ignore_patterns("compiled"))
            for i, flags in enumerate(commands):
                _train(own / "cache", own / f"run{i}", flags)

        runs = {
            "one by one": functools.partial(every, *(["--learning-rate.lora", rate] for rate in RATES)),
            "one sweep": functools.partial(every, ["--sweep.lr", ",".join(RATES)]),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                start = clock()
                run()
                times[name].append(clock() - start)
    return {"seconds": times, "gain": ratio(times, "one by one", "one sweep"), "clock": clock.__name__}


def cpu_seconds_of_commands() -> float:
    """Of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _train(cache: Path, run_dir: Path, flags: Sequence[str]) -> None:
    own = ["--cache-dir", str(cache), "--run-dir", str(run_dir)]
    subprocess.run([sys.executable, "-m", "train", *RUN_FLAGS, *own, *flags], cwd=ROOT, check=True, capture_output=True)


def runs_table(results: _tpu.Results, args: argparse.Namespace) -> str:
    clock = cpu_seconds_of_commands if args.cpu_seconds else time.perf_counter
    found = results.get("runs", functools.partial(run_times, args.run_rounds, clock), *tpu_step.OURS, "train")
    rows = []
    if found is not None:
        seconds = [f"{statistics.median(times):.0f}" for times in found["seconds"].values()]
        rows.append([f"digits, batch 4, {len(RATES)} rates", *seconds, f"{found['gain']:.1f}"])
    return _tpu.markdown(("start-up included", "one by one, s", "one sweep, s", "gain"), rows)


# Steps


@dataclasses.dataclass(frozen=True)
class Case:
    """A network with the shape of a batch: images, or rows of ``length`` tokens."""

    network: str
    rows: int
    length: int = 0
    ranks: str = "8"

    def __str__(self) -> str:
        size = f"batch {self.rows}" if not self.length else f"{self.rows}×{self.length} tokens"
        return f"{self.network}, {size}, rank {self.ranks}"


CASES = (
    Case("digits", 1),
    Case("digits", 4),
    Case("digits", 4, ranks="4, 8, 16"),
    Case("encoder", 1, 16),
    Case("encoder", 4, 8),
    Case("encoder", 4, 32),
    Case("decoder", 4, 8),
)


def network_of(case: Case) -> tuple[Callable[..., Any], Any, Any]:
    """The bare model, its parameters, and its task."""
    if case.network == "digits":
        assert isinstance(digits.model, PatchTransformer)
        images: Any = dataclasses.replace(digits.task, side=8, labels=tuple("0123456789"))
        network = from_scratch(digits.model, images, "none")
        return network.forward, network.init(jax.random.key(0)), Images(images, images.labels, 1, 0.5, 0.5)
    task: Any
    if case.network == "encoder":
        task = TextClassification(SequenceClassification(), ("bad", "good"), None)
        model: Any = models.build(BERT, task="sequence-classification", labels=task.labels)
    else:
        task = LanguageModel(CausalLM(text="text"), None)
        model = models.build(LLAMA, task="causal-lm")

    def forward(params: Any, inputs: Any, key: jax.Array | None = None) -> Any:
        return model.apply(params, **inputs)

    return forward, {"params": model.init(jax.random.key(0), models.example_inputs(model))["params"]}, task


def random_batch(case: Case, seed: int) -> Batch:
    """A batch of random images or tokens."""
    rng, shape = np.random.default_rng(seed), (case.rows, case.length)
    if case.network == "digits":
        pixels = rng.normal(size=(case.rows, 8, 8, 1)).astype(np.float32)
        return {"image": pixels, "label": rng.integers(0, 10, case.rows)}
    tokens = {"input_ids": rng.integers(0, VOCABULARY, shape), "attention_mask": np.ones(shape, np.int32)}
    if case.network == "encoder":
        return {**tokens, "label": rng.integers(0, 2, case.rows)}
    return {**tokens, "loss_mask": np.ones(shape, np.uint8)}


@dataclasses.dataclass(frozen=True)
class Members:
    """The step of a case, and what each member starts from."""

    step: Step
    params: Any
    states: list[TrainState]
    together: TrainState
    batches: list[Batch]
    keys: jax.Array


def members_of(case: Case) -> Members:
    forward, params, task = network_of(case)
    tx = make_optimizer(FitConfig(epochs=1))
    batches: Any = [jax.device_put(random_batch(case, i)) for i in range(MEMBERS)]
    uses = jlora.trace(forward, params, task.inputs(batches[0]))
    ranks = RANKS[case.ranks]
    # An image patch has 4 pixels, fewer than the ranks.
    exclude = (*jlora.HEADS, *(("^embed/",) if case.network == "digits" else ()))
    adapters = [
        jlora.init(jax.random.key(i), params, jlora.LoraConfig(ranks[i % len(ranks)], alpha=8, exclude=exclude), uses)
        for i in range(MEMBERS)
    ]
    return Members(
        make_step(forward, task, tx, optax.constant_schedule(1e-3)),
        params,
        [init_state(tx, one) for one in adapters],
        jax.vmap(functools.partial(init_state, tx))(jlora.stack(adapters)),
        batches,
        jax.random.split(jax.random.key(0), MEMBERS),
    )


Run = Callable[[], Any]


def one_by_one(members: Members, repeats: int) -> Run:
    """A call of the compiled step for each member; compiled once for each rank."""
    step, states, keys = jax.jit(members.step, donate_argnums=0), _copy(members.states), list(members.keys)

    def run() -> Any:
        for _ in range(repeats):
            for i in range(MEMBERS):
                states[i], _ = step(states[i], members.params, members.batches[i], keys[i])
        return jax.block_until_ready(states)

    return run


def in_one_program(members: Members, repeats: int, at_once: int, *, own_batch: bool = True) -> Run:
    """One call for all members, so many of them at a time. Without a batch of their own they share the first."""
    batch: Any = members.batches[0]
    if own_batch:
        batch = jax.tree.map(lambda *rows: jnp.stack(rows), *members.batches)

    def all_steps(states: TrainState, base: Any, batch: Batch, keys: jax.Array) -> Any:
        if at_once == MEMBERS:
            return jax.vmap(members.step, (0, None, 0 if own_batch else None, 0))(states, base, batch, keys)
        one, size = lambda member: members.step(member[0], base, *member[1:]), None if at_once == 1 else at_once
        return jax.lax.map(one, (states, batch, keys), batch_size=size)

    step, states = jax.jit(all_steps, donate_argnums=0), [_copy(members.together)]

    def run() -> Any:
        for _ in range(repeats):
            states[0], _ = step(states[0], members.params, batch, members.keys)
        return jax.block_until_ready(states)

    return run


def _copy(tree: Any) -> Any:
    """A copy, since the step takes its state's memory."""
    return jax.tree.map(jnp.copy, tree)


def step_times(case: Case, rounds: int, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of a step of all members one by one, and the gain of each form over it."""
    members = members_of(case)
    runs = {
        "one by one": one_by_one(members, repeats),
        "at once": in_one_program(members, repeats, MEMBERS),
        "at once, one batch": in_one_program(members, repeats, MEMBERS, own_batch=False),
        "two at a time": in_one_program(members, repeats, 2),
        "in turn": in_one_program(members, repeats, 1),
    }
    times = interleave(runs, rounds, clock=clock)
    gains = {name: ratio(times, "one by one", name) for name in runs}
    return {"seconds": statistics.median(times["one by one"]) / repeats, "gains": gains, "clock": clock.__name__}


def steps_table(results: _tpu.Results, args: argparse.Namespace) -> str:
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    forms, rows = ("at once", "at once, one batch", "two at a time", "in turn"), []
    for case in CASES:
        make = functools.partial(step_times, case, args.rounds, args.repeats, clock)
        found = results.get(f"steps: {case}", make, *OURS)
        if found is not None:
            gains = [f"{found['gains'][form]:.2f}" for form in forms]
            rows.append([str(case), f"{1000 * found['seconds']:.1f}", *gains])
    return _tpu.markdown(("8 adapters", "one by one, ms", *forms), rows)


# By the TPU's compiler


def tpu_cost(length: int, members: int) -> dict[str, Any]:
    """What one step of all members costs, each with a row of ``length`` tokens."""
    point = tpu_step.Point(TPU_NETWORK, 1, length, "full")
    steps = tpu_step.Steps(point, _tpu.slice_devices("v5e:2x4"))

    def stacked(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=steps.whole), tree)

    state, tokens, step = steps.state(steps.adapters), steps.tokens, steps.jlora
    if members > 1:
        state, tokens, step = stacked(state), stacked(tokens), jax.vmap(step, (0, None, 0))
    return _tpu.cost(step, state, steps.params, tokens, places=steps.whole, donate=(0,))


def tpu_table(results: _tpu.Results, args: argparse.Namespace) -> str:
    rows = []
    for length in TPU_LENGTHS:
        one, every = (
            results.get(
                f"tpu: {n} of {TPU_NETWORK}, 1×{length}", functools.partial(tpu_cost, length, n), *tpu_step.OURS
            )
            or {}
            for n in (1, TPU_MEMBERS)
        )
        if one.get("cycles") and every.get("cycles"):
            gain = TPU_MEMBERS * one["cycles"] / every["cycles"]
            costs = [
                cell for x in (one, every) for cell in (f"{x['cycles'] / 1e6:,.1f}", f"{x['peak_bytes'] / 2**30:.1f}")
            ]
            rows.append([f"{length} tokens", *costs, f"{gain:.2f}"])
    header = (f"{TPU_MEMBERS} adapters, a row each", "one: Mcycles", "GiB", "all: Mcycles", "GiB", "16 × one / all")
    return _tpu.markdown(header, rows)


TABLES = {"runs": runs_table, "steps": steps_table, "tpu": tpu_table}


def main() -> None:
    """Measure or compile what is missing, print the tables, and write them into their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--run-rounds", type=int, default=3, help="of the part runs")
    parser.add_argument("--repeats", type=int, default=5, help="steps of a run")
    parser.add_argument("--cpu-seconds", action="store_true")
    parser.add_argument("--tables", action="store_true", help="use what is kept, and measure nothing")
    args = parser.parse_args()
    results = _tpu.Results(FILE, stale=args.tables)
    if "tpu" in args.part and not args.tables:
        _tpu.slice_devices("v5e:2x4")  # before anything is computed
    for part in args.part:
        table = TABLES[part](results, args)
        print(table, end="\n\n", flush=True)
        _tpu.write_table("speed.md", f"many adapters: {part}", table)


if __name__ == "__main__":
    main()
