"""The command that compiles a run's step for a machine that need not be there."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jlora.messages import table
from train.ahead import StepCosts, step_costs
from train.commands.advice import advise
from train.commands.options import PlanOptions
from train.compute.topology import topology_devices
from train.config import ConfigError, TrainConfig
from train.sweep.ahead import ProgramCosts, sweep_costs


def plan(config: TrainConfig, options: PlanOptions) -> None:
    """Print what the step of a configuration costs.

    Raises:
      ConfigError: if checkpoint, targets or devices do not fit the configuration, or there is no compiler.
    """
    devices = jax.devices() if options.topology is None else topology_devices(options.topology)
    say = (lambda text: None) if options.json else functools.partial(print, flush=True)
    if config.sweep:
        _plan_sweep(config, devices, say, options.json)
        return
    costs = step_costs(config, devices)
    say(f"{config.name}: {costs.layout}\n\n{describe(costs)}")
    tried: list[dict[str, Any]] = []

    def attempt(flags: str, other: TrainConfig) -> StepCosts | None:
        try:
            found = step_costs(other, devices)
        except ConfigError as error:  # for example, weights that the devices do not divide
            reason = str(error).splitlines()[:2][-1].strip(" -")  # the first one, below their number
            tried.append({"flags": flags, "refused": reason})
            say(f"  {flags}: {reason}")
            return None
        tried.append({"flags": flags, **found.to_json()})
        changed = other.fit.batch_size != config.fit.batch_size
        warning = f"; this changes the run: a step has {found.rows:,} examples, not {costs.rows:,}" if changed else ""
        say(f"  {flags}: {_of_memory(found)}{warning}")
        return found

    if costs.fits is False and options.advise and advise(config, len(devices), costs, attempt) is None:
        say("  nothing fits; pass more devices, or shorter examples")
    if options.json:
        print(json.dumps(costs.to_json() | {"alternatives": tried}, indent=2))


def _plan_sweep(config: TrainConfig, devices: Sequence[Any], say: Callable[[str], None], as_json: bool) -> None:
    """Print what each program of a sweep costs."""
    found = sweep_costs(config, devices, say)
    say(f"{config.name}: {found[0].step.layout}\n")
    for one in found:
        say(f"{describe_members(one)}\n\n{describe(one.step)}")
    if too_large := [one.at_once for one in found if one.step.fits is False]:
        single = "one member does not fit: plan it as a single run, without --sweep, for settings that do"
        say(single if 1 in too_large else f"{too_large[0]} at once do not fit: pass fewer, or no, --sweep.at-once")
    if as_json:
        print(json.dumps([dataclasses.asdict(one) | {"step": one.step.to_json()} for one in found], indent=2))


def describe_members(costs: ProgramCosts) -> str:
    """How the members of a program train."""
    count = len(costs.members)
    named = ", ".join(costs.members[:4]) + (f" and {count - 4:,} more" if count > 4 else "")
    lines = [f"{count:,} members: {named}", "in one program"]
    if costs.rounds > 1:
        lines[1] = f"in {costs.rounds:,} rounds, {costs.at_once:,} at once in one program"
    if costs.at_a_time < costs.at_once:
        lines[1] += f", where {costs.at_a_time:,} compute{'s' * (costs.at_a_time == 1)} at a time"
    return "\n".join(lines)


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
        cycles, attention = costs.cycles + costs.kernel_cycles, f"{costs.kernel_cycles / 1e6:,.1f}"
        part = f" ({attention} of them for attention at the chip's peak)" if costs.kernel_cycles else ""
        work.append(
            f"the compiler's estimate, without collectives: {cycles / 1e6:,.1f} million cycles{part}, "
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
