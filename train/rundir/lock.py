"""Locks of run directories: one training at a time.

A local lock is the operating system's, and ends with its process. In a bucket it is an object that names its holder.
Each write expects a generation of the object, which Google Cloud Storage compares as part of the write: of two
claimants, one gets the lock. The holder renews it every `RENEWAL` seconds. A claimant watches it for `EXPIRY` seconds
by its own clock: if it is renewed, the run is in use; if not, its holder counts as dead, and the claimant takes the
lock over. No clocks are compared.

A holder whose lock was taken, or that could not renew it for almost `EXPIRY` seconds, ends its process. It notices only
when it renews: a process that was suspended for longer than `EXPIRY`, with its machine for example, may still write for
a moment after it wakes up. What it writes then are whole files of the same run, of an earlier step.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import filelock

from jlora.files.buckets import is_in_bucket, split
from jlora.messages import one_line
from train.config import ConfigError
from train.rundir.directory import RunDirectory

RENEWAL = 10.0
"""Seconds between two renewals of a lock in a bucket."""

EXPIRY = 60.0
"""Seconds without a renewal after which the holder counts as dead."""


class Lock(Protocol):
    def release(self) -> None: ...


def lock(directory: RunDirectory) -> Lock:
    """Lock a run directory until `release`, or until this process ends.

    Raises:
      ConfigError: if another process holds it.
      OSError: if it cannot be written.
    """
    if is_in_bucket(directory.path):
        return _BucketLock(directory)
    local = filelock.FileLock(directory.lock_file, timeout=0)
    try:
        local.acquire()
    except filelock.Timeout:
        raise ConfigError(
            f"run_dir: {directory} is in use by another training process; wait for it, or pass another "
            "--run-dir. If there is none, a lost host still holds the lock on the file server: remove "
            f"{directory.lock_file}"
        ) from None
    return local


class _BucketLock:
    """The lock of a directory in a bucket, held and renewed by a thread from its construction to `release`."""

    def __init__(self, directory: RunDirectory):
        import tensorstore

        self._file: Path = directory.lock_file
        bucket, self._key = split(self._file)
        self._id, self._released = secrets.token_hex(8), threading.Event()
        try:
            self._store: Any = tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
            self._generation = self._acquire(directory)
        except ConfigError:
            raise
        except ValueError as error:  # tensorstore's
            raise OSError(f"{self._file} cannot be written ({one_line(error)})") from error
        self._thread = threading.Thread(target=self._keep, name="run.lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        try:
            self._store.write(self._key, None, if_equal=self._generation).result(timeout=RENEWAL)
        except (ValueError, TimeoutError) as error:
            print(f"{self._file} could not be removed ({one_line(error)}); it expires by itself", file=sys.stderr)

    def _acquire(self, directory: RunDirectory) -> bytes:
        """The generation of the lock, once this process holds it."""
        seen, since = None, 0.0
        while True:
            found = self._store.read(self._key).result()
            generation, now = found.stamp.generation, time.monotonic()
            is_free = found.state == "missing" or generation == seen and now - since > EXPIRY
            if is_free:
                if (mine := self._write(generation)) is not None:
                    return mine
                continue  # another claimant was faster
            if seen is None:
                print(
                    f"{self._file}: the lock is held by {_holder(found.value)}; watching for up to {EXPIRY:.0f} s "
                    "whether it is renewed",
                    flush=True,
                )
                seen, since = generation, now
            elif generation != seen:
                raise ConfigError(
                    f"run_dir: {directory} is in use by another training process, {_holder(found.value)}; stop it, "
                    f"wait for it, or pass another --run-dir. A dead process is replaced {EXPIRY:.0f} s after its "
                    f"last sign of life; if you know that this one is, delete {self._file}"
                )
            time.sleep(min(1.0, RENEWAL / 4))

    def _keep(self) -> None:
        """Renew the lock until it is released, or lost."""
        renewed = time.monotonic()
        while not self._released.wait(RENEWAL):
            began, reason = time.monotonic(), "another process has taken the lock"
            try:
                mine = self._write(self._generation)
            except (ValueError, TimeoutError) as error:  # the network may be back for the next one
                if time.monotonic() - renewed < EXPIRY - 2 * RENEWAL:
                    continue
                mine, reason = None, f"the lock could not be renewed ({one_line(error)})"
            if mine is None:
                self._lose(reason)
            else:
                self._generation, renewed = mine, began

    def _write(self, expected: bytes) -> bytes | None:
        """Write the lock if its generation is ``expected``; return the new one, or None if it is another."""
        about = {"host": socket.gethostname(), "process": os.getpid(), "id": self._id, "renewed": time.time()}
        stamp = self._store.write(self._key, json.dumps(about).encode(), if_equal=expected).result(timeout=RENEWAL)
        if stamp.generation:
            return stamp.generation
        # The write may be refused because it was sent twice, when the answer to the first was lost.
        found = self._store.read(self._key).result(timeout=RENEWAL)
        return found.stamp.generation if _about(found.value).get("id") == self._id else None

    def _lose(self, reason: str) -> None:
        print(
            f"error: {self._file}: {reason}, so this process ends now. The run continues in the other process, or with "
            "the same command, from its newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


def _about(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _holder(content: bytes) -> str:
    about = _about(content)
    when = time.strftime("%H:%M:%S UTC", time.gmtime(about["renewed"])) if "renewed" in about else "an unknown time"
    return f"process {about.get('process', '?')} on {about.get('host', 'an unknown host')} (lock renewed at {when})"
