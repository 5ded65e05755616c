"""What do weights normalized in each step cost: factored, or summed and then normalized?

    python -m benchmarks.standardized_weights [--rounds 7] [--json FILE]

Three equal layers, each with weight standardization (ResNetV2, BiT) or weight norm, and a normalized activation between
them; the loss and its gradient with respect to the adapters (rank 8) and the input:

- bare: the layers alone, without adapters;
- materialized: ``W + s·AB`` is summed and normalized in each step, with the gradient through it;
- jlora: the mean and the norm of ``W + s·AB`` from the factors, and the norm's inverse as a multiplier of the result.

wav2vec 2.0's positional convolution has a norm per tap, along an axis that the convolution sums: jlora
materializes it, with a warning, and the two are one program. Runs are interleaved; a ratio is the median of the ratios
within each round.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jlora
from benchmarks import _measure

LAYERS, RANK = 3, 8
VARIANTS = ("bare", "materialized", "jlora")


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer whose weight is normalized.

    Attributes:
      kernel: shape of the weight, outputs last.
      x: shape of the input, channels last; the output has the same shape.
      centred: whether the mean is subtracted first.
      kept: the axes of the weight with separate norms.
      groups: the groups of a convolution.
    """

    kernel: tuple[int, ...]
    x: tuple[int, ...]
    centred: bool = True
    kept: tuple[int, ...] = (-1,)
    groups: int = 1

    def normalized(self, w: Any) -> Any:
        axes = tuple(d for d in range(w.ndim) if d - w.ndim not in self.kept)
        if self.centred:
            w = w - jnp.mean(w, axes, keepdims=True)
        return w * lax.rsqrt(jnp.mean(jnp.square(w), axes, keepdims=True) + 1e-6) / math.sqrt(math.prod(w.shape[:-1]))

    def layer(self, w: Any, x: Any) -> Any:
        w = self.normalized(w)
        if len(self.kernel) == 2:
            y = x @ w
        else:
            spatial = "HW"[: x.ndim - 2]
            y = lax.conv_general_dilated(
                x, w, (1,) * len(spatial), "SAME", feature_group_count=self.groups,
                dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            )  # fmt: skip
        return jax.nn.relu(jax.nn.standardize(y, epsilon=1e-5))


CASES = {
    "dense 1024x1024, 8 tokens": Case((1024, 1024), (8, 1024), centred=False),
    "the same, 64 tokens": Case((1024, 1024), (64, 1024), centred=False),
    "the same, 512 tokens": Case((1024, 1024), (512, 1024), centred=False),
    "the same, 4096 tokens": Case((1024, 1024), (4096, 1024), centred=False),
    "1x1x512x512, 8 of 14x14": Case((1, 1, 512, 512), (8, 14, 14, 512)),
    "3x3x256x256, 8 of 14x14": Case((3, 3, 256, 256), (8, 14, 14, 256)),
    "3x3x256x256, 32 of 14x14": Case((3, 3, 256, 256), (32, 14, 14, 256)),
    "wav2vec2 positions, 2 of 100": Case((128, 48, 768), (2, 100, 768), False, (-3,), 16),
}
SMALL = {
    "dense, few tokens": Case((256, 256), (8, 256), centred=False),
    "dense, many tokens": Case((256, 256), (1024, 256), centred=False),
    "convolution": Case((3, 3, 128, 128), (2, 14, 14, 128)),
    "convolution, many positions": Case((3, 3, 128, 128), (8, 14, 14, 128)),
}
"""Smaller cases, compiled by the tests."""


def make_losses(case: Case) -> tuple[dict[str, Callable[..., Any]], tuple[Any, ...]]:
    """For each variant, the loss of ``(adapters, x, params)``, and arrays for these."""

    def fn(params: Any, x: Any) -> Any:
        for w in params.values():
            x = case.layer(w, x)
        return x

    random = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(random.normal(0, 1, case.kernel), jnp.float32) for i in range(LAYERS)}
    x = jnp.asarray(random.normal(0, 1, case.x), jnp.float32)
    fresh = jlora.init(jax.random.key(0), params, jlora.LoraConfig(rank=RANK), jlora.trace(fn, params, x))
    adapters = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0, 0.1, leaf.shape), jnp.float32), fresh)
    adapted = jlora.lora(fn, materialize="allow")
    outputs = {
        "bare": lambda adapters, x, params: fn(params, x),
        "materialized": lambda adapters, x, params: fn(jlora.merge(params, adapters), x),
        "jlora": lambda adapters, x, params: adapted(jlora.attach(params, adapters), x),
    }
    return {name: functools.partial(_loss, output) for name, output in outputs.items()}, (adapters, x, params)


def _loss(output: Callable[..., Any], *args: Any) -> Any:
    return jnp.sin(output(*args)).mean()


def compile_programs(case: Case) -> dict[str, _measure.Program]:
    """The compiled loss and gradient of each variant."""
    losses, args = make_losses(case)
    return {
        name: _measure.compile_program(jax.value_and_grad(loss, 1 if name == "bare" else (0, 1)), *args)
        for name, loss in losses.items()
    }


def measure(case: Case, rounds: int) -> dict[str, dict[str, float]]:
    """For each variant: GFLOP, MiB of temporary memory, and time relative to the materialized form."""
    _, args = make_losses(case)
    programs = compile_programs(case)
    results = {name: program.compiled(*args) for name, program in programs.items()}
    for got, want in zip(*(jax.tree.leaves(results[name]) for name in ("jlora", "materialized")), strict=True):
        distance, size = (float(jnp.linalg.norm(x)) for x in (got - want, want))
        assert distance <= 1e-2 * size, f"{distance} of {size}"
    runs = {n: lambda p=p: jax.block_until_ready(p.compiled(*args)) for n, p in programs.items()}
    times = _measure.interleave(runs, rounds)
    return {
        name: {
            "gflop": program.flops / 1e9,
            "temporary_mib": program.temporary_memory / 2**20,
            "time_ratio": _measure.ratio(times, name, "materialized"),
        }
        for name, program in programs.items()
    }


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}; flops, temporary memory, time by the materialized")
    record, rows = {}, []
    for name, case in CASES.items():
        figures = record[name] = measure(case, args.rounds)
        base = figures["materialized"]
        cells = [f"{base['gflop']:.2f}", f"{base['temporary_mib']:.1f}"]
        for variant in ("jlora", "bare"):
            own = figures[variant]
            cells += [f"{own[key] / base[key]:.2f}" for key in ("gflop", "temporary_mib")] + [
                f"{own['time_ratio']:.2f}"
            ]
        rows.append((name, *cells))
    header = ("layers", "GFLOP", "MiB", "jlora: flops", "memory", "time", "bare: flops", "memory", "time")
    print(_measure.table(header, rows))
    if args.json:
        args.json.write_text(json.dumps({"jax": jax.__version__, "cases": record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
