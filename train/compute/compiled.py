"""What a compiled program costs, by its compiler's own account: estimated cycles, collectives, memory.

XLA's analyses count the body of a loop once. Here it counts as often as it runs (`train.compute.hlo`).

The TPU compiler estimates the cycles of every fusion, not of collectives and kernels. They are estimates, not times;
but they are the same on every machine, and a TPU need not be there (`jax.experimental.topologies`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from train.compute import hlo

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "f4e2m1fn": 0.5, "c64": 8, "c128": 16}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""The products of an attention kernel: scores and result; scores, and gradients of the weights and of its results."""
_NO_ARRAYS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"}


class ComputedArray(NamedTuple):
    """A result that the program computes.

    Attributes:
      shape: such as ``bf16[4,1024,8192]``, of one device.
      bytes: its size.
      source: the operation of the JAX program that it belongs to, where the compiler knows it.
    """

    shape: str
    bytes: int
    source: str


@dataclass
class _Costs:
    """Of one computation: its own, and the computations that it calls, with how often."""

    cycles: int = 0
    arrays: list[ComputedArray] = field(default_factory=list)
    collectives: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)
    calls: list[tuple[tuple[str, ...], int]] = field(default_factory=list)
    unknown_loops: int = 0


class Compiled:
    """A program that `jax.stages.Lowered.compile` compiled.

    Attributes:
      temp_bytes: temporary memory on one device: what lives while it runs, beside arguments and results.
      argument_bytes, output_bytes, alias_bytes: of one device; aliased results reuse the memory of donated arguments.
    """

    def __init__(self, compiled: Any):
        memory = compiled.memory_analysis()
        self.temp_bytes: int = memory.temp_size_in_bytes
        self.argument_bytes: int = memory.argument_size_in_bytes
        self.output_bytes: int = memory.output_size_in_bytes
        self.alias_bytes: int = memory.alias_size_in_bytes
        self._text: str = compiled.as_text()

    @property
    def peak_bytes(self) -> int:
        """Memory of one device while it runs: arguments, results and temporaries."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes

    @property
    def cycles(self) -> int:
        """The compiler's estimate for one device, without collectives and kernels; 0 from compilers that make none."""
        return self._total.cycles

    @property
    def collectives(self) -> dict[str, int]:
        """Bytes of the results on one device, by kind (``all-gather``), largest first; all that run are added."""
        return dict(self._total.collectives.most_common())

    @property
    def kernels(self) -> dict[str, int]:
        """The multiply-adds on one device of JAX's attention kernels for TPUs, by kernel: of all queries with all keys,
        although they skip blocks that a mask hides. Other kernels, whose products are not known, have 0."""
        return dict(self._total.kernels.most_common())

    @property
    def unknown_loops(self) -> int:
        """The number of loops that are counted once, for it is not known how often they run."""
        computations, entry = self._costs
        return sum(computations[name].unknown_loops for name in {*_reached(entry, computations)})

    def largest(self, count: int) -> Sequence[ComputedArray]:
        """The largest arrays that the program computes, one of each shape."""
        computations, entry = self._costs
        found: dict[str, ComputedArray] = {}
        for name in _reached(entry, computations):
            for array in computations[name].arrays:
                found.setdefault(array.shape, array)
        return sorted(found.values(), key=lambda array: -array.bytes)[:count]

    @cached_property
    def _costs(self) -> tuple[dict[str, _Costs], str]:
        """Of each computation by name, and the name of the entry."""
        module = hlo.parse(self._text)
        started = {channel for one in module.computations.values() if _starts(one) for channel in _channels(one)}
        costs = {name: _Costs() for name in module.computations}
        for name, computation in module.computations.items():
            for instruction in computation.instructions.values():
                _add(costs[name], instruction, module, started)
        return costs, module.entry

    @cached_property
    def _total(self) -> _Costs:
        computations, entry = self._costs
        return _total_of(entry, computations, {})


