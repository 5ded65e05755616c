"""The rank of a truncated update: given, or the smallest that keeps a share of the energy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from jlora._src.types import Array
from jlora.messages import shown


def check_options(what: str, rank: Any, energy: Any, *, optional: bool = False) -> None:
    """Raises a TypeError unless one of ``rank`` and ``energy`` is given (or none, if ``optional``), and a ValueError if
    it is out of range."""
    given = [name for name, value in (("rank", rank), ("energy", energy)) if value is not None]
    if len(given) > 1 or not (given or optional):
        got = " and ".join(given) or "neither"
        raise TypeError(f"{what}: got {got}; expected either rank=, a number, or energy=, a share such as 0.95")
    if rank is not None and (not isinstance(rank, int | np.integer) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"{what}: got rank={shown(rank)}; expected an integer above 0")
    if energy is not None and (isinstance(energy, bool) or not 0 < energy <= 1):
        raise ValueError(f"{what}: got energy={shown(energy)}; expected a share above 0 and at most 1, such as 0.95")


def rank_for(singular_values: Array, energy: float, what: str) -> int:
    """The smallest rank above 0 at which all slices of a weight together keep at least ``energy``, as a share of the
    sum of the squares of ``singular_values``, ``[..., k]`` in descending order.

    Raises:
      TypeError: under `jax.jit`, where the rank would depend on the values.
    """
    if isinstance(singular_values, Tracer):
        raise TypeError(
            f"{what}: got energy={energy} under jax.jit, where shapes cannot depend on values; pass rank=, or call it "
            "outside of jax.jit"
        )
    values = np.asarray(jax.device_get(singular_values), np.float64)
    squares = np.square(values).reshape(-1, values.shape[-1]).sum(0)
    lost = np.append(np.cumsum(squares[::-1])[::-1][1:], 0)
    return 1 + int(np.argmax(lost <= (1 - energy) * squares.sum()))
