"""Random keys, one for each purpose of a run."""

from __future__ import annotations

import zlib

import jax


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key for one purpose of a run. Keys of different purposes are independent, and a new one changes no other."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