def _add(own: _Costs, instruction: hlo.Instruction, module: hlo.Module, started: set[str]) -> None:
    opcode, line = instruction.opcode, instruction.line
    if cycles := re.search(r'"estimated_cycles":"?(\d+)', line):
        own.cycles += int(cycles[1])
    if opcode not in _NO_ARRAYS and not opcode.endswith(("-start", "-done")):
        source = re.search(r'op_name="([^"]*)"', line)
        for shape in _SHAPE.finditer(instruction.result):
            own.arrays.append(ComputedArray(shape[0], math.ceil(sum(_sizes(shape[0]))), source[1] if source else ""))
    if opcode == "while":
        trips = module.trips(instruction)
        own.unknown_loops += trips is None
        own.calls += [((part,), 1 if trips is None else trips) for part in instruction.called("body", "condition")]
    elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        names = branches[1].split(", ") if branches else instruction.called("true_computation", "false_computation")
        own.calls.append((tuple(name.lstrip("%") for name in names), 1))
    elif opcode in ("call", "async-start"):
        own.calls += [((name,), 1) for name in instruction.called("to_apply", "calls")]
    elif opcode == "custom-call" and "tpu_custom_call" in line:
        name = re.sub(r"[._]*\d*$", "", instruction.name)
        own.kernels[name] += _multiply_adds(name, line)
    for kind, size in _collectives(instruction, module, started):
        own.collectives[kind] += size


def _collectives(instruction: hlo.Instruction, module: hlo.Module, started: set[str]) -> Iterator[tuple[str, int]]:
    """Kind and bytes of an instruction's collectives, which on a TPU may be fused.

    There an asynchronous one is in several fusions: that of its start, of its end, and those that overlap with it.

    Args:
      started: channels of the collectives that have a start, which is counted alone.
    """
    kind = instruction.opcode.removesuffix("-start")
    if kind in COLLECTIVES:
        yield kind, math.ceil(_result_bytes(instruction.result, started=kind != instruction.opcode))
    if kind != "fusion":
        return
    for name in instruction.called("calls"):
        fused = module.computations[name]
        for inner in fused.instructions.values():
            if inner.opcode in COLLECTIVES and (_starts(fused) or not started & {*_channel(inner)}):
                yield inner.opcode, math.ceil(_result_bytes(inner.result, started=False))


def _starts(computation: hlo.Computation) -> bool:
    """Whether this is what a TPU fuses to start a collective."""
    return computation.root is not None and '"AsyncCollectiveStart"' in computation.root.line


def _channels(computation: hlo.Computation) -> Iterator[str]:
    for instruction in computation.instructions.values():
        yield from _channel(instruction)


def _channel(instruction: hlo.Instruction) -> list[str]:
    return re.findall(r"channel_id=(\d+)", instruction.line)


def _reached(name: str, computations: dict[str, _Costs]) -> Iterator[str]:
    """A computation and all that it calls; not what is fused, which has no memory of its own."""
    yield name
    for callees, _ in computations[name].calls:
        for callee in callees:
            yield from _reached(callee, computations)


def _multiply_adds(name: str, line: str) -> int:
    """Of one call of an attention kernel: each of its products pairs all queries with all keys of each head."""
    products = next((n for part, n in _PRODUCTS.items() if part in name), 0)
    if not products:
        return 0
    # Queries [..., heads, length, dim] and keys [..., key heads, slots, dim] are the first floats.
    shapes = re.findall(r"\b(?:bf16|f16|f32)\[([\d,]+)\]", line[line.index("operand_layout_constraints") :])
    queries, keys = ([int(n) for n in shape.split(",")] for shape in shapes[:2])
    return products * math.prod(queries) * keys[-2]


def _total_of(name: str, computations: dict[str, _Costs], known: dict[str, _Costs]) -> _Costs:
    """Cycles, collectives and kernels of a computation with all that it calls; of branches, those with most cycles."""
    if name not in known:
        own = computations[name]
        found = _Costs(own.cycles, collectives=Counter(own.collectives), kernels=Counter(own.kernels))
        for callees, times in own.calls:
            most = max((_total_of(callee, computations, known) for callee in callees), key=lambda total: total.cycles)
            found.cycles += times * most.cycles
            for mine, theirs in ((found.collectives, most.collectives), (found.kernels, most.kernels)):
                mine.update({kind: times * n for kind, n in theirs.items()})
        known[name] = found
    return known[name]


def _result_bytes(shape: str, *, started: bool) -> float:
    """Bytes of a result; an asynchronous start returns its operands too, before its results, and counters after."""
    sizes = list(_sizes(shape.replace("u32[]", "") if started else shape))
    return sum(sizes[len(sizes) // 2 :] if started and len(sizes) > 1 else sizes)


def _sizes(shape: str) -> Iterator[float]:
    for dtype, dims in _SHAPE.findall(shape):
        bits = re.search(r"\d+", dtype)
        width = _BYTES.get(dtype) or (int(bits[0]) / 8 if bits else 0)
        yield width * math.prod(int(n) for n in dims.split(",") if n)
