"""Outputs and labels of all examples in, metrics out; uses scikit-learn and scipy."""

from __future__ import annotations

import warnings

import numpy as np


def classification(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loss, accuracy, F1 (of class 1 of two, else the mean over classes) and Matthews' correlation.

    Args:
      logits: float32 [n, classes].
      labels: int [n].
    """
    from scipy.special import log_softmax
    from sklearn.metrics import f1_score, matthews_corrcoef  # takes a second to import

    predicted = logits.argmax(axis=-1)
    average = "binary" if logits.shape[1] == 2 else "macro"
    losses = -log_softmax(logits.astype(np.float64), axis=-1)[np.arange(len(labels)), labels]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the correlation is 0 if all examples have one class
        matthews = float(matthews_corrcoef(labels, predicted))
    return {
        "loss": float(losses.mean()),
        "accuracy": float((predicted == labels).mean()),
        "f1": float(f1_score(labels, predicted, average=average, zero_division=0)),  # pyright: ignore[reportArgumentType]
        "matthews": matthews,
    }


def regression(values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean squared error, and Pearson's and Spearman's correlation (0 if one side is constant).

    Args:
      values, labels: float32 [n].
    """
    from scipy import stats  # takes half a second to import

    constant = np.ptp(values) == 0 or np.ptp(labels) == 0
    return {
        "loss": float(((values - labels) ** 2).mean()),
        "pearson": 0.0 if constant else float(np.asarray(stats.pearsonr(values, labels))[0]),
        "spearman": 0.0 if constant else float(np.asarray(stats.spearmanr(values, labels))[0]),
    }


def language_model(loss: np.ndarray, tokens: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Mean loss per token in nats, perplexity and accuracy, over the tokens that carry loss.

    Args:
      loss: summed per example, [n].
      tokens: the number of tokens that carry loss, [n].
      right: the number of these predicted correctly, [n].
    """
    count = max(int(tokens.sum()), 1)
    mean = float(loss.astype(np.float64).sum() / count)
    return {"loss": mean, "perplexity": float(np.exp(min(mean, 700.0))), "token_accuracy": float(right.sum() / count)}
