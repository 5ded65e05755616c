"""Predictions for all examples, and their accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jlora
from train import data, tasks
from train.model import Forward

Predict = Callable[[Any, data.Examples], np.ndarray]


def make_predict(forward: Forward, batch_size: int) -> Predict:
    """``predict(params, examples)``: for every example, int32 [n]; compiled once for a tree structure."""

    @jax.jit
    def predict_batch(params: Any, batch: tasks.Batch) -> jax.Array:
        return tasks.predict(forward(params, tasks.inputs(batch)))

    def predict(params: Any, examples: data.Examples) -> np.ndarray:
        batches = data.padded_batches(examples, batch_size)
        return np.concatenate([predict_batch(params, batch) for batch in batches])[: data.size(examples)]

    return predict


def accuracy(predictions: np.ndarray, examples: data.Examples) -> float:
    """The share of right predictions."""
    return float(np.mean(predictions == examples["label"]))


def compare(
    plain: Predict,
    attached: Predict,
    params: Any,
    adapters: dict[str, Any],
    merged: Any,
    test: dict[str, data.Examples],
) -> dict[str, Any]:
    """Four models on every domain: base, adapted, merged, and the base again after the adapters are detached.

    Args:
      plain, attached: predictions of the bare model, and of the one that understands attached trees.
      test: examples by domain.

    Returns:
      ``accuracy``: by model and domain; ``differing_predictions``: over all domains, merged against adapted and
      detached against base. Both counts are 0 if all is well.
    """
    tree = jlora.attach(params, adapters)
    models = {
        "base": (plain, params),
        "adapted": (attached, tree),
        "merged": (plain, merged),
        "detached": (plain, jlora.detach(tree)[0]),
    }
    found = {
        model: {name: predict(weights, examples) for name, examples in test.items()}
        for model, (predict, weights) in models.items()
    }

    def differing(first: str, second: str) -> int:
        return sum(int(np.sum(found[first][name] != found[second][name])) for name in test)

    return {
        "accuracy": {
            model: {name: accuracy(predictions[name], test[name]) for name in test}
            for model, predictions in found.items()
        },
        "differing_predictions": {
            "merged_vs_adapted": differing("merged", "adapted"),
            "detached_vs_base": differing("detached", "base"),
        },
    }
