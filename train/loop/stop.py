"""Ctrl-C and SIGTERM: training saves a checkpoint and stops; everything else exits immediately.

Training polls its `Stop` for signals after each step. During imports and compilation nothing polls, so Ctrl-C ends the
process immediately, with one line (`watch_ctrl_c`, `on_ctrl_c`). A run's files survive that.
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
"""Exit code after SIGTERM, when the same command resumes the run: EX_TEMPFAIL of sysexits.h."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""


class Stopped(Exception):
    """The run was stopped by a signal; the message states where it resumes.

    Attributes:
      code: the exit code for the signal.
    """

    def __init__(self, message: str = "", code: int = EXIT_CODE):
        super().__init__(message)
        self.code = code


class _CtrlC:
    """This process's current response to Ctrl-C."""

    line: str | None = "stopped"
    count = 0  # signals so far
    handled = 0  # those that a `Stop` has noted

    @classmethod
    def listen(cls, pipe: int) -> None:
        """Read the numbers of signals. Runs in a separate thread: the main one may be compiling for minutes."""
        while number := os.read(pipe, 1):
            if number[0] == signal.SIGINT:
                cls.count += 1
                # This thread may be late: a signal noted by a `Stop` needs nothing more.
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
    """Make Ctrl-C end this process immediately, except inside `on_ctrl_c`. Call it in the main thread."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    signal.signal(signal.SIGINT, lambda *_: None)
    threading.Thread(target=_CtrlC.listen, args=(read_end,), daemon=True).start()


@contextlib.contextmanager
def on_ctrl_c(line: str | None) -> Iterator[None]:
    """In this context, Ctrl-C ends a watched process with ``line``; with None, a `Stop` handles the first one."""
    before, _CtrlC.line = _CtrlC.line, line
    if line is not None and (_CtrlC.count or _CtrlC.handled):
        _CtrlC.end()
    try:
        yield
    finally:
        _CtrlC.line = before


class Stop:
    """In this context, `requested` reports the first SIGINT or SIGTERM; a second one ends the process immediately.

    With several processes, JAX handles SIGTERM once they have joined: if one of them receives it, all stop at the same
    step. So all must call `requested` equally often. SIGINT is forwarded as SIGTERM.
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
        """Take SIGTERM back from JAX, which handles it after joining, if this is the only process."""
        if self._before and not _several():
            signal.signal(signal.SIGTERM, self._note)

    def requested(self) -> bool:
        """Whether the run should stop."""
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
        """Raises `Stopped` if the run should stop before training."""
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
        # With several processes, JAX's SIGTERM handler is installed by now, and stays.
        if handler is not None and not (_several() and number == signal.SIGTERM):
            signal.signal(number, handler)


BEFORE = "stopped before training; the same command starts over, or resumes the run"


def _several() -> bool:
    """Whether this is one of several processes. JAX is imported late: `watch_ctrl_c` must come before it."""
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1
