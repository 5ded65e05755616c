"""The networks, as functions of their parameters. All else knows these functions, and not which library made them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jlora
from jlora import HEADS, models
from jlora.files import hub_files
from jlora.files.errors import TensorError
from jlora.models import ModelError, Remat, recomputed
from train.config import (
    CausalLM,
    ConfigError,
    ImageClassification,
    Mlp,
    PatchTransformer,
    Pretrained,
    SequenceClassification,
    TaskConfig,
    TrainConfig,
)
from train.data.batches import Examples

Inputs = Mapping[str, jax.Array]
Forward = Callable[..., jax.Array]
"""``forward(params, inputs, key=None)``: the outputs; with a key, the network's own dropout is at work."""


@dataclass(frozen=True)
class Network:
    """A network and what belongs to it.

    Attributes:
      forward: see `Forward`; inputs are a dictionary of arrays.
      init: ``init(key)``: random parameters.
      load: ``load(key, shardings)``: the parameters to start from, at these places, or for None on one device; a head
        that the checkpoint lacks is drawn from the key, and refused without one. None where there is no checkpoint.
      rules: where parameters lie on a mesh with the axes data, fsdp and tensor; see `jlora.shardings`.
      model: the module of `jlora.models`, or None.
      tokenizer: of transformers; None for images.
      channels, mean, std: of the images that it sees.
      source: the checkpoint, or None.
    """

    forward: Forward
    init: Callable[[jax.Array], Any]
    rules: jlora.ShardingRules
    load: Callable[[jax.Array | None, Any], Any] | None = None
    model: nn.Module | None = None
    tokenizer: Any = None
    channels: int = 1
    mean: Any = 0.0
    std: Any = 1.0
    source: str | None = None


def make_network(config: TrainConfig) -> Network:
    """The network of a configuration that `train.tasks.registry.resolved` has completed. Its weights are not read yet.

    Raises:
      ConfigError: if a checkpoint cannot be used.
    """
    if isinstance(config.model, Pretrained):
        try:
            return _pretrained(config.model, config.task, config.compute.remat)
        except (ModelError, TensorError) as error:
            raise ConfigError(f"model.path: {error}") from error
    assert isinstance(config.task, ImageClassification) and config.task.side and config.task.labels
    side, classes = config.task.side, len(config.task.labels)
    if isinstance(config.model, PatchTransformer) and side % config.model.patch:
        raise ConfigError(f"model.patch: got {config.model.patch}, expected a divisor of the images' side, {side}")
    own, remat = config.model, config.compute.remat
    module = _PatchTransformer(own, classes, remat) if isinstance(own, PatchTransformer) else _Mlp(own, classes)

    def init(key: jax.Array) -> Any:
        return module.init(key, jnp.zeros((1, side, side, 1)))["params"]

    def forward(params: Any, inputs: Inputs, key: jax.Array | None = None) -> Any:
        return module.apply({"params": params}, inputs["images"])

    # Shown from -1 to 1.
    return Network(forward, init, _RULES[type(own)], mean=0.5, std=0.5)


# Checkpoints


_TASKS = {
    SequenceClassification: "sequence-classification",
    CausalLM: "causal-lm",
    ImageClassification: "image-classification",
}


