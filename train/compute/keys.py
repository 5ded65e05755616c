"""Random keys: one for each purpose of a run."""

from __future__ import annotations

import jax

import jlora


def random_key(seed: int, purpose: str) -> jax.Array:
    """The key for one purpose of a run. Purposes do not share randomness, and a new one does not change the others."""
    return jlora.path_key(jax.random.key(seed), purpose)
