"""A run's step, compiled ahead of time for devices that may not be here: what it needs, and about how long it takes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.compute import flops
from train.compute.compiled import Compiled, ComputedArray
from train.compute.layouts import Mesh, placed, planned_layout
from train.compute.memory import bytes_on_device, compile_or_measure, device_memory, host_memory
from train.compute.optimizer import make_optimizer
from train.compute.step import TrainState, init_state, make_step
from train.compute.topology import CHIPS
from train.config import TrainConfig
from train.job import counted, plan_of, start_adapters, uses_of
from train.tasks.stand_in import StandIn, stand_in


@dataclass(frozen=True)
class StepCosts:
    """What one training step costs. Bytes and cycles are those of one device.

    Attributes:
      layout: as a run prints it.
      devices: how many compute.
      device_kind: such as ``TPU v5 lite``.
      device_memory: what a device may use; of emulated devices, their part of the machine's. None if unknown.
      base_bytes, adapters_bytes, optimizer_bytes, batch_bytes: what the step is given.
      working_bytes: temporary memory, and results that do not reuse what was given.
      peak_bytes: all of these, as ``memory_analysis`` reports them; of a step that does not fit, what the compiler
        says that it would use.
      fits: whether the device has so much; None if its memory is unknown.
      rows, tokens: of a batch, padding included; 0 tokens for images.
      flops: of the products of the whole step, on all devices, without recomputation.
      cycles: the compiler's estimate, without collectives and kernels; 0 if it makes none.
      kernel_cycles: of attention kernels, for which there is no estimate: their products at the chip's peak, without
        skipping blocks that a causal mask hides.
      collectives: bytes of the results, by kind.
      largest: the largest arrays that are computed.
      compile_seconds: time to compile.
      notes: what was assumed.
    """

    layout: str
    devices: int
    device_kind: str
    device_memory: int | None
    base_bytes: int
    adapters_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    working_bytes: int
    peak_bytes: int
    fits: bool | None
    rows: int
    tokens: int
    flops: float
    cycles: int
    kernel_cycles: int
    collectives: Mapping[str, int]
    largest: Sequence[ComputedArray]
    compile_seconds: float
    notes: Sequence[str]

    @property
    def seconds(self) -> float | None:
        """The time of a step that its estimated cycles mean; None without an estimate."""
        chip = CHIPS.get(self.device_kind)
        return (self.cycles + self.kernel_cycles) / chip.clock if chip and self.cycles else None

    @property
    def utilization(self) -> float | None:
        """The model FLOPs utilization that this time means (see `train.compute.flops`)."""
        seconds, peak = self.seconds, flops.peak(self)
        return None if seconds is None or peak is None else self.flops / (seconds * self.devices * peak)

    def to_json(self) -> dict[str, Any]:
        """All fields, the step's estimated time and its utilization."""
        found = dataclasses.asdict(self) | {"largest": [array._asdict() for array in self.largest]}
        return found | {"estimated_seconds": self.seconds, "estimated_mfu": self.utilization}


def step_costs(config: TrainConfig, devices: Sequence[Any]) -> StepCosts:
    """Compile the training step of a valid configuration for ``devices``. Reads config.json and no weights or data.

    Raises:
      ConfigError: if checkpoint, targets or devices do not fit the configuration.
    """
    made = stand_in(config)
    config = made.config
    layout = planned_layout(config, made.network.rules, devices)
    base = jax.eval_shape(made.network.init, jax.random.key(0))
    tx = make_optimizer(config.fit)
    step = make_step(
        made.network.forward,
        made.task,
        tx,
        optax.constant_schedule(0.0),
        smoothing=config.fit.label_smoothing,
        accumulate=config.compute.accumulate,
        freeze_a=config.fit.optimizer == "lora-fa",
    )
    plan = plan_of(config, base, uses_of(made.network, base, made.task.inputs(_one_row(made.batch))))

    def make(base: Any) -> Any:
        return init_state(tx, start_adapters(config, made.network, base, plan))

    state, lowered = layout.lower_step(step, make, base, made.batch)
    batch_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in made.batch.values()) // layout.parts
    given = given_bytes(placed(base, layout.shardings(base)), state, batch_bytes)
    began = time.perf_counter()
    program, peak = compile_or_measure(lowered, sum(given.values()))
    seconds = time.perf_counter() - began
    return costs_of(made, layout, devices, program, peak, given, flops=work_of(made, plan), compile_seconds=seconds)


