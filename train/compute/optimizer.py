"""The learning rate schedule and the optimizer."""

from __future__ import annotations

from typing import Any

import optax

from jlora import optim
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


def make_optimizer(config: FitConfig, *, decay: Any = None, ratio: Any = None) -> optax.GradientTransformation:
    """The optimizer on the clipped gradient, without the learning rate: the step scales the updates by its negative.

    The learning rate is a function of the step in `TrainState`, so the optimizer's state is two moments of the trained
    parameters (LoRA-FA: without A) and one counter. With LoRA+, the updates of B are scaled by ``lora_plus``.

    Args:
      decay, ratio: scalar arrays in place of ``weight_decay`` and ``lora_plus``, for a step that does not know them.
    """
    decay = config.weight_decay if decay is None else decay
    clip = optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip)
    spared = optim.decay_mask if config.decay == "matrices" else None
    parts = [optax.scale_by_adam(), optax.add_decayed_weights(decay, spared)]
    if config.optimizer == "lora-fa":
        parts = [optim.lora_fa(optax.chain(*parts))]
    elif config.optimizer == "riemannian":
        parts = [optim.riemannian(optax.chain(*parts))]
    tx = optax.chain(clip, *parts)
    if ratio is None and config.lora_plus == 1:
        return tx
    return optim.loraplus(tx, config.lora_plus if ratio is None else ratio)
