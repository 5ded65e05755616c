"""From which length on is attention without all scores faster?

    python -m benchmarks.attention [--part cpu tpu] [--quick] [--tables]

- ``cpu``: attention alone, forward and backward, on this machine: chunks of queries against all scores at once,
  interleaved; medians of ratios. float32, 9 heads of 64 and 3 key heads, 4096 tokens in rows of each length.
- ``tpu``: a LoRA step of a Llama of 2 layers on one v5e chip, by the TPU's compiler (see `benchmarks.tpu_step`). It
  makes no estimate for kernels: their products count at the chip's peak, those in blocks that they skip too.

The second table is kept in ``results/attention.json``, and both are written into docs/speed.md.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _tpu, tpu_step
from benchmarks._measure import interleave
from jlora.models.attention.chunked import chunked
from jlora.models.attention.mask import Mask, make_mask
from jlora.models.attention.plain import Scoring, plain
from train.compute.topology import CHIPS

FILE = _tpu.RESULTS / "attention.json"
PARTS = ("cpu", "tpu")
TOKENS = 4096
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
NETWORK = "the same, 2 layers, 32k vocabulary"
MACS = 4 * 128 * 128
"""Multiply-adds in a cycle of a v5e chip."""
assert CHIPS["TPU v5 lite"].clock == 197e12 / (2 * MACS)


def gradient(form: str, length: int, remat: bool) -> Any:
    """The compiled gradient of causal attention, and its operands."""
    scoring = Scoring(64**-0.5)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        if form == "plain":
            return plain(q, k, v, mask.allowed, scoring)
        return chunked(q, k, v, mask, None, scoring)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, real: jax.Array) -> jax.Array:
        mask = make_mask(q, length, length, causal=True, form=form, real=real)  # pyright: ignore[reportArgumentType]
        fn = functools.partial(attention, mask=mask)
        return jnp.sum((jax.checkpoint(fn) if remat else fn)(q, k, v) ** 2)

    keys = jax.random.split(jax.random.key(0), 3)
    rows = TOKENS // length
    operands = [jax.random.normal(key, (rows, length, n, 64)) for key, n in zip(keys, (9, 3, 3), strict=True)]
    operands.append(jnp.ones((rows, length), bool))
    return functools.partial(jax.jit(jax.grad(loss, (0, 1, 2))).lower(*operands).compile(), *operands)


def cpu_table(quick: bool) -> str:
    rows = []
    for length in LENGTHS[: 1 if quick else None]:
        cells = [f"{TOKENS // length}×{length}"]
        for remat in (False, True):
            runs = {form: gradient(form, length, remat) for form in ("plain", "flash")}
            seconds = interleave({name: lambda run=run: jax.block_until_ready(run()) for name, run in runs.items()}, 5)
            ratios = [flash / all_ for flash, all_ in zip(seconds["flash"], seconds["plain"], strict=True)]
            cells += [f"{1000 * statistics.median(seconds['plain']):,.0f}", f"{statistics.median(ratios):.2f}"]
        rows.append(cells)
    return _tpu.markdown(("rows", "all scores, ms", "in chunks", "recomputed: all scores, ms", "in chunks"), rows)


def tpu_table(results: _tpu.Results, quick: bool = False) -> str:
    rows = []
    for length in LENGTHS[: 1 if quick else None]:
        cells = [f"{TOKENS // length}×{length}"]
        for form in ("plain", "flash"):
            point = tpu_step.Point(NETWORK, TOKENS // length, length, "full", attention=form)
            make = functools.partial(tpu_step.step_cost, point, "jlora")
            found = results.get(f"{length} {form}", make, *tpu_step.OURS) or {}
            kernels = sum(found.get("kernels", {}).values()) / MACS / 1e6
            cycles = found.get("cycles")
            cells.append("-" if cycles is None else f"{cycles / 1e6:,.1f}" + (f" + {kernels:.1f}" if kernels else ""))
            cells.append(f"{found.get('temp_bytes', 0) / 2**20:,.0f}")
        rows.append(cells)
    header = ("Mcycles of a step", "all scores", "temp MiB", "kernels", "temp MiB")
    return _tpu.markdown(header, rows)


def main() -> None:
    """Measure or compile what is missing, print the tables, and write them into their page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="one length")
    parser.add_argument("--tables", action="store_true", help="write the second table from what is kept")
    args = parser.parse_args()
    results = _tpu.Results(FILE, stale=args.tables)
    if "tpu" in args.part and not args.tables:
        _tpu.slice_devices("v5e:2x4")  # before anything is computed
    tables = {"tpu": lambda: tpu_table(results, args.quick)} if args.tables else {}
    tables = tables or {"cpu": lambda: cpu_table(args.quick), "tpu": lambda: tpu_table(results, args.quick)}
    for part in args.part:
        if part in tables:
            table = tables[part]()
            print(table, end="\n\n", flush=True)
            if not args.quick:
                _tpu.write_table("speed.md", f"attention: {part}", table)


if __name__ == "__main__":
    main()
