"""Which keys each query sees, as segments and windows: no matrix of queries by keys until a form needs it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from jlora.files.errors import ModelError

AttentionForm: TypeAlias = Literal["auto", "plain", "flash"]
"""How attention is computed: with all scores in memory, never with all, or by length and device."""

SHORTEST = {"tpu": 512, "gpu": 1024, "cpu": 1024}
"""The number of queries from which on "auto" is "flash" (docs/speed.md): where a CPU takes longer with all scores, and
a TPU by its compiler's estimate. On GPUs it is not measured."""

_PADDING = -1


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("queries", "keys", "start", "allowed"),
    meta_fields=("length", "slots", "causal", "packed", "windows", "flash"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """The keys that each query sees: those of its segment that are not padding, not later, and in its window.

    Attributes:
      queries: int32 [batch or 1, length], the segment of each query, from 0.
      keys: int32 [batch or 1, slots], the segment of each key, or -1 at padding.
      start: int32 scalar, the slot of the first query; None for 0.
      allowed: bool, broadcasts to [batch, length, slots]: all of this but the windows. None for all, and always unless
        the form is the plain one.
      length, slots: the numbers of queries and of keys.
      causal: whether a query sees no later key.
      packed: whether there may be several segments.
      windows: the windows of the layers, each once: the number of keys that a query sees, up to and including its own;
        None for all.
      flash: whether the scores are never held all at once.
    """

    queries: jax.Array | None
    keys: jax.Array | None
    start: jax.Array | None
    allowed: jax.Array | None
    length: int
    slots: int
    causal: bool
    packed: bool = False
    windows: tuple[int | None, ...] = (None,)
    flash: bool = False

    def visible(
        self, rows: jax.Array, slots: jax.Array, queries: jax.Array | None, keys: jax.Array | None
    ) -> jax.Array | None:
        """Whether queries see keys, without windows: bool, broadcasts to [batch, rows, slots]; None if they see all.

        Args:
          rows, slots: int [rows] and [slots], the positions of the queries and of the keys among the slots.
          queries, keys: their segments.
        """
        conditions = []
        if self.causal:
            conditions.append((rows[:, None] >= slots)[None])
        if keys is not None:
            conditions.append((keys != _PADDING)[:, None, :])
            if self.packed and queries is not None:
                conditions.append(queries[:, :, None] == keys[:, None, :])
        return functools.reduce(jnp.logical_and, conditions) if conditions else None

    @property
    def rows(self) -> jax.Array:
        """The slot of each query, int32 [length]."""
        index = jnp.arange(self.length)
        return index if self.start is None else index + self.start


def make_mask(
    like: jax.Array,
    length: int,
    slots: int,
    *,
    causal: bool,
    form: AttentionForm,
    real: jax.Array | None = None,
    segments: jax.Array | None = None,
    start: jax.Array | None = None,
    windows: tuple[int | None, ...] = (None,),
) -> Mask:
    """The mask of a call.

    Args:
      like: an array of the computation, for its platform.
      real: bool [batch, slots], the keys that are not padding; None for all.
      segments: int [batch, length] of packed sequences, for queries that are also the keys.

    Raises:
      ModelError: if ``form`` is not one of its values.
    """
    if form not in get_args(AttentionForm):
        expected = "'auto' (by length), 'plain' (all scores at once) or 'flash' (never all)"
        raise ModelError(f"attention = {form!r}; expected {expected}")
    queries = None if segments is None else segments.astype(jnp.int32) - segments.min()
    keys = queries
    if real is not None:
        keys = jnp.where(real, jnp.int32(0) if queries is None else queries, _PADDING)
    flash = length > 1 and (form == "flash" or form == "auto" and length >= SHORTEST.get(platform_of(like), 1024))
    mask = Mask(queries, keys, start, None, length, slots, causal, segments is not None, windows, flash)
    if flash:
        return mask
    return dataclasses.replace(mask, allowed=mask.visible(mask.rows, jnp.arange(slots), queries, keys))


def platform_of(x: jax.Array) -> str:
    """The platform that ``x`` is computed on: of its mesh, which may be one that is compiled for and not there; else of
    JAX's default device."""
    device: Any = getattr(jax.typeof(x).sharding.mesh, "abstract_device", None)
    device = device or jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    found = jax.default_backend() if device is None else getattr(device, "platform", device)
    return {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
