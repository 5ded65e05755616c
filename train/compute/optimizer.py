"""The learning rate's schedule, and the optimizer that it steers."""

from __future__ import annotations

from typing import Any

import jax
import optax

import jlora
from train.config import FitConfig


def make_schedule(config: FitConfig, peak: float, steps: int) -> optax.Schedule:
    """The learning rate by the number of updates done, so that the first step has that of 0.

    In a warm-up of w = ``config.warmup`` of the ``steps`` it rises from ``peak`` / w to ``peak`` in equal parts, so
    that every step learns; the step after has ``peak`` too, and the rest goes as ``config.schedule`` says.
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
    """AdamW's direction from the clipped gradient, for adapters; the step goes along it by minus the learning rate.

    The rate is a function of the step that the state counts already, so the optimizer keeps two moments of what is
    trained, one counter, and nothing else. With LoRA+ B goes ``lora_plus`` times as far as A.
    """
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    parts = [clip, optax.scale_by_adam(), optax.add_decayed_weights(config.weight_decay)]
    if config.lora_plus != 1:
        parts.append(optax.masked(optax.scale(config.lora_plus), _is_b))
    return optax.chain(*parts)


def _is_b(adapters: Any) -> Any:
    return jax.tree.map(lambda label: label == "B", jlora.labels(adapters))
