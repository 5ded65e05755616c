"""The learning rate schedule and the optimizer."""

from __future__ import annotations

from typing import Any

import jax
import optax

import jlora
from train.config import FitConfig


def make_schedule(config: FitConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate as a function of the update count, which starts at 0.

    Warm-up takes the fraction ``config.warmup`` of the ``steps``. In its w steps the rate rises linearly from
    ``peak`` / w to ``peak``, so no step has a rate of 0. The next step has ``peak`` too; ``config.schedule`` determines
    the rest.
    """
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([lambda step: peak * ((step + 1) / warmup), after], [warmup]) if warmup else after


def make_optimizer(config: FitConfig) -> optax.GradientTransformation:
    """AdamW on the clipped gradient, without the learning rate: the step scales the updates by its negative.

    The learning rate is a function of the step in `TrainState`, so the optimizer's state is two moments of the trained
    parameters and one counter. With LoRA+, the updates of B are scaled by ``lora_plus``.
    """
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    parts = [clip, optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay)]
    if config.lora_plus != 1:
        parts.append(optax.masked(optax.scale(config.lora_plus), _is_b))
    return optax.chain(*parts)


def _is_b(adapters: Any) -> Any:
    return jax.tree.map(lambda label: label == "B", jlora.labels(adapters))
