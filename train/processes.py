"""Several processes that train together: how they find each other, and what they agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.config import ConfigError, ProcessesConfig

T = TypeVar("T")


def join(config: ProcessesConfig) -> None:
    """Find the other processes, if there are any. Must come before anything touches a device.

    Raises:
      ConfigError: if they cannot be found.
    """
    if jax.distributed.is_initialized():
        return
    if config.coordinator is None and not config.auto and not _environment_tells():
        return
    try:
        jax.distributed.initialize(config.coordinator, config.count, config.index)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"processes: they could not be joined ({str(error).splitlines()[0]}). Expected the same command on every "
            "host, started within five minutes of each other, with --processes.coordinator HOST:PORT "
            "--processes.count N --processes.index I, or --processes.auto where the environment tells of them"
        ) from error


def _environment_tells() -> bool:
    """Whether this process was started as one of several, by Slurm or on a TPU slice."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
        return True
    return (
        len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    )


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(text: str = "") -> None:
    """Print, once for all processes."""
    if is_first():
        print(text, flush=True)


def first_decides(decide: Callable[[], str]) -> str:
    """What ``decide`` returned in the first process, in all of them; it is called in no other.

    Raises:
      ConfigError: in all, if it raised one in the first.
    """
    if jax.process_count() == 1:
        return decide()
    answer, failed = "", False
    if is_first():
        try:
            answer = decide()
        except ConfigError as error:
            answer, failed = str(error), True
    told = np.frombuffer(answer.encode(), np.uint8)
    length, failed = (int(x) for x in multihost_utils.broadcast_one_to_all(np.array([len(told), failed])))
    text = np.zeros(length, np.uint8)
    text[:] = told if is_first() else 0
    answer = bytes(np.asarray(multihost_utils.broadcast_one_to_all(text))).decode()
    if failed:
        raise ConfigError(answer)
    return answer


def all_agree(answer: bool) -> bool:
    """Whether the answer is yes in every process."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(answer)).all())


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
