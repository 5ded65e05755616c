"""JAX's persistent compilation cache, on by default: a resumed run and later ones need not compile again.

The key of a program covers its computation, the compiler's version and flags, and the devices, with the instruction set
of a CPU. So a program from the cache is the one that this process would compile, and computes the same bits.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from train.compute.processes import all_agree, first_decides, is_first
from train.config import TrainConfig

MAX_BYTES = 2**30
"""The maximum size of the cache; JAX removes the programs that were not used for the longest time."""

MIN_SECONDS = 0.05
"""Programs that compile faster are not kept: to add one, JAX visits all that are there."""


@contextlib.contextmanager
def compilation_cache(config: TrainConfig) -> Iterator[None]:
    """In this context, compiled programs are kept in ``cache_dir/compiled``, and loaded from there.

    JAX's own settings take precedence: ``JAX_COMPILATION_CACHE_DIR`` as a whole, others one by one. Without a folder
    that this process can write to and all processes share, programs are compiled as without a cache.
    """
    folder = config.cache_dir.absolute() / "compiled"
    is_wanted = config.compute.compilation_cache and jax.config.values["jax_compilation_cache_dir"] is None
    if not (is_wanted and _is_usable(folder)):
        yield
        return
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_compilation_cache_max_size": MAX_BYTES,
        "jax_persistent_cache_min_compile_time_secs": MIN_SECONDS,
    }
    options = {name: value for name, value in options.items() if name.upper() not in os.environ}
    before = {name: jax.config.values[name] for name in options}
    try:
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


def _is_usable(folder: Path) -> bool:
    """Whether the first process can write to ``folder``, and all see the same one.

    If only some load a program that the others compile, these may wait for them: GPUs are tuned for it together.
    """
    token = first_decides(lambda: _prepare(folder))
    is_shared = all_agree(bool(token) and (folder / token).exists())
    if token and is_first():
        (folder / token).unlink(missing_ok=True)
    return is_shared


def _prepare(folder: Path) -> str:
    """Make the folder, and return the name of a new file in it; "" if that is impossible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            _remove_unfinished(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="shared-", delete=False) as token:
            return Path(token.name).name
    except OSError:
        return ""


def _remove_unfinished(folder: Path) -> None:
    """Remove programs that a killed process wrote in part. JAX would never replace them, and warn each time.

    If the cache has a maximum size, JAX writes the time of a program's last use next to it, after the program.
    """
    names = {file.name for file in folder.iterdir()}
    for name in names:
        if name.endswith("-cache") and f"{name.removesuffix('cache')}atime" not in names:
            (folder / name).unlink(missing_ok=True)
