"""VeRA: random matrices that all weights share, and two trained vectors for each weight."""

from __future__ import annotations

import dataclasses
import math

import jax

from jlora._src.tree.plan import Plan
from jlora._src.types import Array, LoraFactors, Path, PyTree
from jlora._src.updates.rule import expanded, factored, kaiming, vectors, whole_and_magnitudes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vera:
    """VeRA's update rule; see `vera`.

    Attributes:
      a: the frozen A, ``[largest number of inputs, rank]``; a weight with fewer inputs takes the first rows.
      b: the frozen B, ``[rank, largest number of outputs]``.
      plan: what is adapted. Static.
      u_initial: the initial value along the rank. Static.
    """

    a: Array
    b: Array
    plan: Plan = dataclasses.field(metadata={"static": True})
    u_initial: float = dataclasses.field(default=0.1, metadata={"static": True})

    def init(self, key: Array, params: PyTree) -> dict[str, Array]:
        """``{path/u: batch + (rank,), path/v: batch + outputs}`` of each weight, and leaves trained whole by path."""
        trained = whole_and_magnitudes(key, params, self.plan)
        for target in factored(self.plan):
            trained |= vectors(target, self.u_initial, self.plan.config.dtype)
        return trained

    def adapters(self, trained: dict[str, Array]) -> dict[Path, LoraFactors | Array]:
        """The update of each weight, ``A · diag(u) · B · diag(v)``."""
        return {
            path: trained[path] if target.axes is None else expanded(target, self.a, self.b, trained)
            for path, target in self.plan.items()
        }


def vera(key: Array, plan: Plan, *, u_initial: float = 0.1) -> Vera:
    """VeRA (Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454): ``rank + outputs`` trained numbers for a matrix.

    The update is ``A · diag(u) · B · diag(v)``: A and B are random, frozen and shared by all weights, and only the
    vectors train. There is no scale: the paper has none, so the plan's is not used. The rank may be large (256 in
    peft), as it costs few trained numbers.

    >>> rule = jlora.vera(jax.random.key(0), jlora.plan(params, jlora.LoraConfig(rank=64), uses))

    Args:
      key: draws A and B; keep it, as a checkpoint of the trained values does not have them.
      plan: from `plan`; its targets have one rank.
      u_initial: the initial value of ``u``, peft's ``d_initial``. ``v``, peft's ``lambda_b``, starts at 0.

    Raises:
      ValueError: if the ranks differ, or no weight has factors.
    """
    targets = factored(plan)
    ranks = {target.rank for target in targets}
    if len(ranks) > 1:
        raise ValueError(f"vera: all weights share A and B, so they need one rank; got {sorted(ranks)}")
    sizes = [target.axes.sizes(target.shape) for target in targets if target.axes is not None]
    inputs, outputs = (max(math.prod(size[i]) for size in sizes) for i in (1, 2))
    (rank,), (a_key, b_key), dtype = ranks, jax.random.split(key), plan.config.dtype
    a = kaiming(a_key, (inputs, rank), inputs, dtype)
    return Vera(a, kaiming(b_key, (rank, outputs), rank, dtype), plan, u_initial)
