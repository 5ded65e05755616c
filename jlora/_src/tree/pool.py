"""`AdapterPool`: any number of adapters by name, a few of them on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._src.engine.factors.named_axes import accumulation_dtype, promoted_dtype
from jlora._src.tree.checks import PathError, check_kinds, differences
from jlora._src.tree.select import BASE, select
from jlora._src.types import Adapters, LoraFactors, Path, RowAdapters
from jlora.messages import bullets, nearest


class AdapterPool:
    """Slots on the device for adapters that are found by name: thousands are served from a few slots.

    >>> pool = jlora.AdapterPool({"ann": first, "bob": second}, like=first, slots=16, rank=16)
    >>> logits = apply(jlora.attach(params, pool.select(["ann", None, "bob", "ann"])), tokens)

    An adapter is copied from its source to a slot when a batch needs it, in the place of the one that was used least
    recently. All slots have one shape, and the slot is an argument of the copy: once a batch of each size was served,
    nothing compiles, whichever adapters come. Ranks are padded with zeros, and scales folded into B, in float32 or
    wider: each adapter keeps its update. A pool is changed by its methods, by one thread at a time.

    Args:
      source: ``{name: adapters}``; any mapping, such as one that reads files. Keep the arrays on the host
        (`jax.device_get`), where they take no memory of the device.
      like: adapters with the paths, axes, dropout rates and dtypes of all, or their shapes; of any rank.
      slots: how many adapters are on the device, and may be in one batch.
      rank: the largest rank of an adapter.

    Raises:
      ValueError: if ``slots`` or ``rank`` is below 1.
      TypeError: if a value of ``like`` is neither factors nor an array.
    """

    def __init__(self, source: Mapping[Any, Adapters], like: Adapters, *, slots: int, rank: int) -> None:
        if slots < 1 or rank < 1:
            raise ValueError(f"AdapterPool: slots = {slots}, rank = {rank}; expected at least 1 of each")
        check_kinds(like, "AdapterPool, like")
        self._source = source
        self._slot = {path: _slot(value, rank) for path, value in like.items()}
        self._free = list(reversed(range(slots)))
        self._used: dict[Hashable, int] = {}  # the slots by name, the one used least recently first
        self._stacked = jax.tree.map(lambda x: jnp.zeros((slots, *x.shape), x.dtype), self._slot)

    @property
    def names(self) -> tuple[Hashable, ...]:
        """The adapters on the device, the one used least recently first."""
        return tuple(self._used)

    def select(self, names: Sequence[Hashable | None], *, group_size: int = 1) -> dict[Path, RowAdapters]:
        """Row i of a batch gets the adapter ``names[i]``, or with None the base alone; see `jlora.select`.

        Raises:
          KeyError: listing every name that the source lacks.
          ValueError: if the batch has more different adapters than there are slots; or listing everything in which an
            adapter does not fit its slot: paths, kinds, axes, shapes, dropout rates, dtypes, and the rank. No slot has
            changed then.
        """
        wanted = [name for name in dict.fromkeys(names) if name is not None]
        slots = len(self._used) + len(self._free)
        if len(wanted) > slots:
            raise ValueError(
                f"AdapterPool: the batch has {len(wanted)} different adapters for {slots} slots. Expected at most "
                f"{slots}: divide the batch, or make a pool with more slots"
            )
        if unknown := [name for name in wanted if name not in self._source]:
            lines = (f"{name!r}{nearest(str(name), map(str, self._source))}" for name in unknown)
            raise PathError(f"AdapterPool: the source has no adapters with these names:{bullets(lines)}")
        new = {name: self._fitted(name) for name in wanted if name not in self._used}
        for name in wanted:
            if name in self._used:
                self._used[name] = self._used.pop(name)
        for name, adapters in new.items():
            slot = self._free.pop() if self._free else self._used.pop(next(iter(self._used)))
            self._stacked = _put(self._stacked, np.int32(slot), adapters)
            self._used[name] = slot
        ids = np.array([BASE if name is None else self._used[name] for name in names], np.int32)
        return _select(self._stacked, ids, group_size=group_size)

    def drop(self, name: Hashable) -> None:
        """Forget the copy of an adapter: its next use reads the source again. Does nothing if it is not in a slot."""
        if name in self._used:
            self._free.append(self._used.pop(name))

    def _fitted(self, name: Hashable) -> dict[Path, Any]:
        """The adapters of the source, in the shape of a slot."""
        adapters = self._source[name]
        check_kinds(adapters, f"AdapterPool, {name!r}")
        if wrong := list(_misfits(self._slot, adapters)):
            raise ValueError(
                f"AdapterPool: the adapters {name!r} do not fit the slots:{bullets(wrong)}\nExpected those of `like`, "
                "with a rank up to the pool's: serve these with a pool of their own."
            )
        return {path: _filled(slot, adapters.get(path)) for path, slot in self._slot.items()}


@functools.partial(jax.jit, donate_argnums=0)
def _put(stacked: Any, slot: Any, adapters: Any) -> Any:
    """The stack with ``adapters`` in a slot, in the memory of ``stacked``."""
    return jax.tree.map(lambda s, x: lax.dynamic_update_index_in_dim(s, x, slot, 0), stacked, adapters)


_select = jax.jit(select, static_argnames="group_size")


def _slot(value: Any, rank: int) -> Any:
    """The shapes of one slot."""
    if not isinstance(value, LoraFactors):
        return jax.ShapeDtypeStruct(value.shape, value.dtype)
    k = len(value.axes.batch)
    a = jax.ShapeDtypeStruct((*value.a.shape[:-1], rank), value.a.dtype)
    b = jax.ShapeDtypeStruct((*value.b.shape[:k], rank, *value.b.shape[k + 1 :]), accumulation_dtype(value.b.dtype))
    m = value.magnitude
    magnitude: Any = None if m is None else jax.ShapeDtypeStruct(m.shape, m.dtype)
    return LoraFactors(a, b, magnitude, axes=value.axes, dropout=value.dropout)  # pyright: ignore[reportArgumentType]


def _misfits(slots: Mapping[Path, Any], adapters: Adapters) -> Iterator[str]:
    """Everything in which adapters do not fit a slot."""
    yield from (f"{path!r} is no path of the slots{nearest(path, slots)}" for path in adapters if path not in slots)
    for path, slot in slots.items():
        value = adapters.get(path)
        if value is None:
            if not isinstance(slot, LoraFactors) or slot.magnitude is not None:
                yield f"{path!r} is missing, and is trained whole or with DoRA in the slots"
            continue
        if found := differences([slot, value]):
            yield f"{path!r}: {found[0]} (the slots', then these)"
            continue
        if isinstance(slot, LoraFactors) and isinstance(value, LoraFactors) and value.rank > slot.rank:
            yield f"{path!r}: rank {value.rank}, expected at most {slot.rank}"
        for x, s in zip(jax.tree.leaves(value), jax.tree.leaves(slot), strict=True):
            if promoted_dtype(x.dtype, s.dtype) != s.dtype:
                yield f"{path!r}: dtype {x.dtype}, which {s.dtype} cannot hold"


def _filled(slot: Any, value: Any) -> Any:
    """Host arrays of a slot's shapes with an adapter's update; zeros without one. NumPy compiles nothing."""
    if not isinstance(slot, LoraFactors):
        return np.asarray(value, slot.dtype)
    a, b = (np.zeros(x.shape, x.dtype) for x in (slot.a, slot.b))
    if value is None:
        return dataclasses.replace(slot, a=a, b=b)
    a[..., : value.rank] = np.asarray(value.a)
    ranks = (*[slice(None)] * len(slot.axes.batch), slice(value.rank))
    b[ranks] = np.asarray(value.b).astype(b.dtype) * value.scale
    magnitude = None if slot.magnitude is None else np.asarray(value.magnitude, slot.magnitude.dtype)
    return dataclasses.replace(slot, a=a, b=b, magnitude=magnitude)
