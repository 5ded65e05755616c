"""What does DoRA cost beside plain LoRA: time, memory, and a TPU compiler's cycles?

    python -m benchmarks.dora [--rounds 9] [--dtype float32] [--tpu] [--json FILE]

The encoder of `benchmarks.step_time` (4 layers of width 768, 8×128 tokens, rank 8 on every linear layer), stepped by
AdamW, with its layers apart and stacked in a scan. Runs are interleaved; a ratio is the median of the ratios within
each round. ``--tpu`` compiles steps of `benchmarks.tpu_step` for one v5e chip instead, which needs libtpu but no TPU:
cycles are the compiler's estimates, the same on every machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jlora
from benchmarks import _encoder, _measure

LIMIT = 1.15
METHODS = {"LoRA": False, "DoRA": True}
TPU_STEPS = (("BERT base, 4 layers", 32, 128), ("the same, 2 layers, 32k vocabulary", 4, 1024))


def scanned(params: Any, x: jax.Array) -> jax.Array:
    """The encoder with its layers stacked."""
    return jax.lax.scan(lambda x, layer: (_encoder.encode({"layer": layer}, x), None), x, params)[0]


def make_step(method: str, encode: Callable[..., Any], params: Any, batch: Any) -> tuple[_measure.Program, Any]:
    """The compiled step, and a function that takes one step."""
    x, target = batch
    rank = _encoder.Shape.rank
    config = jlora.LoraConfig(rank=rank, alpha=2 * rank, use_dora=METHODS[method])
    adapters = jlora.init(jax.random.key(1), params, config, jlora.trace(encode, params, x))
    adapters = jax.tree.map(lambda v: v + 1e-3, adapters)  # so that no gradient vanishes
    apply, optimizer = jlora.lora(encode, materialize="error"), optax.adamw(_encoder.LEARNING_RATE)

    def update(state: Any, params: Any, x: jax.Array, target: jax.Array) -> Any:
        adapters, moments = state
        value, grads = jax.value_and_grad(lambda a: _encoder.loss(apply(jlora.attach(params, a), x), target))(adapters)
        changes, moments = optimizer.update(grads, moments, adapters)
        return (optax.apply_updates(adapters, changes), moments), value

    state: Any = (adapters, optimizer.init(adapters))
    program = _measure.compile_program(update, state, params, x, target, donate=(0,))

    def step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(program.compiled(state, params, x, target))

    return program, step


def measure(rounds: int, dtype: str) -> list[dict[str, Any]]:
    """Time and memory of a step with each method, relative to LoRA's."""
    shape = _encoder.Shape()
    layers, batch = _encoder.make_params(shape, dtype), _encoder.make_batch(shape, dtype)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers.values())
    found = []
    for layout, encode, params in (("layers apart", _encoder.encode, layers), ("layers scanned", scanned, stacked)):
        made = {method: make_step(method, encode, params, batch) for method in METHODS}
        times = _measure.interleave({method: step for method, (_, step) in made.items()}, rounds)
        temp = {method: program.temporary_memory / 2**20 for method, (program, _) in made.items()}
        ratio = _measure.ratio(times, "DoRA", "LoRA")
        found.append({"layout": layout, "dtype": dtype, "ratio": ratio, "temp_mib": temp, "seconds": times})
    return found


def tpu_cycles() -> list[dict[str, Any]]:
    """Cycles and memory of a step with each method on v5e, relative to LoRA's."""
    from benchmarks import _tpu, tpu_step

    found = []
    for network, rows, length in TPU_STEPS:
        for remat in ("none", "full"):
            point = tpu_step.Point(network, rows, length, remat)
            cost = {
                m: tpu_step.Steps(point, _tpu.slice_devices("v5e:2x4"), d).cost("jlora") for m, d in METHODS.items()
            }
            cycles, temp = ({m: c[k] for m, c in cost.items()} for k in ("cycles", "temp_bytes"))
            ratio = cycles["DoRA"] / cycles["LoRA"]
            temp = {method: size / 2**20 for method, size in temp.items()}
            found.append(
                {"layout": str(point), "dtype": "bfloat16", "ratio": ratio, "temp_mib": temp, "cycles": cycles}
            )
            print(found[-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure, print, and write ``--json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tpu", action="store_true", help="cycles by the compiler of v5e instead")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = tpu_cycles() if args.tpu else measure(args.rounds, args.dtype)
    rows = [
        (case["layout"], f"{case['ratio']:.3f}", *(f"{case['temp_mib'][m]:.1f}" for m in METHODS), f"{LIMIT}")
        for case in found
    ]
    print(_measure.table((f"DoRA / LoRA, {found[0]['dtype']}", "ratio", "LoRA temp MiB", "DoRA", "at most"), rows))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
