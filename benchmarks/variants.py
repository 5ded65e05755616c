"""What does each method gain, beside plain LoRA: accuracy, time and memory?

    python -m benchmarks.variants [--part digits sst2] [--methods METHOD ...] [--only runs|costs] [--json FILE]
    python -m benchmarks.variants --tables

- ``digits``: `configs/digits.py`; a base trained once on upright digits, adapted to rotated and inverted ones.
- ``sst2``: MiniLM (``--checkpoint``) on a fixed random choice of SST-2's (``--data``) training sentences, one epoch.

Every method has the same data, batches, steps, optimizer (AdamW, as in `train.compute.optimizer`), cosine schedule and
grid of learning rates. A part of the training data is held out from every run, and a method's rate is the one with the
best accuracy on it for seed 0. Three seeds at that rate are scored on the test set: the order of batches, the adapters
and a new head differ. A batch of sentences has one of few lengths, so that few programs are compiled.

Costs are of one step, on a batch of the largest shape: CPU seconds of this process, which other users of the machine
affect little, in interleaved rounds of each compiled program; and the compiler's account of memory.

Results are written after each run, so that a stopped benchmark continues. ``--tables`` writes them into docs/methods.md
and docs/quantized.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks import _measure, _tpu
from benchmarks._variants import METHODS, Method, Setting, Start, collected_moments, fresh
from jlora import optim
from train.__main__ import ROOT, parse
from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer, make_schedule
from train.config import EVERYTHING, FitConfig, TrainConfig
from train.data.batches import Batch, batch_of, lengths, size
from train.data.ragged import Examples
from train.job import training_data

FILE = _tpu.RESULTS / "variants.json"
PARTS = ("digits", "sst2")
SEEDS = (0, 1, 2)
RATES = {"digits": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sst2": (3e-4, 1e-3, 3e-3, 1e-2)}
HELD_OUT = {"digits": 198, "sst2": 500}
BUCKETS = (16, 32, 64)
SCORED = 64
CALIBRATION = 256
"""The number of training examples for moments and gradients."""
PLAIN = "LoRA"
State = tuple[jax.Array, dict[str, Any], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """Network and data of a part.

    Attributes:
      config: of plain LoRA.
      forward, task: see `train.networks` and `train.tasks`.
      load: the base, by seed.
      examples: those to train on.
      train, held_out: their rows.
      test: the other examples.
    """

    config: TrainConfig
    forward: Callable[..., Any]
    task: Any
    load: Callable[[int], Any]
    examples: Examples
    train: np.ndarray
    held_out: np.ndarray
    test: Examples

    @functools.cached_property
    def uses(self) -> Any:
        return jlora.trace(self.forward, self.load(0), self.task.inputs(batch_of(self.examples, self.train[:1])))

    @functools.cached_property
    def moments(self) -> dict[str, jlora.InputMoments]:
        """Of the four most frequent lengths, so without padding. They depend on neither head nor seed."""
        long = self._lengths()
        groups = sorted((self.train[long == length] for length in np.unique(long)), key=len)[-4:]
        batches = [batch_of(self.examples, rows[: CALIBRATION // len(groups)]) for rows in groups]
        base = self.load(0)
        plan = jlora.plan(base, self.config.lora, self.uses)
        return collected_moments(self.forward, base, plan, self.task, batches)

    def start(self, method: Method, setting: Setting, seed: int) -> Start:
        """A method's start. One that depends on the frozen weights alone is computed once: seeds differ in the head."""
        if not method.fixed:
            return method.start(setting, random_key(seed, "adapters"))
        start = self._fixed.get(method) or method.start(setting, random_key(seed, "adapters"))
        self._fixed[method] = start
        leaves, _ = jlora.named_leaves(setting.params)
        own = {p: v if isinstance(v, jlora.LoraFactors) else leaves[p] for p, v in start.trained.items()}
        return start._replace(trained=own)

    @functools.cached_property
    def _fixed(self) -> dict[Method, Start]:
        return {}

    def setting(self, seed: int) -> Setting:
        """For the methods."""
        batch = batch_of(self.examples, self.train[:CALIBRATION], BUCKETS)
        return Setting(
            self.forward, self.load(seed), self.task, self.config.lora, self.uses, lambda: self.moments, batch
        )

    def batches(self, seed: int) -> list[Batch]:
        """Of a run; each has rows of one bucket. Every seed has the same shapes, in another order."""
        return [
            one for epoch in range(self.config.fit.epochs) for one in self._epoch(np.random.default_rng((seed, epoch)))
        ]

    def _epoch(self, rng: np.random.Generator) -> list[Batch]:
        count = self.config.fit.batch_size
        buckets = np.searchsorted(BUCKETS, self._lengths())
        groups = [rng.permutation(self.train[buckets == bucket]) for bucket in np.unique(buckets)]
        parts = [rows[i : i + count] for rows in groups for i in range(0, len(rows) - count + 1, count)]
        return [batch_of(self.examples, parts[i], BUCKETS) for i in rng.permutation(len(parts))]

    def _lengths(self) -> np.ndarray:
        long = lengths(self.examples)
        return np.zeros(len(self.train), int) if long is None else long[self.train]

    @functools.cached_property
    def _compiled(self) -> dict[tuple[Any, ...], Callable[..., State]]:
        return {}

    def step(self, method: Method) -> Callable[..., State]:
        """A step of the method, compiled for every structure and shape that it meets, once for all learning rates."""
        fit = tuple(method.fit.items())
        if fit not in self._compiled:
            config = dataclasses.replace(self.config.fit, **method.fit)
            self._compiled[fit] = jax.jit(make_step(self.forward, self.task, config, len(self.batches(0))))
        return self._compiled[fit]

    @functools.cached_property
    def predict(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda params, batch: self.forward(params, self.task.inputs(batch)))


