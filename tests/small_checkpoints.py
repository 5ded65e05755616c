"""Shared by the tests of checkpoints: a small classifier, saved, and ways to damage it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jlora import models, named_leaves

ROOT = Path(__file__).parents[1]
BERT: dict[str, Any] = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 8,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 8,
    "patch_size": 4,
}


@functools.cache
def network(dtype: str = "float32") -> tuple[Any, Any]:
    """A classifier and its parameters, all different."""
    model = models.build(BERT)
    leaves, treedef = named_leaves(models.abstract(model))
    rng = np.random.default_rng(0)
    return model, treedef.unflatten([jnp.asarray(rng.normal(size=x.shape), dtype) for x in leaves.values()])


def same(x: Any, y: Any) -> bool:
    """Whether two trees are equal bit for bit, dtypes included."""
    pairs = jax.tree.map(lambda a, b: a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes(), x, y)
    return jax.tree.all(pairs)


def change(folder: Path, fn: Callable[[dict[str, np.ndarray]], Any], file: str = "model.safetensors") -> None:
    """The checkpoint with ``fn`` applied to its tensors, in place or returned."""
    tensors = load_file(folder / file)
    tensors = fn(tensors) or tensors
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, folder / file)
