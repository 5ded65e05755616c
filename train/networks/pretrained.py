"""Networks of `jlora.models` with the weights of a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import models
from jlora.files.hub_files import CONFIG
from jlora.files.json_files import read_json
from jlora.files.quantized_tensors import scheme_of
from jlora.models import ModelError, Remat, TensorError
from train.config import CausalLM, ConfigError, ImageClassification, Pretrained, SequenceClassification, TaskConfig
from train.networks.network import Inputs, Network
from train.networks.tokenizers import load_tokenizer, set_up

TASKS: dict[type, models.TaskName] = {
    SequenceClassification: "sequence-classification",
    CausalLM: "causal-lm",
    ImageClassification: "image-classification",
}


def pretrained(
    config: Pretrained, task: TaskConfig, remat: Remat, *, tokenizer: bool = True, quantize: str | None = None
) -> Network:
    """The network of a checkpoint, with a new head if the task needs one. Does not read the weights yet.

    Args:
      tokenizer: whether to load the tokenizer of a task on texts.
      quantize: the scheme of the frozen weights; None for those of the checkpoint.

    Raises:
      ConfigError: if the task does not fit the network, or there is no tokenizer.
      ModelError, TensorError: if the checkpoint cannot be used.
    """
    stored = _stored_scheme(config)
    if quantize is not None and stored is not None:
        raise ConfigError(
            f"base.quantize: got {quantize!r}, expected None: {config.path} is quantized already ({stored}); pass "
            "--base.quantize None, or the original checkpoint as --model.path"
        )
    scheme = quantize or stored
    options = _options(config, task)
    dtype = jnp.dtype(config.param_dtype or "float32")
    model: Any = models.build(config.path, **options, param_dtype=dtype, remat=remat, attention=config.attention)

    def forward(params: Any, inputs: Inputs, key: jax.Array | None = None) -> Any:
        if key is None or not config.dropout:
            return model.apply(params, **inputs)
        return model.apply(params, **inputs, deterministic=False, rngs={"dropout": key})

    def load(key: jax.Array | None, shardings: Any = None) -> Any:
        return _load(config, {**options, "quantize": quantize}, key, shardings)

    def init(key: jax.Array) -> Any:
        inputs = models.example_inputs(model)
        params = {"params": model.init(key, inputs)["params"]}
        return params if scheme is None else jlora.quantize(params, scheme, jlora.trace(model.apply, params, inputs))

    network = {"load": load, "model": model, "source": config.path, "scheme": scheme}
    if isinstance(task, ImageClassification):
        return Network(forward, init, models.sharding_rules(model), **network, **_image_format(config))
    _check_length(task, model)
    loaded = set_up(load_tokenizer(config.path, config.revision), task) if tokenizer else None
    return Network(forward, init, models.sharding_rules(model), **network, tokenizer=loaded)


def stored_dtype(config: Pretrained) -> str:
    """The dtype of the weights, by config.json; float32 where it has none."""
    found = _config_json(config)
    return str(found.get("dtype") or found.get("torch_dtype") or "float32")


def _stored_scheme(config: Pretrained) -> str | None:
    """The scheme in which a checkpoint is stored."""
    quantization = _config_json(config).get("quantization_config")
    return None if quantization is None else scheme_of(quantization)


def _config_json(config: Pretrained) -> dict[str, Any]:
    return read_json(models.fetch(config.path, config.revision, (CONFIG,)) / CONFIG)


def checkpoint_side(config: Pretrained) -> int:
    """The side of a checkpoint's training images."""
    model: Any = models.build(config.path, task="image-classification", labels=1, revision=config.revision)
    return model.config.image_size


def _options(config: Pretrained, task: TaskConfig) -> dict[str, Any]:
    """The shared arguments of `models.build` and `models.load`."""
    return {
        "task": TASKS[type(task)],
        # A regression has one unnamed output.
        "labels": None if isinstance(task, CausalLM) else task.labels or 1,
        "dtype": jnp.dtype(config.dtype),
        "revision": config.revision,
        "untie": config.untie,
    }


def _load(config: Pretrained, options: dict[str, Any], key: jax.Array | None, shardings: Any) -> Any:
    has_head = options["labels"] is not None
    dtype = None if config.param_dtype is None else jnp.dtype(config.param_dtype)
    try:
        return models.load(
            config.path, **options, param_dtype=dtype, key=key if has_head else None, shardings=shardings
        )[1]
    except (ModelError, TensorError) as error:
        advice = "\nA new head must be trained: --lora.train-also classifier" if has_head and key is None else ""
        raise ConfigError(f"model.path: {error}{advice}") from error


def _check_length(task: SequenceClassification | CausalLM, model: Any) -> None:
    most = getattr(model.config, "max_length", None)
    if most is not None and task.max_length > most:
        raise ConfigError(
            f"task.max_length: got {task.max_length}, expected at most {most}, the network's number of positions; "
            f"pass --task.max-length {most}"
        )


def _image_format(config: Pretrained) -> dict[str, Any]:
    """A checkpoint's image normalization: mean and standard deviation of each channel, for values from 0 to 1."""
    file = models.fetch(config.path, config.revision) / "preprocessor_config.json"
    found = read_json(file) if file.is_file() else {}
    normalized = found.get("do_normalize", True)
    mean, std = (found.get("image_mean", 0.5), found.get("image_std", 0.5)) if normalized else (0.0, 1.0)
    # The checkpoint's are for values from 0 to 255 times its rescale_factor.
    white = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255
    return {"channels": 3, "mean": np.divide(mean, white), "std": np.divide(std, white)}
