"""The learning rate's schedule, and the optimizer around it."""

from __future__ import annotations

import optax

from train.config import FitConfig


def make_schedule(config: FitConfig, peak: float, steps: int) -> optax.Schedule:
    """From 0 to ``peak`` in ``config.warmup`` of the ``steps``, then as ``config.schedule`` says until they end."""
    warmup = round(config.warmup * steps)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: FitConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW on the clipped gradient. It knows nothing of LoRA; `jlora.freeze` restricts it to what is trained."""
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    return optax.chain(clip, optax.adamw(schedule, weight_decay=config.weight_decay))
