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

    Several processes leave SIGTERM to JAX once they are joined: one that gets it is enough, and all learn of it at the
    same time. So `asked` has to be called equally often in all of them; SIGINT is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked, self._noted, self._calls = False, False, 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number in list(self._before):
            self._restore(number)

    def joined(self) -> None:
        """Take SIGTERM back from JAX, which took it when it joined the processes, if this is the only one."""
        if self._before and jax.process_count() == 1:
            signal.signal(signal.SIGTERM, self._note)

    def asked(self) -> bool:
        """Whether the run is to stop."""
        if jax.process_count() == 1:
            return self._noted
        if self._noted:
            self._noted = False
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._asked:
            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
            self._calls += 1
        return self._asked

    def check(self) -> None:
        """Raises a `Stopped` if the run is to stop before it has trained."""
        if self.asked():
            raise Stopped("stopped before the training went on, as asked; the same command goes on, or begins anew")

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = True
        self.__exit__()

    def _restore(self, number: int) -> None:
        handler = self._before.pop(number, None)
        # Of several processes JAX has put a handler of its own in the place of ours for SIGTERM.
        several = jax.distributed.is_initialized() and jax.process_count() > 1
        if handler is not None and not (several and number == signal.SIGTERM):
            signal.signal(number, handler)