def _pretrained(config: Pretrained, task: TaskConfig, remat: Remat) -> Network:
    # A regression has one output, and no names for it.
    labels = None if isinstance(task, CausalLM) else task.labels or 1
    options: Any = {
        "task": _TASKS[type(task)],
        "labels": labels,
        "dtype": jnp.dtype(config.dtype),
        "revision": config.revision,
        "untie": config.untie,
    }
    dtype = None if config.param_dtype is None else jnp.dtype(config.param_dtype)
    model: Any = models.build(config.path, **options, param_dtype=dtype or jnp.float32, remat=remat)
    image = isinstance(task, ImageClassification)
    most = getattr(model.config, "max_length", None)
    if not isinstance(task, ImageClassification) and most is not None and task.max_length > most:
        raise ConfigError(
            f"task.max_length: got {task.max_length}, expected at most {most}: the network has no more positions; "
            f"pass --task.max-length {most}"
        )
    pictures = _preprocessor(config) if image else {}
    tokenizer: Any = None if image else load_tokenizer(config.path, config.revision)
    if isinstance(task, SequenceClassification) and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # as GPT-2's has none; the mask tells padding from text

    def forward(params: Any, inputs: Inputs, key: jax.Array | None = None) -> Any:
        if key is None or not config.dropout:
            return model.apply(params, **inputs)
        return model.apply(params, **inputs, deterministic=False, rngs={"dropout": key})

    def load(key: jax.Array | None, shardings: Any = None) -> Any:
        head = None if labels is None else key
        try:
            return models.load(config.path, **options, param_dtype=dtype, key=head, shardings=shardings)[1]
        except (ModelError, TensorError) as error:
            new = (
                ""
                if key is not None or labels is None
                else "\nA new head has to be trained: --lora.train-also classifier"
            )
            raise ConfigError(f"model.path: {error}{new}") from error

    return Network(
        forward,
        init=lambda key: {"params": model.init(key, models.example_inputs(model))["params"]},
        rules=models.sharding_rules(model),
        load=load,
        model=model,
        tokenizer=tokenizer,
        source=config.path,
        **pictures,
    )


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
      ConfigError: if there is none.
    """
    # transformers says at import that it found no torch, which it does not need here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
            # Without its files transformers makes a tokenizer that knows no word.
            if set(tokenizer("a b c", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
                raise ValueError("it knows no word")
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path: {path} has no tokenizer that transformers can read ({str(error).splitlines()[0]}). "
                "Expected the files that its save_pretrained writes, such as tokenizer.json, beside the weights"
            ) from error
    return tokenizer


def check_tokens(network: Network, *sets: Mapping[str, Examples]) -> None:
    """Raises a ConfigError if the examples hold tokens that the network does not know."""
    known = getattr(getattr(network.model, "config", None), "vocab_size", None)
    if known is None or network.tokenizer is None:
        return
    columns = [examples["input_ids"] for named in sets for examples in named.values()]
    most = max((int(tokens.max()) for column in columns for tokens in column if tokens.size), default=0)
    if most >= known:
        word = network.tokenizer.convert_ids_to_tokens(most)
        raise ConfigError(
            f"model.path: the tokenizer makes the token {most} ({word!r}), and the network of {network.source} knows "
            f"{known} tokens; expected the tokenizer that belongs to the weights"
        )


def checkpoint_side(config: Pretrained) -> int:
    """The side of the images that a checkpoint was trained on."""
    model: Any = models.build(config.path, task="image-classification", labels=1, revision=config.revision)
    return model.config.image_size


def _preprocessor(config: Pretrained) -> dict[str, Any]:
    """How a checkpoint wants its pixels: mean and standard deviation of each channel, of values from 0 to 1."""
    found = read_settings(config, hub_files.PREPROCESSOR_CONFIG)
    normalized = found.get("do_normalize", True)
    mean, std = (found.get("image_mean", 0.5), found.get("image_std", 0.5)) if normalized else (0.0, 1.0)
    # Its own are of values from 0 to 255 times its factor.
    white = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255
    return {"channels": 3, "mean": np.divide(mean, white), "std": np.divide(std, white)}


def read_settings(config: Pretrained, name: str) -> dict[str, Any]:
    """The content of one of a checkpoint's JSON files; empty if it has none of that name."""
    return hub_files.read_optional(models.fetch(config.path, config.revision), name) or {}


# Networks of our own, trained from scratch


class _Mlp(nn.Module):
    config: Mlp
    classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float32 [batch, side, side, channels], to logits, float32 [batch, classes]."""
        x = images.reshape(images.shape[0], -1)
        for i, width in enumerate(self.config.hidden):
            x = nn.relu(nn.Dense(width, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, name="head")(x)


class _Block(nn.Module):
    """A pre-norm transformer block: attention, then an MLP, each added to its input."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[batch, patches, width] to the same."""
        y = nn.LayerNorm(name="attention_norm")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y)
        y = nn.LayerNorm(name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.hidden, name="up")(y))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class _PatchTransformer(nn.Module):
    """Cut the image into patches, embed each with its position, transform, average, classify."""

    config: PatchTransformer
    classes: int
    remat: Remat = "none"

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Images, float32 [batch, side, side, channels], to logits, float32 [batch, classes]."""
        config = self.config
        x = nn.Dense(config.width, name="embed")(patches(images, config.patch))
        x = x + self.param("positions", nn.initializers.normal(0.2), x.shape[1:])
        block = recomputed(_Block, self.remat)
        for layer in range(config.depth):
            x = block(config.heads, config.hidden, name=f"block_{layer}")(x)
        x = nn.LayerNorm(name="norm")(x).mean(axis=1)
        return nn.Dense(self.classes, name="head")(x)


def patches(images: jax.Array, side: int) -> jax.Array:
    """[batch, height, width, channels] to [batch, patches, pixels of a patch], both row by row."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // side, side, width // side, side, channels)
    return jnp.swapaxes(grid, 2, 3).reshape(batch, -1, side * side * channels)


_RULES: dict[type, jlora.ShardingRules] = {
    Mlp: ((r"hidden_\d+/kernel$", P("fsdp", "tensor")), (r"head/kernel$", P("fsdp")), (r"bias$", P())),
    PatchTransformer: (
        (r"(query|key|value|up)/kernel$", P("fsdp", "tensor")),
        (r"out/kernel$", P("tensor", None, "fsdp")),
        (r"down/kernel$", P("tensor", "fsdp")),
        (r"embed/kernel$", P(None, "fsdp")),
        (r"head/kernel$", P("fsdp")),
        (r"(bias|scale|positions)$", P()),
    ),
}
"""Where the weights of our own networks lie; a block's products come in pairs, divided by outputs, then by inputs."""

NEW_HEAD = jlora.LoraConfig(targets=(), train_also=HEADS)
EVERYTHING = jlora.LoraConfig(targets=(), train_also=(r".",))


def what_to_train(config: TrainConfig) -> jlora.LoraConfig:
    """What the mode of a configuration trains."""
    return {"lora": config.lora, "full": EVERYTHING, "head": NEW_HEAD}[config.mode]
