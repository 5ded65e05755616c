"""How much faster is one batch with mixed adapters than its rows one by one, and what do groups of rows save?

    python -m benchmarks.mixed_batches [--rounds 9] [--json FILE]

64 rows, each with its own: 63 adapters of ranks 1 to 16 on every linear weight, and the base alone. The models are the
digits' network (`configs/digits.py`) and MiniLM-L6-H384 with random weights, at several lengths. One by one means 64
calls of one compiled program on adapters that are attached in advance. The factors of the rows are selected once, as
for the tokens of an answer, or for each batch. "bare" is the same gain of the model without adapters.

Groups: 1,024 rows of one token through four layers of width 384, 16 adapters of rank 16, with the factors gathered for
each row, or for each group of rows with one adapter (`group_size`). FLOPs are relative to the same rows with one
adapter for all.

Runs are interleaved; a ratio is the median of the ratios within each round, and in brackets that of the shortest times.
Use an idle machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from benchmarks._measure import compile_program, interleave, ratio, table
from configs.digits import config as digits
from jlora import models
from train.config import PatchTransformer
from train.networks.scratch import from_scratch

ROWS, RANKS = 64, 16
MINILM = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
}
LENGTHS = (1, 16)
GROUP_SIZES = (1, 2, 4, 8)
LEAST_GAIN, MOST_FLOPS = 8.0, 1.1


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with a batch of `ROWS` rows."""

    name: str
    fn: Callable[..., Any]
    params: Any
    batch: jax.Array
    exclude: tuple[str, ...] = jlora.HEADS


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    assert isinstance(digits.model, PatchTransformer)
    task: Any = dataclasses.replace(digits.task, side=8, labels=tuple("0123456789"))
    network = from_scratch(digits.model, task, "none")
    images = jnp.asarray(rng.normal(size=(ROWS, 8, 8, 1)), jnp.float32)
    params = network.init(jax.random.key(0))
    exclude = (*jlora.HEADS, "^embed/")  # whose 4 inputs are fewer than the ranks
    found = [Case("digits", lambda p, x: network.forward(p, {"images": x}), params, images, exclude)]
    model = models.build(MINILM, task="sequence-classification", labels=("bad", "good"))
    params = {"params": model.init(jax.random.key(0), models.example_inputs(model))["params"]}
    for length in LENGTHS:
        tokens = jnp.asarray(rng.integers(0, MINILM["vocab_size"], (ROWS, length)))
        found.append(Case(f"MiniLM, {length} token(s)", model.apply, params, tokens))
    return found


def adapters_of(case: Case, ranks: Sequence[int]) -> Any:
    """A stack of random adapters of every linear weight, made by NumPy."""
    uses = jlora.trace(case.fn, case.params, case.batch)
    config = jlora.LoraConfig(rank=max(ranks), alpha=max(ranks), exclude=case.exclude)
    shapes: Any = jax.eval_shape(lambda: jlora.init(jax.random.key(0), case.params, config, uses))
    rng = np.random.default_rng(0)

    def one(f: jlora.LoraFactors) -> jlora.LoraFactors:
        used = np.arange(f.rank) < np.reshape(ranks, (-1, *(1,) * (f.a.ndim - 1), 1))
        a = rng.normal(0, f.a.shape[-2] ** -0.5, (len(ranks), *f.a.shape)) * used
        b = rng.normal(0, 0.02, (len(ranks), *f.b.shape))
        return dataclasses.replace(f, a=jnp.asarray(a, f.a.dtype), b=jnp.asarray(b, f.b.dtype))

    return {path: one(f) for path, f in shapes.items()}


