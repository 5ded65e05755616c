"""Random keys, one for each purpose of a run."""

from __future__ import annotations

import jax

import jlora


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key for one purpose of a run. Keys for different purposes are independent."""
    return jlora.path_key(jax.random.key(seed), purpose)
