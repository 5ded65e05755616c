"""Tied-LoRA: factors that all weights of one shape share, and two trained vectors for each weight."""

from __future__ import annotations

import dataclasses
import math

import jax

from jlora._src.paths import path_key
from jlora._src.tree.plan import Plan
from jlora._src.types import Array, LoraFactors, Path, PyTree, Target
from jlora._src.updates.rule import expanded, factored, kaiming, vectors, whole_and_magnitudes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TiedLora:
    """Tied-LoRA's update rule; see `tied_lora`.

    Attributes:
      shared: the initial A, ``[inputs, rank]``, and B, ``[rank, outputs]``, by name, one pair for each shape.
      plan: what is adapted. Static.
      train_shared: whether A and B train. Static.
    """

    shared: dict[str, Array]
    plan: Plan = dataclasses.field(metadata={"static": True})
    train_shared: bool = dataclasses.field(default=True, metadata={"static": True})

    def init(self, key: Array, params: PyTree) -> dict[str, Array]:
        """``{path/u: batch + (rank,), path/v: batch + outputs}`` of each weight, leaves trained whole by path, and
        copies of the shared A and B if they train."""
        trained = whole_and_magnitudes(key, params, self.plan)
        for target in factored(self.plan):
            trained |= vectors(target, 1.0, self.plan.config.dtype)
        return trained | (jax.tree.map(lambda x: x.copy(), self.shared) if self.train_shared else {})

    def adapters(self, trained: dict[str, Array]) -> dict[Path, LoraFactors | Array]:
        """The update of each weight, ``scale · A · diag(u) · B · diag(v)``."""
        shared = trained if self.train_shared else self.shared

        def factors(target: Target) -> LoraFactors:
            a, b = (shared[name] for name in _names(target))
            return expanded(target, a, b, trained, scale=target.scale)

        return {p: trained[p] if target.axes is None else factors(target) for p, target in self.plan.items()}


def tied_lora(key: Array, plan: Plan, *, train_shared: bool = True) -> TiedLora:
    """Tied-LoRA (Renduchintala et al. 2023, https://arxiv.org/abs/2311.09578): one A and B for all weights of a shape.

    The update is ``scale · A · diag(u) · B · diag(v)``. The vectors are each weight's own: ``u`` is 1 at
    first, ``v`` 0.

    >>> rule = jlora.tied_lora(jax.random.key(0), jlora.plan(params, jlora.LoraConfig(rank=8), uses))

    Args:
      key: draws A and B; keep it if they are frozen, as a checkpoint of the trained values does not have them then.
      plan: from `plan`. Weights with the same numbers of inputs and outputs, and the same rank, share A and B,
        whichever layer and kind they are of.
      train_shared: whether A and B train.

    Raises:
      ValueError: if no weight has factors.
    """
    shared: dict[str, Array] = {}
    for names in dict.fromkeys(map(_names, factored(plan))):
        inputs, rank, outputs = map(int, names[0].split("/")[1].split("x"))
        for name, shape in zip(names, ((inputs, rank), (rank, outputs)), strict=True):
            shared[name] = kaiming(path_key(key, name), shape, shape[0], plan.config.dtype)
    return TiedLora(shared, plan, train_shared)


def _names(target: Target) -> tuple[str, str]:
    """The names of the shared A and B of a weight."""
    assert target.axes is not None
    _, inputs, outputs = target.axes.sizes(target.shape)
    sizes = f"{math.prod(inputs)}x{target.rank}x{math.prod(outputs)}"
    return f"shared/{sizes}/a", f"shared/{sizes}/b"