def make_step(forward: Callable[..., Any], task: Any, fit: FitConfig, steps: int) -> Callable[..., State]:
    """``step(state, peak, start, batch) -> state``: a state is the number of steps, what is trained, and the
    optimizer's state. ``start.trained`` is not used."""
    apply, tx, schedule = jlora.lora(forward), make_optimizer(fit), make_schedule(fit, 1.0, steps)

    def step(state: State, peak: jax.Array, start: Start, batch: Batch) -> State:
        def loss_fn(trained: dict[str, Any]) -> jax.Array:
            adapters = start.adapters(trained)
            adapters = optim.frozen_a(adapters) if fit.optimizer == "lora-fa" else adapters
            total, count = task.loss(apply(jlora.attach(start.base, adapters), task.inputs(batch)), batch)
            return total / count

        taken, trained, moments = state
        updates, moments = tx.update(jax.grad(loss_fn)(trained), moments, trained)
        updates = jax.tree.map(lambda u: -peak * schedule(taken) * u, updates)
        return taken + 1, optax.apply_updates(trained, updates), moments  # pyright: ignore[reportReturnType]

    return step


def first_state(problem: Problem, method: Method, start: Start) -> State:
    tx = make_optimizer(dataclasses.replace(problem.config.fit, **method.fit))
    return jnp.zeros((), jnp.int32), start.trained, tx.init(start.trained)


def trained(problem: Problem, method: Method, start: Start, rate: float, batches: list[Batch]) -> Any:
    """The merged parameters after training."""
    state, step, peak = first_state(problem, method, start), problem.step(method), jnp.float32(rate)
    for batch in batches:
        state = step(state, peak, start._replace(trained={}), batch)
    return jlora.merge(jlora.dequantize(start.base), start.adapters(state[1]))


def score(problem: Problem, params: Any, examples: Examples, rows: np.ndarray) -> dict[str, float]:
    """Accuracy and mean loss on these rows."""
    long = lengths(examples)
    order = rows if long is None else rows[np.argsort(long[rows], kind="stable")]
    right, total = 0, 0.0
    for i in range(0, len(order), SCORED):
        own = min(SCORED, len(order) - i)
        batch = batch_of(examples, order[np.minimum(np.arange(i, i + SCORED), len(order) - 1)], BUCKETS)
        logits, labels = np.asarray(problem.predict(params, batch))[:own], batch["label"][:own]
        right += int((logits.argmax(-1) == labels).sum())
        total += float(problem.task.loss(jnp.asarray(logits), {"label": labels})[0])
    return {"accuracy": right / len(order), "loss": total / len(order)}


def digits(args: argparse.Namespace) -> Problem:
    config = parse([str(ROOT / "configs" / "digits.py")])
    assert config.scratch is not None
    # The embedding of patches has 4 inputs, too few for EVA and LoRA-GA at this rank.
    exclude = (*config.lora.exclude, "embed")
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, exclude=exclude))
    data = training_data(config)
    network, (upright, shifted) = data.network, data.train.values()
    rows = np.random.default_rng(0).permutation(size(shifted))
    forward, task, test = network.forward, data.task, data.test["shifted"]

    first = network.init(random_key(0, "base"))
    pretraining = Problem(
        dataclasses.replace(config, fit=config.scratch),
        forward,
        task,
        lambda _: first,
        upright,
        np.sort(rows),
        rows,
        test,
    )
    start = Start(first, jlora.init(jax.random.key(0), first, EVERYTHING, pretraining.uses))
    base = trained(pretraining, Method(fresh), start, config.learning_rate.base, pretraining.batches(0))
    held = HELD_OUT["digits"]
    return Problem(config, forward, task, lambda _: base, shifted, rows[held:], rows[:held], test)


