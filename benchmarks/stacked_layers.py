"""Does a deeper stack cost more to trace and to compile? 48 layers of one `nn.scan` against 2.

    python -m benchmarks.stacked_layers [--rounds 7] [--layers 48] [--width 192] [--json FILE]

A Flax Linen stack whose kernels have a leading layer axis is adapted by jlora, and the gradient with respect to the
adapters traced and compiled. The scan is evaluated as a scan, so depth must be free: equally many equations, and
at most 1.2 times the time. Caches are cleared before each trace. Times are CPU seconds, rounds are interleaved, and a
ratio is the median of the ratios within each round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

import jlora
from benchmarks import _measure

FEW = 2
RANK = 8


class Block(nn.Module):
    """One layer: self-attention and an MLP, pre-norm; the carry of a scan."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x))
        h = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width)(h), None


class Stack(nn.Module):
    """``layers`` blocks, their parameters stacked along a leading axis."""

    layers: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return scan(self.width)(x, None)[0]


def make_gradient(layers: int, width: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gradient of a loss with respect to the adapters of a stack, and its arguments as shapes."""
    model = Stack(layers, width)
    x = jax.ShapeDtypeStruct((2, 16, width), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    config = jlora.LoraConfig(rank=RANK, alpha=2 * RANK)
    uses = jlora.trace(model.apply, params, x)
    adapters = jax.eval_shape(lambda key: jlora.init(key, params, config, uses), jax.random.key(1))
    apply: Callable[..., Any] = jlora.lora(model.apply)

    def loss(adapters: Any, params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(apply(jlora.attach(params, adapters), x)).mean()

    return jax.grad(loss), (adapters, params, x)


def count_equations(layers: int, width: int) -> int:
    """The equations of the gradient of a stack."""
    gradient, args = make_gradient(layers, width)
    return _measure.count_equations(jax.make_jaxpr(gradient)(*args))


def measure(layers: int, width: int) -> _measure.Program:
    """The gradient of a stack, traced and compiled with cleared caches."""
    gradient, args = make_gradient(layers, width)
    jax.clear_caches()
    return _measure.compile_program(gradient, *args)


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=192, help="a multiple of 4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    depths = (FEW, args.layers)
    equations = {n: count_equations(n, args.width) for n in depths}
    programs: dict[int, list[_measure.Program]] = {n: [] for n in depths}
    for i in range(args.rounds + 1):
        for n in depths if i % 2 else depths[::-1]:
            program = measure(n, args.width)
            if i:
                programs[n].append(program)
    times = {
        "trace": {str(n): [p.trace_time for p in programs[n]] for n in depths},
        "compile": {str(n): [p.compile_time for p in programs[n]] for n in depths},
    }
    rows = [
        (f"{n} layers", str(equations[n]), *(f"{statistics.median(t[str(n)]):.3f}" for t in times.values()))
        for n in depths
    ]
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}, width {args.width}")
    print(_measure.table(("", "equations", "trace s", "compile s"), rows))
    few, many = map(str, depths)
    bars = [
        _measure.Bar("equations, surplus", equations[args.layers] - equations[FEW], 0),
        *(_measure.Bar(f"{stage} time, ratio", _measure.ratio(times[stage], many, few), 1.2) for stage in times),
    ]
    print()
    print(_measure.table(("bar", "measured", "at most", ""), [bar.row() for bar in bars]))
    if args.json:
        document = {
            "jax": jax.__version__,
            "equations": equations,
            "cpu_seconds": times,
            "bars": [bar.record() for bar in bars],
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
