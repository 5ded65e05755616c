"""The methods of `benchmarks.variants`: each is a small function of jlora's public API."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jlora
from train.config import EVERYTHING, NEW_HEAD
from train.data.batches import Batch
from train.networks.network import Forward


class Start(NamedTuple):
    """What a method trains, and on what.

    Attributes:
      base: the frozen parameters.
      trained: ``{path: factors or array}``; with a rule, its values.
      rule: an update rule that expands them to adapters, or None.
    """

    base: Any
    trained: dict[str, Any]
    rule: Any = None

    def adapters(self, trained: dict[str, Any]) -> jlora.Adapters:
        return trained if self.rule is None else self.rule.adapters(trained)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A network, its parameters, and batches of its task.

    Attributes:
      forward: of the network.
      params: one tree of its parameters.
      task: has the loss; see `train.tasks`.
      config: of plain LoRA.
      uses: from `jlora.trace`.
      moments: returns those of the inputs of the weights that ``config`` adapts.
      batch: for gradients.
    """

    forward: Forward
    params: Any
    task: Any
    config: jlora.LoraConfig
    uses: Any
    moments: Callable[[], Mapping[str, jlora.InputMoments]]
    batch: Batch

    def plan(self, **changes: Any) -> jlora.Plan:
        """Plain LoRA's plan, with changes of its config."""
        return jlora.plan(self.params, dataclasses.replace(self.config, **changes), self.uses)


def collected_moments(
    forward: Forward, params: Any, plan: jlora.Plan, task: Any, batches: Sequence[Batch]
) -> dict[str, jlora.InputMoments]:
    """The moments over batches without padding."""
    found = [jlora.input_moments(forward, params, plan, task.inputs(batch)) for batch in batches]
    return functools.reduce(lambda x, y: jax.tree.map(jnp.add, x, y), found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(forward: Forward, loss: Callable[..., Any], weights: Any, params: Any, inputs: Any, batch: Any) -> Any:
    def mean_loss(weights: Any) -> jax.Array:
        total, count = loss(jlora.lora(forward)(jlora.attach(params, weights), inputs), batch)
        return total / count

    return jax.grad(mean_loss)(weights)


# Each method takes a setting and a key, and returns a `Start`.


def fresh(setting: Setting, key: jax.Array, **config: Any) -> Start:
    """Plain LoRA; with options of its config, rsLoRA, DoRA, and other inits."""
    return Start(setting.params, jlora.init(key, setting.params, setting.plan(**config)))


def decomposed(setting: Setting, key: jax.Array, *, method: Any, **config: Any) -> Start:
    """Adapters that start from the weights: PiSSA and OLoRA."""
    return Start(*jlora.decompose(setting.params, setting.plan(**config), method=method))


def from_inputs(setting: Setting, key: jax.Array, *, method: Any) -> Start:
    """Adapters that start from the inputs: EVA and CorDA."""
    return Start(*jlora.decompose(setting.params, setting.plan(), method=method, moments=setting.moments()))


def lora_ga(setting: Setting, key: jax.Array) -> Start:
    """Adapters that start from the gradient of one batch; with rsLoRA's scale, as its authors."""
    plan = setting.plan(use_rslora=True)
    leaves, _ = jlora.named_leaves(setting.params)
    weights = {path: leaves[path] for path, target in plan.items() if target.axes is not None}
    batch = setting.batch
    gradients = _gradients(
        setting.forward, setting.task.loss, weights, setting.params, setting.task.inputs(batch), batch
    )
    return Start(*jlora.decompose(setting.params, plan, method="lora_ga", gradients=gradients))


def vera(setting: Setting, key: jax.Array) -> Start:
    """VeRA, with 8 times the rank, as the rank costs few trained numbers."""
    draw, values = jax.random.split(key)
    rule = jlora.vera(draw, setting.plan(rank=8 * setting.config.rank))
    return Start(setting.params, rule.init(values, setting.params), rule)


def tied_lora(setting: Setting, key: jax.Array) -> Start:
    """Tied-LoRA, with trained A and B."""
    draw, values = jax.random.split(key)
    rule = jlora.tied_lora(draw, setting.plan())
    return Start(setting.params, rule.init(values, setting.params), rule)


def whole(setting: Setting, key: jax.Array, *, config: jlora.LoraConfig) -> Start:
    """Every weight, or a head alone, without factors."""
    return Start(setting.params, jlora.init(key, setting.params, config, setting.uses))


def quantized(setting: Setting, key: jax.Array, *, scheme: str) -> Start:
    """Plain LoRA on a base in few bits."""
    base = jlora.quantize(setting.params, scheme, setting.uses)
    return Start(base, jlora.init(key, base, setting.plan()))


def repaired(setting: Setting, key: jax.Array, *, method: Any, scheme: str) -> Start:
    """A base in few bits, with adapters that make up for a part of the error: LoftQ and LQ-LoRA."""
    plan = setting.plan()
    axes = {target.shape: target.axes for target in plan.values()}  # so that the blocks follow the inputs

    def quantizer(weight: jax.Array) -> jlora.QuantizedArray:
        return jlora.quantize_array(weight, scheme, axes[weight.shape])

    return Start(*jlora.decompose(setting.params, plan, method=method, quantizer=quantizer))


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """A method.

    Attributes:
      start: as above.
      fit: the fields of `train.config.FitConfig` that it changes.
      fixed: whether its factors do not depend on the key, nor on leaves that train whole.
    """

    start: Callable[[Setting, jax.Array], Start]
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: bool = False


part = functools.partial
METHODS: dict[str, Method] = {
    "LoRA": Method(fresh),
    "rsLoRA": Method(part(fresh, use_rslora=True)),
    "DoRA": Method(part(fresh, use_dora=True)),
    "gaussian": Method(part(fresh, init="gaussian")),
    "orthogonal": Method(part(fresh, init="orthogonal")),
    "PiSSA": Method(part(decomposed, method="pissa"), fixed=True),
    "OLoRA": Method(part(decomposed, method="olora"), fixed=True),
    "EVA": Method(part(from_inputs, method="eva"), fixed=True),
    "LoRA-GA": Method(lora_ga),
    "CorDA": Method(part(from_inputs, method="corda"), fixed=True),
    "LoRA+": Method(fresh, {"lora_plus": 16.0}),
    "LoRA-FA": Method(fresh, {"optimizer": "lora-fa"}),
    "Riemannian": Method(fresh, {"optimizer": "riemannian"}),
    "VeRA": Method(vera),
    "Tied-LoRA": Method(tied_lora),
    "int8 base": Method(part(quantized, scheme="int8")),
    "NF4 base": Method(part(quantized, scheme="nf4")),
    "LoftQ, NF4": Method(part(repaired, method="loftq", scheme="nf4"), fixed=True),
    "LQ, NF4": Method(part(repaired, method="lq", scheme="nf4"), fixed=True),
    "every weight": Method(part(whole, config=EVERYTHING)),
    "head alone": Method(part(whole, config=NEW_HEAD)),
}
