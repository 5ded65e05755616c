"""The command that compiles a run's step for a machine that need not be there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax

from jlora.messages import one_line, table
from train.ahead import StepCosts, step_costs
from train.commands.options import PlanOptions
from train.compute.topology import topology_devices
from train.config import ComputeConfig, ConfigError, TrainConfig
from train.config.fields import flag


def plan(config: TrainConfig, options: PlanOptions) -> None:
    """Print what the step of a configuration costs.

    Raises:
      ConfigError: if checkpoint, targets or devices do not fit the configuration, or there is no compiler.
    """
    devices = jax.devices() if options.topology is None else topology_devices(options.topology)
    costs = step_costs(config, devices)
    if not options.json:
        print(f"{config.name}: {costs.layout}\n\n{describe(costs)}")
    tried: list[tuple[str, StepCosts]] = []
    if costs.fits is False and options.advise:
        for flags, other in alternatives(config, len(devices)):
            try:
                tried.append((flags, found := step_costs(other, devices)))
            except ConfigError as error:  # for example, weights that the devices do not divide
                if not options.json:
                    print(f"  {flags}: {one_line(error)}")
                continue
            if not options.json:
                print(f"  {flags}: {_of_memory(found)}", flush=True)
            if found.fits:
                break
        else:
            if not options.json:
                print(f"  nothing fits; pass a smaller {flag('fit.batch_size')} or a larger slice")
    if options.json:
        also = [{"flags": flags, **one.to_json()} for flags, one in tried]
        print(json.dumps(costs.to_json() | {"alternatives": also}, indent=2))


def alternatives(config: TrainConfig, devices: int) -> Iterator[tuple[str, TrainConfig]]:
    """Settings that need less memory, with the flags that make them, from the cheapest to the one that saves most."""
    compute, rows = config.compute, config.fit.batch_size
    shards = [{}] if compute.layout == "mesh" and compute.fsdp == devices or devices == 1 else []
    if not shards and rows % devices == 0:
        shards = [{}, {"layout": "mesh", "fsdp": devices, "data": None, "tensor": 1}]
    saved = [{}] if compute.remat == "full" else [{}, {"remat": "full"}]
    choices: list[dict[str, Any]] = [{**shard, **remat} for shard in shards or [{}] for remat in saved]
    most = choices[-1]
    parts = devices if most.get("layout", compute.layout) == "mesh" else 1
    accumulate = compute.accumulate * 2
    while rows % (parts * accumulate) == 0:
        choices.append({**most, "accumulate": accumulate})
        accumulate *= 2
    for choice in choices:
        if choice:
            changed = dataclasses.replace(compute, **choice)
            yield _flags(compute, changed), dataclasses.replace(config, compute=changed)


def _flags(before: ComputeConfig, after: ComputeConfig) -> str:
    fields = [field.name for field in dataclasses.fields(after)]
    changed = [name for name in fields if getattr(before, name) != getattr(after, name)]
    return " ".join(f"{flag(f'compute.{name}')} {getattr(after, name)}" for name in changed)


def describe(costs: StepCosts) -> str:
    """The costs as tables."""
    parts = ("base", "adapters", "optimizer", "batch", "working")
    rows = [(name, _size(getattr(costs, f"{name}_bytes"))) for name in parts]
    lines = [table(("on each device", "memory"), [*rows, ("all", _size(costs.peak_bytes))], right=(1,))]
    if costs.device_memory is not None:
        lines[0] += f"\n{_of_memory(costs)}"
    work = [f"a step: {costs.rows:,} rows" + (f", {costs.tokens:,} tokens" if costs.tokens else "")]
    work[0] += f"; {costs.flops / costs.devices / 1e12:.3g} TFLOP on each device, without recomputation"
    if costs.seconds is not None:
        work.append(
            f"the compiler's estimate, without collectives: {costs.cycles / 1e6:,.1f} million cycles, "
            f"{1000 * costs.seconds:,.1f} ms" + ("" if costs.utilization is None else f", MFU {costs.utilization:.1%}")
        )
    lines.append("\n".join(work))
    if costs.collectives:
        rows = [(kind, _size(size)) for kind, size in costs.collectives.items()]
        lines.append(table(("collectives", "results"), rows, right=(1,)))
    if costs.largest:
        rows = [(array.shape, _size(array.bytes), array.source[-60:]) for array in costs.largest]
        lines.append(table(("largest arrays", "size", "from"), rows, right=(1,)))
    lines.append("\n".join([f"compiled in {costs.compile_seconds:.0f} s", *costs.notes]))
    return "\n\n".join(lines) + "\n"


def _size(count: int) -> str:
    unit = max((i for i in range(4) if count >= 1024**i), default=0)
    return f"{count / 1024**unit:,.{2 if unit > 2 else 1 if unit else 0}f} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _of_memory(costs: StepCosts) -> str:
    """Whether a device has the memory."""
    if costs.device_memory is None:
        return _size(costs.peak_bytes)
    verdict = "fits" if costs.fits else "does not fit"
    return f"{verdict}: {_size(costs.peak_bytes)} of {_size(costs.device_memory)}"
