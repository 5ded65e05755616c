"""Distributed runs: processes join, and agree on values."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jlora.messages import bullets
from train.config import ConfigError, ProcessesConfig

T = TypeVar("T")


def join(config: ProcessesConfig) -> None:
    """Join the other processes, if there are any. Call this before anything touches a device.

    Raises:
      ConfigError: if joining fails.
    """
    if jax.distributed.is_initialized():
        return
    if config.coordinator is None and not config.auto and not _is_in_environment():
        return
    try:
        jax.distributed.initialize(config.coordinator, config.count, config.index)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"processes: joining failed ({str(error).splitlines()[0]}). Expected the same command on every "
            "host, started within five minutes of each other, with --processes.coordinator HOST:PORT "
            "--processes.count N --processes.index I, or --processes.auto if the environment describes them"
        ) from error


def _is_in_environment() -> bool:
    """Whether Slurm or a TPU slice started several processes."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return True
    return (
        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    )


def is_first() -> bool:
    """Whether this process prints and writes."""
    return jax.process_index() == 0


def say(text: str = "") -> None:
    """Print in the first process only."""
    if is_first():
        print(text, flush=True)


def first_decides(decide: Callable[[], T]) -> T:
    """The result of ``decide``, called in the first process only, in all processes.

    Args:
      decide: returns JSON values.

    Raises:
      ConfigError: in all processes, if ``decide`` raised it in the first.
    """
    if jax.process_count() == 1:
        return decide()
    answer = {}
    if is_first():
        try:
            answer = {"value": decide()}
        except ConfigError as error:
            answer = {"error": str(error)}
    own = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(own.size)))
    text = multihost_utils.broadcast_one_to_all(np.resize(own, length))  # ignores the others' values
    answer = json.loads(bytes(np.asarray(text)))
    if "error" in answer:
        raise ConfigError(answer["error"])
    return answer["value"]


def check_same(value: Mapping[str, Any], what: str) -> None:
    """Raises a ConfigError in all processes if ``value`` differs in one; that one lists the differences."""
    if jax.process_count() == 1:
        return
    own = json.loads(json.dumps(value))
    first = first_decides(lambda: own)
    if all_agree(own == first):
        return
    wrong = [
        f"{name}: {first.get(name)!r} in process 0, {one!r} here" for name, one in own.items() if one != first.get(name)
    ]
    raise ConfigError(
        f"processes: {what} differs between them:{bullets(wrong or ['another process lists the differences'])}\n"
        "Expected the same command and data everywhere; start all of them again"
    )


def leave(code: int) -> int:
    """Exit immediately if there are other processes: JAX's own exit would wait for them, and they for this one."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def all_agree(answer: bool) -> bool:
    """Whether ``answer`` is True in every process."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(answer)).all())


def wait_for_all(what: str) -> None:
    """Return when every process has called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
