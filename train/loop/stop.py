"""Ctrl-C and SIGTERM: a training saves a checkpoint and stops; everything else ends at once.

A training asks its `Stop` after each step whether a signal came. While a program is imported or compiled nobody asks,
and there Ctrl-C ends the process at once with one line (`watch_ctrl_c`, `on_ctrl_c`). The files of a run survive that.
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
"""Of a run that SIGTERM stopped and that the same command resumes: EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""Of a run that Ctrl-C stopped, as shells expect it."""


class Stopped(Exception):
    """The run was stopped by a signal; the message says where it will resume.

    Attributes:
      code: the exit code, by the signal.
    """

    def __init__(self, message: str = "", code: int = EXIT_CODE):
        super().__init__(message)
        self.code = code


class _CtrlC:
    """What Ctrl-C does to this process now."""

    line: str | None = "stopped"
    count = 0  # signals so far
    handled = 0  # those that a `Stop` has noted

    @classmethod
    def listen(cls, pipe: int) -> None:
        """Read the numbers of signals. This is a thread of its own: the main one may be in a compiler for minutes."""
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGINT:
                cls.count += 1
                # This thread may be late: a signal that a `Stop` has noted needs nothing more.
                if cls.count > cls.handled and (cls.line is not None or cls.count > 1):
                    cls.end()

    @classmethod
    def end(cls) -> None:
        first = cls.line if cls.count < 2 else None
        line = first or "stopped at once by a second Ctrl-C; earlier checkpoints are kept"
        # On a terminal the line starts below "^C" and a progress bar.
        os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())
        os._exit(INTERRUPTED)


def watch_ctrl_c() -> None:
    """From now on Ctrl-C ends this process at once, unless `on_ctrl_c` says otherwise. Call it in the main thread."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_CtrlC.listen, args=(read_end,), daemon=True).start()


@contextlib.contextmanager
def on_ctrl_c(line: str | None) -> Iterator[None]:
    """In this context, Ctrl-C ends a watched process with ``line``; with None the first one is left to a `Stop`."""
    before, _CtrlC.line = _CtrlC.line, line
    if line is not None and (_CtrlC.count or _CtrlC.handled):
        _CtrlC.end()
    try:
        yield
    finally:
        _CtrlC.line = before


class Stop:
    """In this context, the first SIGINT or SIGTERM is noted, for `requested`; a second one ends the process at once.

    With several processes, JAX handles SIGTERM once they have joined: it is enough that one of them gets it, and all
    learn of it at the same step. So all of them must call `requested` equally often. SIGINT is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._agreed, self._noted, self._calls = False, False, 0
        self.code = EXIT_CODE
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
        """Take SIGTERM back from JAX, which took it when processes were joined, if this is the only one."""
        if self._before and not _several():
            signal.signal(signal.SIGTERM, self._note)

    def requested(self) -> bool:
        """Whether the run is to stop."""
        if not _several():
            return self._noted
        if self._noted:
            self._noted = False
            os.kill(os.getpid(), signal.SIGTERM)
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
            self._calls += 1
        return self._agreed

    def check(self) -> None:
        """Raises `Stopped` if the run is to stop before it trains."""
        if self.requested():
            raise Stopped(BEFORE, self.code)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._noted = True
        if number == signal.SIGINT and _CtrlC.line is None:
            _CtrlC.handled += 1
        self.code = INTERRUPTED if number == signal.SIGINT else EXIT_CODE
        self.__exit__()

    def _restore(self, number: int) -> None:
        handler = self._before.pop(number, None)
        # With several processes, SIGTERM has JAX's handler by now, which stays.
        if handler is not None and not (_several() and number == signal.SIGTERM):
            signal.signal(number, handler)


BEFORE = "stopped before training; the same command starts again, or resumes the run"


def _several() -> bool:
    """Whether this is one of several processes. JAX is imported late: `watch_ctrl_c` must come before it."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