def given_bytes(base: Any, state: TrainState, batch_bytes: int) -> dict[str, int]:
    """The bytes of a step's arguments on each device, by their fields in `StepCosts`.

    Args:
      base, state: shapes with shardings.
    """
    return {
        "base_bytes": bytes_on_device(base),
        "adapters_bytes": bytes_on_device(state.adapters),
        "optimizer_bytes": bytes_on_device(state.opt_state),
        "batch_bytes": batch_bytes,
    }


def costs_of(
    made: StandIn,
    layout: Mesh,
    devices: Sequence[Any],
    program: Any,
    peak: int,
    given: Mapping[str, int],
    *,
    flops: float,
    compile_seconds: float,
    members: int = 1,
) -> StepCosts:
    """The costs of a step, from what the compiler says of it.

    Args:
      program, peak: as from `train.compute.memory.compile_or_measure`.
      given: as from `given_bytes`.
      members: how many trainings have a batch in the step.
    """
    memory = device_memory(devices)
    compiled = None if program is None else Compiled(program)
    return StepCosts(
        layout=str(layout),
        devices=layout.devices,
        device_kind=devices[0].device_kind,
        device_memory=memory,
        **given,
        working_bytes=peak - sum(given.values()),
        peak_bytes=peak,
        fits=False if compiled is None else None if memory is None else peak <= memory,
        cycles=0 if compiled is None else compiled.cycles,
        kernel_cycles=0 if compiled is None else _kernel_cycles(compiled, devices[0]),
        collectives={} if compiled is None else compiled.collectives,
        largest=() if compiled is None else compiled.largest(5),
        rows=members * made.config.fit.batch_size,
        tokens=members * math.prod(made.batch["input_ids"].shape) if "input_ids" in made.batch else 0,
        flops=flops,
        compile_seconds=compile_seconds,
        notes=[*made.notes, *_memory_notes(devices), *_unknown_loops(compiled)],
    )


def _one_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jnp.zeros((1, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def _kernel_cycles(compiled: Compiled, device: Any) -> int:
    chip, peak = CHIPS.get(device.device_kind), flops.peak(device)
    return round(2 * sum(compiled.kernels.values()) * chip.clock / peak) if chip and peak else 0


def _unknown_loops(compiled: Compiled | None) -> Iterator[str]:
    if compiled is not None and compiled.unknown_loops:
        yield f"counted once, as it is not known how often they run: {compiled.unknown_loops} loops"


def _memory_notes(devices: Sequence[Any]) -> Iterator[str]:
    platform = devices[0].platform
    if platform == "cpu" and (host := host_memory()) is not None:
        share = f", divided among {len(devices)} devices" if len(devices) > 1 else ""
        yield f"memory: this machine's {host / 2**30:.1f} GiB{share}, whatever else runs here"
    elif platform == "gpu":
        yield "memory: what JAX may allocate; the environment variable XLA_PYTHON_CLIENT_MEM_FRACTION sets its share"


def work_of(made: StandIn, plan: Any) -> float:
    """The FLOPs of a step without recomputation and accumulation, which do not change what has to be computed."""
    config = counted(made.config)
    plain = stand_in(config)
    tx = optax.identity()
    step = make_step(plain.network.forward, plain.task, tx, optax.constant_schedule(0.0))
    base = jax.eval_shape(plain.network.init, jax.random.key(0))
    state = jax.eval_shape(lambda base: init_state(tx, start_adapters(config, plain.network, base, plan)), base)
    return flops.count(step, state, base, plain.batch, jax.random.key(0))
