"""Over which mesh axes a weight's inputs are split inside ``shard_map``: DoRA's norm sums over all of them."""

from __future__ import annotations

import jax
from jax import lax

from jlora._src.engine import compat
from jlora._src.engine.factors.stored import array_like
from jlora._src.types import LoraWeight


def split_inputs(weight: LoraWeight) -> tuple[str, ...]:
    """The manual mesh axes over which the inputs of a local shard are split; none outside of ``shard_map``.

    If `attach` was not given them, the types tell: where inputs are split over a mesh axis, base and A vary along it
    and the magnitude does not; where outputs are, base and magnitude vary and A does not.

    Raises:
      ValueError: if the types do not tell.
    """
    if weight.split_inputs is not None:
        return weight.split_inputs
    mesh, found = jax.sharding.get_abstract_mesh(), []
    for axis in (name for name in mesh.manual_axes if mesh.shape[name] > 1):
        if axis not in compat.varying_axes(lax.axis_index(axis)):
            raise _unknown(weight, axis, "jax.pmap and jax.shard_map(check_vma=False) do not record what varies")
        if axis not in compat.varying_axes(array_like(weight.base)):
            continue
        magnitude = weight.factors.magnitude
        a, scales = (x is not None and axis in compat.varying_axes(x) for x in (weight.factors.a, magnitude))
        if a == scales:
            raise _unknown(weight, axis, f"of A and the magnitude {'both vary' if a else 'neither varies'} with it")
        if a:
            found.append(axis)
    return tuple(found)


def _unknown(weight: LoraWeight, axis: str, why: str) -> ValueError:
    name = repr(weight.path or "w")
    return ValueError(
        f"DoRA divides by a norm over all inputs of {name}; whether these are split over the mesh axis {axis!r} is "
        f"unknown: {why}. Pass split_inputs={{{name}: {axis!r}}} to jlora.attach if they are, split_inputs={{}} if no "
        "weight is split on its inputs; or call jlora.attach, jlora.init and jlora.merge outside of the mapped "
        "function."
    )
