"""What does a quantized base cost on a TPU, by the account of the TPU's own compiler?

    python -m benchmarks.tpu_quantized [--part step memory] [--tables]

Compiles for one v5e chip, which need not be there; needs libtpu. Cycles are the compiler's estimates.

- ``step``: a training step of 4 layers of Llama 3.2 1B with a bfloat16 base, and with quantized ones.
- ``memory``: Llama 3.1 8B with rank 16 on every linear layer, one row of 2,048 tokens, each layer recomputed.

Results are kept in ``results/tpu_quantized.json``; the tables are written into docs/speed.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

import jlora
from benchmarks import _tpu
from benchmarks.tpu_step import LLAMA_4K, OURS, Point, Steps

FILE = _tpu.RESULTS / "tpu_quantized.json"
SCHEMES = ("bfloat16", "int8", "fp8", "int4", "nf4")
STEPS = [dataclasses.replace(LLAMA_4K, remat=remat) for remat in ("none", "full")]
LARGE = Point("Llama 3.1 8B", 1, 2048, "full", attention="flash")
CHIP = 15.75  # GiB that a program may use on a v5e chip


def cost(point: Point, scheme: str) -> dict[str, Any]:
    steps = Steps(point, _tpu.slice_devices("v5e:2x4"))
    if scheme != "bfloat16":
        uses = jlora.trace(steps.model.apply, steps.params, steps.tokens)
        steps.params = jlora.quantize(steps.params, scheme, uses)
    return steps.cost("jlora") | {"base_bytes": base_bytes(steps.params)}


def base_bytes(params: Any) -> int:
    leaves = jlora.named_leaves(params)[0].values()
    return sum(x.nbytes if isinstance(x, jlora.QuantizedArray) else x.size * x.dtype.itemsize for x in leaves)


def results_of(results: _tpu.Results, point: Point, schemes: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    found = {s: results.get(f"{s}: {point}", functools.partial(cost, point, s), *OURS) for s in schemes}
    return {scheme: one for scheme, one in found.items() if one is not None}


def step_table(results: _tpu.Results) -> str:
    rows = []
    for point in STEPS:
        found = results_of(results, point, SCHEMES)
        plain = found["bfloat16"]["cycles"]
        for scheme, one in found.items():
            cycles = f"{one['cycles'] / 1e6:.1f} ({one['cycles'] / plain:.2f})"
            rows.append(
                [point.remat, scheme, cycles, *(f"{one[name] / 2**20:,.0f}" for name in ("base_bytes", "temp_bytes"))]
            )
    return _tpu.markdown(["remat", "base", "Mcycles (/ bfloat16)", "base, MiB", "temporary, MiB"], rows)


def memory_table(results: _tpu.Results) -> str:
    found = results_of(results, LARGE, ("int8", "nf4"))
    rows = [
        [scheme, *(f"{one[name] / 2**30:.2f}" for name in ("base_bytes", "peak_bytes")), f"{one['cycles'] / 1e6:,.0f}"]
        for scheme, one in found.items()
    ]
    return _tpu.markdown(["base", "base, GiB", f"peak of {CHIP}, GiB", "Mcycles"], rows)


TABLES = {"step": step_table, "memory": memory_table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--tables", action="store_true", help="write the tables from the results, and compile nothing")
    args = parser.parse_args()
    results = _tpu.Results(FILE, stale=args.tables)
    for part in args.part:
        table = TABLES[part](results)
        print(table)
        _tpu.write_table("speed.md", f"TPU, quantized: {part}", table)


if __name__ == "__main__":
    main()
