"""Measurement tools for the benchmarks: staged compilation, interleaved runs, tables."""

from __future__ import annotations

import dataclasses
import gc
import math
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled JAX function and its compilation cost; memory in bytes, times in CPU seconds of this process,
    which other users of the machine do not affect."""

    compiled: Any
    trace_time: float
    compile_time: float

    @property
    def flops(self) -> float:
        return self.compiled.cost_analysis()["flops"]

    @property
    def temporary_memory(self) -> int:
        return self.compiled.memory_analysis().temp_size_in_bytes

    @property
    def text(self) -> str:
        return self.compiled.as_text()


def compile_program(fn: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Program:
    """``fn`` traced, lowered and compiled for ``args``; ``donate`` as `jax.jit`'s ``donate_argnums``."""
    start = time.process_time()
    traced = jax.jit(fn, donate_argnums=donate).trace(*args)
    middle = time.process_time()
    compiled = traced.lower().compile()
    return Program(compiled, middle - start, time.process_time() - middle)


def count_equations(jaxpr: Any) -> int:
    """The number of equations in a jaxpr and in the jaxprs inside it."""
    eqns = getattr(jaxpr, "jaxpr", jaxpr).eqns
    inner = [v for eqn in eqns for v in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)]
    return len(eqns) + sum(count_equations(v) for v in inner if _is_jaxpr(v))


def _is_jaxpr(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


def weight_shaped_dots(text: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """The number of matmuls in a compiled program whose result has a weight's shape, or its transpose."""
    wanted = {tuple(sorted(shape)) for shape in shapes}
    results = re.findall(r"= \(?\w+\[([\d,]+)\]\S* (?:dot\(|custom-call\(.*(?:gemm|matmul))", text)
    return sum(tuple(sorted(map(int, r.split(",")))) in wanted for r in results)


def moved(text: str, size: int) -> int:
    """The number of copies and transposes of at least ``size`` elements in a compiled program."""
    results = re.findall(r"= \w+\[([\d,]+)\]\S* (?:copy|transpose)\(", text)
    return sum(math.prod(map(int, r.split(","))) >= size for r in results)


def interleave(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, list[float]]:
    """The seconds of every run in every round. Each round runs all of them, in its own order.

    A run must block until its work is done. The first round warms up and is not counted. ``before`` is called
    before each run, untimed, followed by a garbage collection.
    """
    order = list(runs)
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        shuffle(order)
        for name in order:
            before()
            gc.collect()
            start = clock()
            runs[name]()
            if i:
                times[name].append(clock() - start)
    return times


def ratio(times: Mapping[str, Sequence[float]], name: str, other: str) -> float:
    """The median over rounds of ``name``'s time divided by ``other``'s in the same round, which cancels noise."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


@dataclasses.dataclass(frozen=True)
class Bar:
    """A measured value and its limit."""

    question: str
    measured: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.measured <= self.limit

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "holds": self.holds}

    def row(self) -> tuple[str, ...]:
        """For `table`."""
        return self.question, f"{self.measured:.3f}", f"{self.limit:g}", "pass" if self.holds else "MISS"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first left-aligned, the others right-aligned."""
    lines = [tuple(header), *map(tuple, rows)]
    first, *rest = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([line[0].ljust(first), *(cell.rjust(w) for cell, w in zip(line[1:], rest, strict=True))]).rstrip()
        for line in lines
    )