def sst2(args: argparse.Namespace) -> Problem:
    held = HELD_OUT["sst2"]
    flags = ["--model.path", str(args.checkpoint), "--data.train", str(args.data / "train.jsonl")]
    flags += ["--data.validation", str(args.data / "validation.jsonl"), "--data.limit", str(args.sentences + held)]
    config = parse([str(ROOT / "configs" / "sst2_minilm.py"), *flags, "--fit.schedule", "cosine"])
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, targets="all-linear"))
    data = training_data(config)
    load, long = data.network.load, lengths(data.examples)
    assert load is not None and long is not None
    rows = np.random.default_rng(0).permutation(size(data.examples))
    rows = rows[long[rows] <= BUCKETS[1]]  # one program less for each method; few sentences are longer
    return Problem(
        config, data.network.forward, data.task, lambda seed: load(random_key(seed, "head"), None), data.examples,
        rows[held:], rows[:held], data.test["validation"],
    )  # fmt: skip


MAKE: Mapping[str, Callable[[argparse.Namespace], Problem]] = {"digits": digits, "sst2": sst2}


Run = dict[str, Any]
"""Method, seed, rate, and scores: ``held_out`` always, ``test`` at the best rate."""


def run_all(problem: Problem, part: str, methods: Sequence[str], runs: list[Run], keep: Callable[[], None]) -> None:
    """Every run that is missing, by method: the grid for the first seed, then the best rate for the others."""
    settings = {seed: problem.setting(seed) for seed in SEEDS}
    batches = {seed: problem.batches(seed) for seed in SEEDS}
    for name in methods:
        for seed in SEEDS:
            rates = RATES[part] if seed == SEEDS[0] else (best_rate(runs, name),)
            best = run_rates(problem, name, seed, rates, settings[seed], batches[seed], runs, keep)
            print(f"{part}: {best}", file=sys.stderr, flush=True)


def run_rates(
    problem: Problem,
    name: str,
    seed: int,
    rates: Sequence[float],
    setting: Setting,
    batches: list[Batch],
    runs: list[Run],
    keep: Callable[[], None],
) -> Run:
    """The missing runs of a method and a seed; returns the one at the best rate, which alone is tested."""
    own = {run["rate"]: run for run in runs if (run["method"], run["seed"]) == (name, seed)}

    @functools.cache
    def params(rate: float) -> Any:
        method = METHODS[name]
        return trained(problem, method, problem.start(method, setting, seed), rate, batches)

    for rate in rates:
        if rate not in own:
            held_out = score(problem, params(rate), problem.examples, problem.held_out)
            own[rate] = {"method": name, "seed": seed, "rate": rate, "held_out": held_out}
            runs.append(own[rate])
            keep()
    best = own[best_rate(runs, name)]
    if "test" not in best:
        best["test"] = score(problem, params(best["rate"]), problem.test, np.arange(size(problem.test)))
        keep()
    return best


def best_rate(runs: list[Run], method: str) -> float:
    """The rate with the best accuracy on the held-out examples; of equal ones, with the least loss."""

    def quality(run: Run) -> tuple[float, float]:
        loss = run["held_out"]["loss"]
        return run["held_out"]["accuracy"], -loss if math.isfinite(loss) else -math.inf

    return max((run for run in runs if (run["method"], run["seed"]) == (method, SEEDS[0])), key=quality)["rate"]


def costs(problem: Problem, methods: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Time of a step relative to plain LoRA's, and bytes, by method. Methods with one program are timed once."""
    setting = problem.setting(SEEDS[0])
    batch = max(problem.batches(SEEDS[0]), key=lambda one: sum(column.size for column in one.values()))
    programs: dict[Any, str] = {}
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys((PLAIN, *methods)):
        method = METHODS[name]
        start = problem.start(method, setting, SEEDS[0])
        state = first_state(problem, method, start)
        args = (state, jnp.float32(1e-3), start._replace(trained={}), batch)
        key = str(method.fit), jax.tree.structure(args), tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(args))
        programs.setdefault(key, name)
        if programs[key] == name:
            program = _measure.compile_program(problem.step(method), *args)
            steps[name] = functools.partial(lambda run, args: jax.block_until_ready(run(*args)), program.compiled, args)
            memory = {"temporary": program.temporary_memory, **sizes(start, state)}
            found[name] = {"program": name, "bytes": memory, "compile_seconds": round(program.compile_time, 1)}
        else:
            found[name] = dict(found[programs[key]])
    times = _measure.interleave(steps, rounds, clock=time.process_time)
    for one in found.values():
        one["ratio"] = _measure.ratio(times, one["program"], PLAIN)
        one["median_seconds"] = statistics.median(times[one["program"]])
    return found


