"""Ctrl-C and SIGTERM: a training that is asked to stop saves where it is; what saves nothing ends at once.

`Stop` makes a question of both, which a training asks after each step. While a program is imported or compiled nobody
asks; there Ctrl-C ends the process at once, with one line (`watch`, `at_once`). All that a run writes survives that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""Of a run that stopped when it was asked to, and goes on when it is started again: EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""The same, when it was Ctrl-C that asked: what shells expect of it."""


class Stopped(Exception):
    """The run stopped because it was asked to; the message says from where it will go on.

    Attributes:
      code: the exit code that tells of it.
    """

    def __init__(self, message: str = "", code: int = EXIT_CODE):
        super().__init__(message)
        self.code = code


class _Watch:
    """What Ctrl-C means to this process now."""

    line: str | None = "stopped, as asked"
    count = 0  # of Ctrl-C
    taken = 0  # how many of them a `Stop` has made a question of

    @classmethod
    def listen(cls, pipe: int) -> None:
        """Read the numbers of signals; in a thread of its own, as the main one may be in a compiler for minutes."""
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGINT:
                cls.count += 1
                # This thread may come late: what a `Stop` has taken is done with.
                if cls.count > cls.taken and (cls.line is not None or cls.count > 1):
                    cls.end()

    @classmethod
    def end(cls) -> None:
        first = cls.line if cls.count < 2 else None
        line = first or "stopped at once, as asked again; what was saved before is kept"
        # Of the terminal's own "^C" and a bar, the line is told apart.
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())
        os._exit(INTERRUPTED)


def watch() -> None:
    """From now on Ctrl-C ends this process at once, but where `at_once` says otherwise; called in the main thread."""
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_Watch.listen, args=(ear,), daemon=True).start()


@contextlib.contextmanager
def at_once(line: str | None) -> Iterator[None]:
    """In here Ctrl-C ends a process that is watched, with this line; for None the first one is left to a `Stop`."""
    before, _Watch.line = _Watch.line, line
    if line is not None and (_Watch.count or _Watch.taken):
        _Watch.end()
    try:
        yield
    finally:
        _Watch.line = before


class Stop:
    """A context in which the signals are a question that is asked with `asked`; a second one ends the process at once.

    Several processes leave SIGTERM to JAX once they are joined: one that gets it is enough, and all learn of it at the
    same time. So `asked` has to be called equally often in all of them; SIGINT is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._asked, self._noted, self._calls, self._code = False, False, 0, EXIT_CODE
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
        if self._before and not _several():
            signal.signal(signal.SIGTERM, self._note)

    def asked(self) -> bool:
        """Whether the run is to stop."""
        if not _several():
            return self._noted
        if self._noted:
            self._noted = False
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._asked:
            from jax.experimental import multihost_utils

            self._asked = multihost_utils.reached_preemption_sync_point(self._calls)
            self._calls += 1
        return self._asked

    def stopped(self, message: str = "") -> Stopped:
        """What to raise when the answer was yes."""
        return Stopped(message, self._code)

    def check(self) -> None:
        """Raises a `Stopped` if the run is to stop before it has trained."""
        if self.asked():
            raise self.stopped(BEFORE)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = True
        if number == signal.SIGINT and _Watch.line is None:
            _Watch.taken += 1
        self._code = INTERRUPTED if number == signal.SIGINT else EXIT_CODE
        self.__exit__()

    def _restore(self, number: int) -> None:
        handler = self._before.pop(number, None)
        # Of several processes JAX has put a handler of its own in the place of ours for SIGTERM.
        if handler is not None and not (_several() and number == signal.SIGTERM):
            signal.signal(number, handler)


BEFORE = "stopped before the training went on, as asked; the same command goes on, or begins anew"


def _several() -> bool:
    """Whether this is one of several processes. JAX is imported where it is used, for `watch` comes before it."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
