"""TPUs that are not here: their compiler, and what a chip of them has.

`libtpu` compiles for any topology on any machine with Linux. See "Ahead-of-time compilation" in JAX's documentation.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from train.config import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """What a plan needs to know of a chip.

    Attributes:
      memory: HBM in bytes.
      clock: cycles per second of its matrix units: the peak over the multiply-adds of a cycle, times two.
    """

    memory: int
    clock: float


# HBM: docs.cloud.google.com/tpu/docs, a page for each version. Matrix units of a chip: 8 of 128 x 128 (v4, v5p), 4 of
# 128 x 128 (v5e), 4 of 256 x 256 (v6e).
CHIPS = {
    "TPU v4": Chip(32 * GIB, 275e12 / (2 * 8 * 128**2)),
    "TPU v5 lite": Chip(16 * GIB, 197e12 / (2 * 4 * 128**2)),
    "TPU v5": Chip(95 * GIB, 459e12 / (2 * 8 * 128**2)),
    "TPU v5p": Chip(95 * GIB, 459e12 / (2 * 8 * 128**2)),
    "TPU v6 lite": Chip(32 * GIB, 918e12 / (2 * 4 * 256**2)),
}
"""By `jax.Device.device_kind`."""

# What libtpu would otherwise ask the machine for, which is no TPU's. Any accelerator type will do.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a TPU slice such as ``v5e:2x4``, to compile for.

    JAX computes on this machine's CPU from then on, so this has to come before anything is computed.

    Raises:
      ConfigError: without libtpu, or if it knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "--topology: compiling for TPUs needs libtpu, which runs on Linux without a TPU; run: "
            'pip install -e ".[train,tpu]"'
        )
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    alone: Any = {"chips_per_host_bounds": (1, 1, 1)} if re.fullmatch(r"[^:]*:1(x1)*", name) else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices
    except Exception as error:  # libtpu's errors have no common class
        raise ConfigError(
            f"--topology: got {name!r}; expected a version and a shape, such as v5e:1x1, v5p:2x2x1 or v6e:4x4 "
            f"({str(error).splitlines()[0]:.200})"
        ) from error