def sizes(start: Start, state: State) -> dict[str, int]:
    """Bytes of what is frozen, of what is trained, and of the optimizer's state. Two 4-bit codes take a byte."""
    leaves, _ = jlora.named_leaves(start.base)
    whole = {path for path, value in start.trained.items() if not isinstance(value, jlora.LoraFactors)}
    frozen = [leaf for path, leaf in leaves.items() if path not in whole]
    parts = {"frozen": (frozen, start.rule), "trained": state[1], "optimizer": state[2]}
    return {name: sum(x.nbytes for x in jax.tree.leaves(part, is_leaf=_is_quantized)) for name, part in parts.items()}


def _is_quantized(x: Any) -> bool:
    return isinstance(x, jlora.QuantizedArray)


def scores(found: dict[str, Any], method: str) -> list[float]:
    """The test accuracy of every seed at the best rate, in percent; of no seed if runs are missing."""
    tested = [run for run in found["runs"] if run["method"] == method and "test" in run]
    rate = best_rate(found["runs"], method) if tested else None
    by_seed = {run["seed"]: 100 * run["test"]["accuracy"] for run in tested if run["rate"] == rate}
    return [by_seed[seed] for seed in SEEDS] if len(by_seed) == len(SEEDS) else []


def methods_table(kept: dict[str, Any]) -> str:
    """For docs/methods.md. A star marks a rate at an edge of the grid; what was not run is blank."""
    rows = []
    for name in METHODS:
        row = [name]
        for part in PARTS:
            if not (values := scores(kept[part], name)):
                row += ["", ""]
                continue
            rate = best_rate(kept[part]["runs"], name)
            edge = "*" if rate in (RATES[part][0], RATES[part][-1]) else ""
            row += [f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}", f"{rate:g}{edge}"]
        cost, plain = (kept["sst2"]["costs"].get(one) for one in (name, PLAIN))
        if cost:
            memory = sum(cost["bytes"].values()) / sum(plain["bytes"].values())
            row += [f"{cost['ratio']:.2f}", f"{memory:.2f}"]
        else:
            row += ["", ""]
        rows.append(row)
    header = ["method", "digits, %", "rate", "SST-2, %", "rate", "time", "memory"]
    measured = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return _tpu.markdown([header[i] for i in measured], [[row[i] for i in measured] for row in rows])


def quantized_table(kept: dict[str, Any]) -> str:
    """For docs/quantized.md."""
    plain, rows = scores(kept["sst2"], PLAIN), []
    for name, least in (("int8 base", "-0.5"), ("NF4 base", "-1.5"), ("LoftQ, NF4", "-1.5"), ("LQ, NF4", "-1.5")):
        if not (own := scores(kept["sst2"], name)):
            continue
        each = [b - a for a, b in zip(plain, own, strict=True)]
        rows.append([name, f"{statistics.mean(own):.2f}", ", ".join(f"{x:+.2f}" for x in each),
                     f"{statistics.mean(each):+.2f}", least])  # fmt: skip
    return _tpu.markdown(["base", "accuracy, %", "less float32's, by seed", "mean", "at least"], rows)


TABLES = {"methods.md": methods_table, "quantized.md": quantized_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="those to run, in order")
    parser.add_argument("--only", choices=("runs", "costs"))
    parser.add_argument("--checkpoint", type=Path, default=ROOT.parent / "shared" / "models" / "minilm-l6")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2")
    parser.add_argument("--sentences", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=FILE)
    parser.add_argument("--tables", action="store_true", help="write the tables from the results, and run nothing")
    args = parser.parse_args()
    kept: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}

    def keep() -> None:
        draft = args.json.with_suffix(".draft")
        draft.write_text(json.dumps(kept, indent=1) + "\n")
        draft.replace(args.json)

    for part in () if args.tables else args.part:
        settings = {"rates": list(RATES[part]), "held_out": HELD_OUT[part]}
        settings |= {"sentences": args.sentences} if part == "sst2" else {}
        found = kept.setdefault(part, {"settings": settings, "runs": [], "costs": {}})
        if found["settings"] != settings:
            raise SystemExit(f"{args.json} has {part} with {found['settings']}, not {settings}; pass another --json")
        problem = MAKE[part](args)
        if args.only != "costs":
            run_all(problem, part, args.methods, found["runs"], keep)
        if args.only != "runs":
            found["costs"] |= costs(problem, args.methods, args.rounds)
        keep()
    if args.tables:
        for page, table in TABLES.items():
            _tpu.write_table(page, "variants", table(kept))


if __name__ == "__main__":
    main()
