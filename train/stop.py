"""SIGTERM and SIGINT: a training that is asked to stop saves where it is, and ends with an exit code of its own."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75
"""Of a run that stopped when it was asked to, and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""


class Stopped(Exception):
    """The run stopped because it was asked to; the message says from where it will go on."""


class Stop:
    """A context in which the signals are a question that is asked with `asked`; a second one ends the process at once.

    With several processes JAX takes care of SIGTERM: one process that gets it is enough, and all learn of it at the
    same time. So `asked` has to be called equally often in all of them.
    """

    def __init__(self) -> None:
        self._asked, self._calls = False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._pass_on if several else self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self) -> bool:
        """Whether the run is to stop."""
        if jax.process_count() > 1 and not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
            self._calls += 1
        return self._asked

    def _note(self, number: int, _: FrameType | None) -> None:
        self._asked = True
        self.__exit__()

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        self.__exit__()
        os.kill(os.getpid(), signal.SIGTERM)
