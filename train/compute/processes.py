"""Several processes that train together: how they find each other, and what they agree on."""

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


def check_same(value: Mapping[str, Any], what: str) -> None:
    """Raises a ConfigError in all processes if ``value`` is another in one of them; that one names the differences."""
    if jax.process_count() == 1:
        return
    own = json.dumps(value, sort_keys=True)
    first = first_decides(lambda: own)
    if all_agree(own == first):
        return
    mine, other = json.loads(own), json.loads(first)
    wrong = [
        f"{name}: {other.get(name)!r} in process 0, {one!r} here"
        for name, one in mine.items()
        if one != other.get(name)
    ]
    raise ConfigError(
        f"processes: {what} is not the same in all of them:{bullets(wrong or ['another process names what differs'])}\n"
        "Expected the same command and data everywhere; start all of them again"
    )


def leave(code: int) -> int:
    """End this process at once if there are others, which wait for it: JAX would wait for them at its exit."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def all_agree(answer: bool) -> bool:
    """Whether the answer is yes in every process."""
    return answer if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(answer)).all())


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
