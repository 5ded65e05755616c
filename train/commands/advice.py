"""Settings under which a step fits, found by compiling it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from train.ahead import StepCosts
from train.config import ComputeConfig, TrainConfig
from train.config.fields import flag

Attempt = Callable[[str, TrainConfig], StepCosts | None]
"""``attempt(flags, config)``: the costs of a step; None if the devices do not divide its weights or its batch."""


def advise(config: TrainConfig, devices: int, costs: StepCosts, attempt: Attempt) -> StepCosts | None:
    """Look for settings under which a step fits that does not, from the cheapest to the most costly.

    In this order: weights split over all devices (fsdp; with tensor where fsdp alone does not divide the weights or the
    rows), rematerialization, smaller micro-batches (accumulate), a larger tensor; and where no layout divides the
    batch, another batch size. Each keeps what was found before, so that few steps are compiled.

    Args:
      devices: the number of devices there are.
      costs: of ``config``, which does not fit.
      attempt: compiles a step, and reports it.

    Returns:
      The costs of the settings that fit, or None.
    """
    search = _Search(config, devices, costs, attempt)
    for stage in (search.shard, search.recompute, search.split_rows, search.widen, search.change_batch):
        if stage():
            return search.costs
    return None


class _Search:
    """The settings found so far, those that need the least memory, and what they cost."""

    def __init__(self, config: TrainConfig, devices: int, costs: StepCosts, attempt: Attempt):
        self._start, self._config, self._devices, self._attempt = config, config, devices, attempt
        self.costs = costs

    def shard(self) -> bool:
        """Split the weights over all devices."""
        compute = self._config.compute
        if self._devices == 1 or compute.layout == "mesh" and compute.fsdp * compute.tensor == self._devices:
            return False
        for tensor in _divisors(self._devices):
            local = self._config.fit.batch_size * tensor // self._devices
            accumulate = next((k for k in _divisors(local) if local // k <= self._rows_at_once()), 1)
            if (found := self._try({**self._mesh(tensor), "accumulate": accumulate})) is not None:
                return found
        return False

    def recompute(self) -> bool:
        """Recompute the layers in the backward pass."""
        return self._config.compute.remat != "full" and bool(self._try({"remat": "full"}))

    def split_rows(self) -> bool:
        """Smaller micro-batches: about as small as the memory needs, by the last step's, or else of one row."""
        accumulate, left = self._config.compute.accumulate, self._rows_at_once()
        parts = [k for k in _divisors(left) if k > 1]
        if not parts:
            return False
        room = (self.costs.device_memory or 0) - (self.costs.peak_bytes - self.costs.working_bytes)
        enough = [k for k in parts if self.costs.working_bytes <= k * room]
        return any(self._try({"accumulate": accumulate * k}) for k in sorted({*enough[:1], parts[-1]}))

    def widen(self) -> bool:
        """Split every product over more devices, for fewer rows at once."""
        compute = self._config.compute
        if compute.layout != "mesh":
            return False
        left = 2
        for tensor in (t for t in _divisors(self._devices) if t > compute.tensor):
            accumulate = max(self._config.fit.batch_size * tensor // self._devices, 1)  # one row of a part at once
            found = self._try({**self._mesh(tensor), "accumulate": accumulate})
            left -= found is not None
            if found or not left:
                return bool(found)
        return False

    def change_batch(self) -> bool:
        """A batch that the devices divide, where they do not divide this one. It changes the run."""
        rows = self._config.fit.batch_size
        if self._devices == 1 or rows % self._devices == 0:
            return False
        rows = max(rows // self._devices, 1) * self._devices
        changes = {**self._mesh(1), "accumulate": rows // self._devices, "remat": "full"}
        return bool(self._try(changes, batch_size=rows))

    def _mesh(self, tensor: int) -> dict[str, Any]:
        return {"layout": "mesh", "data": None, "fsdp": self._devices // tensor, "tensor": tensor}

    def _rows_at_once(self) -> int:
        """The rows of a device that are computed at once."""
        compute = self._config.compute
        data = compute.data or self._devices // (compute.fsdp * compute.tensor)
        parts = {"jit": 1, "pmap": self._devices, "mesh": data * compute.fsdp}[compute.layout]
        return self._config.fit.batch_size // (parts * compute.accumulate)

    def _try(self, changes: dict[str, Any], batch_size: int | None = None) -> bool | None:
        """Whether the step fits with these changes, kept if it then needs less memory; None if it is not compiled."""
        compute = dataclasses.replace(self._config.compute, **changes)
        fit = dataclasses.replace(self._config.fit, batch_size=batch_size or self._config.fit.batch_size)
        config = dataclasses.replace(self._config, compute=compute, fit=fit)
        found = self._attempt(_flags(self._start, config), config)
        if found is None:
            return None
        if found.peak_bytes < self.costs.peak_bytes:
            self._config, self.costs = config, found
        return bool(found.fits)


def _divisors(number: int) -> list[int]:
    return [k for k in range(1, number + 1) if number % k == 0]


def _flags(before: TrainConfig, after: TrainConfig) -> str:
    names = [field.name for field in dataclasses.fields(ComputeConfig)]
    changed = [name for name in names if getattr(before.compute, name) != getattr(after.compute, name)]
    flags = [f"{flag(f'compute.{name}')} {getattr(after.compute, name)}" for name in changed]
    if after.fit.batch_size != before.fit.batch_size:
        flags.append(f"{flag('fit.batch_size')} {after.fit.batch_size}")
    return " ".join(flags)
