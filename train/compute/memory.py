"""The memory of devices, and whether a program fits there."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from train.compute.compiled import Compiled
from train.compute.topology import CHIPS


def device_memory(devices: Sequence[Any]) -> int | None:
    """The memory of each device, in bytes: of emulated devices, their part of this machine's. None if it is unknown."""
    device = devices[0]
    if (chip := CHIPS.get(device.device_kind)) is not None:
        return chip.memory
    if device.platform == "cpu":
        return None if (host := host_memory()) is None else host // len(devices)
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:  # a device of a topology
        return None


def host_memory() -> int | None:
    """The memory of this machine, in bytes; None if it is unknown."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def bytes_on_device(tree: Any) -> int:
    """What each device holds of arrays, or of shapes with shardings, in bytes."""
    leaves = jax.tree.leaves(tree)
    return sum(-(-math.prod(x.sharding.shard_shape(x.shape)) * _bits(x.dtype) // 8) for x in leaves)


def _bits(dtype: Any) -> int:
    """Two 4-bit codes share a byte."""
    return 4 if dtype.name.startswith(("int4", "uint4", "float4")) else 8 * dtype.itemsize


def compile_or_measure(lowered: Any, given: int = 0) -> tuple[Any, int]:
    """The compiled program and its peak, in bytes; where that is more than the device has, None and what the compiler
    says.

    Args:
      given: bytes of the arguments, which some compilers' messages leave out.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        for pattern, more in ((r"Used ([\d.]+)([KMGT]) of", 0), (r"temporaries \(([\d.]+)([KMGT])\)", given)):
            if (found := re.search(pattern, str(error))) and "RESOURCE_EXHAUSTED" in str(error):
                return None, more + round(float(found[1]) * 1024 ** (1 + "KMGT".index(found[2])))
        raise
    return compiled, Compiled(compiled).peak_bytes