def serve(case: Case, rounds: int) -> dict[str, Any]:
    """A mixed batch against its rows one by one."""
    stacked = adapters_of(case, [1 + i % RANKS for i in range(ROWS - 1)])
    ids = jnp.arange(ROWS) - 1
    every = [
        case.params,
        *(jlora.attach(case.params, jax.device_put(one)) for one in jlora.unstack(jax.device_get(stacked))),
    ]
    rows = [case.batch[i : i + 1] for i in range(ROWS)]
    apply, bare = jax.jit(jlora.lora(case.fn, materialize="error")), jax.jit(case.fn)

    select = jax.jit(jlora.select)
    tree = jlora.attach(case.params, select(stacked, ids))
    runs = {
        "mixed": lambda: apply(tree, case.batch),
        "mixed and selected": lambda: apply(jlora.attach(case.params, select(stacked, ids)), case.batch),
        "one by one": lambda: [apply(tree, row) for tree, row in zip(every, rows, strict=True)],
        "bare": lambda: bare(case.params, case.batch),
        "bare one by one": lambda: [bare(case.params, row) for row in rows],
    }
    error = float(jnp.abs(runs["mixed"]() - jnp.concatenate(runs["one by one"]())).max())
    times = interleave({name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()}, rounds)
    pairs = {"once": ("one by one", "mixed"), "each batch": ("one by one", "mixed and selected")}
    pairs["bare"] = "bare one by one", "bare"
    gains = {name: (ratio(times, *pair), shortest(times, *pair)) for name, pair in pairs.items()}
    return {"case": case.name, "gains": gains, "error": error, "seconds": times}


def shortest(times: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """The ratio of the shortest times."""
    return min(times[name]) / min(times[other])


def group(rounds: int, rows: int = 1024, adapters: int = 16, width: int = 384, layers: int = 4) -> list[dict[str, Any]]:
    """The work and time of each size of a group."""
    rng = np.random.default_rng(0)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, shape[-2] ** -0.5, shape), jnp.float32)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w["up"]) @ w["down"], None), x, params)[0]

    params = {"up": array(layers, width, 4 * width), "down": array(layers, 4 * width, width)}
    case = Case("", fn, params, array(rows, width))
    stacked = adapters_of(case, [RANKS] * adapters)
    ids = rng.integers(-1, adapters, rows)
    apply = jlora.lora(fn, materialize="error")
    one = jlora.attach(params, jlora.unstack(jax.device_get(stacked))[0])
    programs = {"one adapter": (compile_program(apply, one, case.batch), one)}
    for size in GROUP_SIZES:
        tree = jlora.attach(params, jlora.select(stacked, ids, group_size=size))
        programs[str(size)] = compile_program(apply, tree, case.batch), tree
    runs = {n: lambda p=p, t=t: jax.block_until_ready(p.compiled(t, case.batch)) for n, (p, t) in programs.items()}
    expected = runs["1"]()
    times = interleave(runs, rounds)
    least = programs["one adapter"][0].flops
    return [
        {
            "group_size": int(name),
            "flops": program.flops / least,
            "time": (ratio(times, name, "one adapter"), shortest(times, name, "one adapter")),
            "factors_mib": sum(x.nbytes for x in jax.tree.leaves(jlora.detach(tree)[1])) / 2**20,
            "error": float(jnp.abs(runs[name]() - expected).max()),
        }
        for name, (program, tree) in programs.items()
        if name != "one adapter"
    ]


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    served = [serve(case, args.rounds) for case in cases()]
    header = ("one by one / mixed", *(f"selected {when}" for when in ("once", "each batch")), "asked", "bare", "error")
    rows = []
    for x in served:
        once, each, bare = (f"{median:.1f} ({least:.1f})" for median, least in x["gains"].values())
        rows.append([x["case"], once, each, f"{LEAST_GAIN:g}", bare, f"{x['error']:.1e}"])
    print(table(header, rows))
    groups = group(args.rounds)
    header = ("group_size", "FLOPs / one adapter", "at most", "time / one adapter", "factors MiB", "error")
    rows = []
    for x in groups:
        cells = f"{x['flops']:.3f}", f"{MOST_FLOPS}", "{:.2f} ({:.2f})".format(*x["time"]), f"{x['factors_mib']:.0f}"
        rows.append([str(x["group_size"]), *cells, f"{x['error']:.1e}"])
    print(table(header, rows))
    if args.json:
        args.json.write_text(json.dumps({"served": served, "groups": groups}, indent=2) + "\n")


if __name__ == "__main__":
    main()
