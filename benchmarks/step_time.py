"""How long is a LoRA step with jlora, against full fine-tuning, LoRA by hand, HF peft, and the lower bound?

    python -m benchmarks.step_time [--rounds 9] [--layers 4] [--width 768] [--bias] [--dtype float32] [--json FILE]
    python -m benchmarks.step_time --grid [--rounds 9] [--dtype float32] [--json FILE]

One transformer encoder (by default 4 layers of width 768, 8×128 tokens, rank 8 on every linear), stepped by AdamW as:

- full: full fine-tuning;
- merged: LoRA with the kernels summed in each step;
- factored: LoRA by hand, as plain ``(x@a)@b``;
- oriented: the same, with jlora's gradient written out by hand;
- jlora;
- limit: the forward pass and the activation gradient of the bare model, without training;
- torch: the same weights in PyTorch, in full and with peft, if installed (``pip install -e ".[interop]"``).

Runs are interleaved; a ratio is the median of the ratios within each round. Use an idle machine: other load slows
PyTorch (OpenMP) several times more than XLA. All adapted variants start from the same values, and the program
checks that their losses agree, step by step. Tracing and compilation times are CPU seconds. The limits that jlora must
meet come last.

``--grid`` steps one layer instead, over ranks, widths, batches and biases, and compares jlora with the better of
factored and merged at each point.

On a CPU the ratio to full fine-tuning depends on XLA's weight gradients: in this encoder it computes them in about a
third less time when the linear layers have a bias (``--bias``), and jlora's time is unchanged.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from benchmarks import _encoder, _measure
from benchmarks._encoder import Array, Tree
from jlora import LoraFactors

BY_HAND = ("merged", "factored", "oriented")
ADAPTED = (*BY_HAND, "jlora", "torch: peft")
HEADER = ("step", "median s", "shortest s", "/ full", "/ limit", "GFLOP", "temp MiB", "trace s", "compile s", "dW dots")
Loss = Callable[[Any, Any, Array, Array], Array]


def losses() -> dict[str, Loss]:
    """For each JAX variant: the loss as a function of (trainable, frozen, x, target)."""
    adapted = jlora.lora(_encoder.encode)

    def of(predict: Callable[[Any, Any, Array], Array]) -> Loss:
        return lambda trainable, frozen, x, target: _encoder.loss(predict(trainable, frozen, x), target)

    return {
        "full": of(lambda params, _, x: _encoder.encode(params, x)),
        "merged": of(lambda f, params, x: _encoder.encode(_encoder.summed(params, f), x)),
        "factored": of(lambda f, params, x: _encoder.encode(_encoder.with_factors(params, f), x, _encoder.factored)),
        "oriented": of(lambda f, params, x: _encoder.encode(_encoder.with_factors(params, f), x, _encoder.oriented)),
        "jlora": of(lambda adapters, params, x: adapted(jlora.attach(params, adapters), x)),
    }


def make_adapters(params: Tree, factors: Tree, x: Array) -> Tree:
    """jlora's adapters for every linear, with the same values as the hand-written factors."""
    rank = _encoder.rank(factors)
    config = jlora.LoraConfig(rank=rank, alpha=rank * _encoder.SCALE)
    adapters = jlora.init(jax.random.key(3), params, config, jlora.trace(_encoder.encode, params, x))
    hand = {f"{layer}/{name}/kernel": pair for layer, pairs in factors.items() for name, pair in pairs.items()}
    return {path: dataclasses.replace(f, **hand[path]) for path, f in adapters.items() if isinstance(f, LoraFactors)}


def make_steps(
    params: Tree, factors: Tree, batch: tuple[Array, Array], only: Sequence[str] = ("full", *BY_HAND, "jlora")
) -> tuple[dict[str, _measure.Program], dict[str, Callable[[], float]]]:
    """The compiled step of ``only`` these JAX variants and of the limit, and functions that take one step and return
    the loss."""
    optimizer = optax.adamw(_encoder.LEARNING_RATE, weight_decay=0.01)
    starts = {"full": params, **dict.fromkeys(BY_HAND, factors), "jlora": make_adapters(params, factors, batch[0])}
    programs: dict[str, _measure.Program] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name in only:
        loss = losses()[name]
        # A copy: the step donates its state.
        trainable = jax.tree.map(jnp.copy, starts[name])
        state = (trainable, optimizer.init(trainable))
        frozen = None if name == "full" else params
        programs[name] = _measure.compile_program(_update(loss, optimizer), state, frozen, *batch, donate=(0,))
        steps[name] = _stepper(programs[name], state, frozen, batch)

    def limit(state: Tree, frozen: None, x: Array, target: Array) -> tuple[tuple[Tree, Array], Array]:
        value, gradient = jax.value_and_grad(lambda x: _encoder.loss(_encoder.encode(state, x), target))(x)
        return (state, gradient), value

    programs["limit"] = _measure.compile_program(limit, params, None, *batch)
    steps["limit"] = lambda: float(jax.block_until_ready(programs["limit"].compiled(params, None, *batch))[1])
    return programs, steps


def _update(loss: Loss, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    def update(state: Any, frozen: Any, x: Array, target: Array) -> tuple[Any, Array]:
        trainable, opt_state = state
        value, gradient = jax.value_and_grad(loss)(trainable, frozen, x, target)
        changes, opt_state = optimizer.update(gradient, opt_state, trainable)
        return (optax.apply_updates(trainable, changes), opt_state), value

    return update


def _stepper(program: _measure.Program, state: Any, frozen: Any, batch: tuple[Array, Array]) -> Callable[[], float]:
    def step() -> float:
        nonlocal state
        state, value = jax.block_until_ready(program.compiled(state, frozen, *batch))
        return float(value)

    return step


def trace_bars(params: Tree, adapters: Tree, batch: tuple[Array, Array], rounds: int) -> list[_measure.Bar]:
    """The time to trace jlora's gradient relative to the bare model's: the first time, and again."""
    starts = {"full": (params, None), "jlora": (adapters, params)}

    def trace(name: str) -> Callable[[], Any]:
        # The losses are rebuilt each time, so that the trace is never cached.
        return lambda: jax.make_jaxpr(jax.grad(losses()[name]))(*starts[name], *batch)

    runs = {name: trace(name) for name in starts}
    cases = {"tracing the gradient / the bare model's": jax.clear_caches, "the same, traced again": lambda: None}
    times = {
        question: _measure.interleave(runs, rounds, clock=time.process_time, before=before)
        for question, before in cases.items()
    }
    return [_measure.Bar(question, _measure.ratio(t, "jlora", "full"), 2.0) for question, t in times.items()]


def check_agreement(curves: dict[str, list[float]], dtype: str) -> None:
    """Raises an AssertionError if two equivalent variants differ."""
    tolerance = 1e-4 if dtype == "float32" else 3e-2
    for group in (ADAPTED, ("full", "torch: full")):
        present = [name for name in group if name in curves]
        for name in present[1:]:
            np.testing.assert_allclose(
                curves[name], curves[present[0]], rtol=tolerance, err_msg=f"losses: {name} against {present[0]}"
            )


def grid() -> Iterator[_encoder.Shape]:
    """One layer: every rank, width and batch without biases, and every width and batch of one rank with them."""
    for rank, width, batch in itertools.product((4, 16, 64, 256), (256, 512, 1024), (1, 8, 32)):
        yield _encoder.Shape(1, width, batch, 96, rank=rank)
        if rank == 16:
            yield _encoder.Shape(1, width, batch, 96, bias=True, rank=rank)


def measure_grid(rounds: int, dtype: str) -> list[dict[str, Any]]:
    """The step time of jlora at every point of the grid, relative to LoRA by hand and the limit; printed as it is
    measured."""
    found = []
    print("rank  width  batch  bias  jlora ms  / better by hand  / limit")
    for shape in grid():
        params, factors = _encoder.make_params(shape, dtype), _encoder.make_factors(shape)
        only = ("merged", "factored", "jlora")
        _, steps = make_steps(params, factors, _encoder.make_batch(shape, dtype), only)
        times = _measure.interleave(steps, rounds)
        by_hand = max(_measure.ratio(times, "jlora", name) for name in only[:2])
        ms, limit = 1000 * statistics.median(times["jlora"]), _measure.ratio(times, "jlora", "limit")
        found.append({**dataclasses.asdict(shape), "ms": ms, "ratio_by_hand": by_hand, "ratio_to_limit": limit})
        bias = "yes" if shape.bias else "no"
        print(f"{shape.rank:4}  {shape.width:5}  {shape.batch:5}  {bias:4}  {ms:8.1f}  {by_hand:16.2f}  {limit:7.2f}")
    worst = _measure.Bar("step time / the better by hand, at most", max(f["ratio_by_hand"] for f in found), 1.05)
    print()
    print(_measure.table(("bar", "measured", "at most", ""), [worst.row()]))
    return found


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64")
    parser.add_argument("--tokens", type=int, default=128, help="in each of the 8 sequences")
    parser.add_argument("--bias", action="store_true", help="give the linear layers a bias")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--grid", action="store_true", help="one layer, over ranks, widths, batches and biases")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.grid:
        points = measure_grid(args.rounds, args.dtype)
        if args.json:
            args.json.write_text(json.dumps(points, indent=2) + "\n")
        return
    shape = _encoder.Shape(args.layers, args.width, tokens=args.tokens, bias=args.bias)
    if args.width % 64 or shape.batch * shape.tokens in (args.width, 4 * args.width):
        parser.error("--width: expected a multiple of 64, different from 8 * tokens, as is 4 times it")

    params, factors = _encoder.make_params(shape, args.dtype), _encoder.make_factors(shape)
    batch = _encoder.make_batch(shape, args.dtype)
    programs, steps = make_steps(params, factors, batch)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("peft"):
        from benchmarks import _torch_peer

        steps |= _torch_peer.make_steps(shape, params, factors, batch, args.dtype)
    else:
        print('torch or peft is not installed: pip install -e ".[interop]" to compare with them\n')
    traces = trace_bars(params, make_adapters(params, factors, batch[0]), batch, args.rounds)

    curves: dict[str, list[float]] = {name: [] for name in steps}
    runs = {name: lambda name=name: curves[name].append(steps[name]()) for name in steps}
    times = _measure.interleave(runs, args.rounds)
    check_agreement(curves, args.dtype)

    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}, {len(os.sched_getaffinity(0))} cores, {args.dtype}, {shape}")
    rows, record = report(times, programs, [shape.linear(name) for name in _encoder.LINEARS])
    bars = [*make_bars(times, programs, record), *traces]
    print(_measure.table(HEADER, rows))
    print()
    print(_measure.table(("bar", "measured", "at most", ""), [bar.row() for bar in bars]))
    if args.json:
        document = {
            "jax": jax.__version__,
            "device": device.device_kind,
            "time": time.time(),
            "dtype": args.dtype,
            "shape": dataclasses.asdict(shape),
            "steps": record,
            "bars": [bar.record() for bar in bars],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


def report(
    times: dict[str, list[float]], programs: dict[str, _measure.Program], weights: list[tuple[int, int]]
) -> tuple[list[tuple[str, ...]], dict[str, dict[str, Any]]]:
    """The rows of the table, as text and as numbers."""
    rows, record = [], {}
    for name, seconds in times.items():
        full, limit = (_measure.ratio(times, name, other) for other in ("full", "limit"))
        record[name] = {"seconds": seconds, "ratio_to_full": full, "ratio_to_limit": limit}
        cells = (name, f"{statistics.median(seconds):.3f}", f"{min(seconds):.3f}", f"{full:.2f}", f"{limit:.2f}")
        if name in programs:
            p = programs[name]
            dots = _measure.weight_shaped_dots(p.text, weights)
            record[name] |= {
                "flops": p.flops,
                "temporary_bytes": p.temporary_memory,
                "trace_seconds": p.trace_time,
                "compile_seconds": p.compile_time,
                "weight_shaped_dots": dots,
            }
            cells += (
                f"{p.flops / 1e9:.2f}",
                f"{p.temporary_memory / 2**20:.1f}",
                f"{p.trace_time:.2f}",
                f"{p.compile_time:.2f}",
                str(dots),
            )
        rows.append(cells + ("-",) * (len(HEADER) - len(cells)))
    return rows, record


def make_bars(
    times: dict[str, list[float]], programs: dict[str, _measure.Program], record: dict[str, dict[str, Any]]
) -> list[_measure.Bar]:
    """The limits that jlora must meet."""
    jlora_, hand, same = (programs[name] for name in ("jlora", "factored", "oriented"))
    bars = [_measure.Bar("step time / full fine-tuning", _measure.ratio(times, "jlora", "full"), 0.60)]
    if "torch: peft" in times:
        bars.append(_measure.Bar("step time / PyTorch + peft", _measure.ratio(times, "jlora", "torch: peft"), 1.15))
    return [
        *bars,
        _measure.Bar("FLOPs / factored by hand", jlora_.flops / hand.flops, 1.02),
        _measure.Bar("temporary memory / oriented by hand", jlora_.temporary_memory / same.temporary_memory, 1.02),
        _measure.Bar("weight-shaped gradient matmuls", record["jlora"]["weight_shaped_dots"], 0),
    ]


if __name__ == "__main__":
    main()
