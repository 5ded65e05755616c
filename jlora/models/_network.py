"""Networks from configurations, and a network's tensor names, shardings, shapes and inputs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora._src.tree.sharding import ShardingRules
from jlora._src.types import Array, PyTree
from jlora.files.buckets import download, is_in_bucket, located, text
from jlora.files.errors import ModelError
from jlora.files.hub_files import CHECKPOINT_PATTERNS, CONFIG, GENERATION_CONFIG, JSON_PATTERN, WEIGHTS, read_optional
from jlora.files.json_files import read_json
from jlora.files.quantized_tensors import why_unsupported
from jlora.files.tensor_names import ModelTensorNames, TensorNames
from jlora.messages import nearest
from jlora.models._family import Family, ModelConfig, TaskName, ending_of, task_of
from jlora.models._layers import Remat
from jlora.models._registry import FAMILIES
from jlora.models.attention.mask import AttentionForm

Labels: TypeAlias = int | Sequence[str] | None
"""A classifier's number of labels, or their names; None for the checkpoint's."""

_EXAMPLE_SHAPE = (1, 8)


class Architecture(NamedTuple):
    """The network described by a config.json."""

    family: Family
    config: ModelConfig
    task: TaskName

    def network(self, dtype: Any, param_dtype: Any, remat: Remat, attention: AttentionForm) -> nn.Module:
        """The network."""
        options: Any = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "attention": attention}
        return self.family.networks[self.task](self.config, **options)

    def tensor_names(self) -> TensorNames:
        """The tensor names of the network's leaves."""
        return self.family.tensor_names(self.config, self.task)

    @property
    def class_name(self) -> str:
        """The name of the network's class in transformers."""
        if self.task == "causal-lm" and self.family.architecture == "GPT2":
            return "GPT2LMHeadModel"
        return self.family.architecture + ending_of(self.task)


def build(
    config: str | Path | Mapping[str, Any],
    *,
    task: TaskName | None = None,
    labels: Labels = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = "none",
    attention: AttentionForm = "auto",
    revision: str | None = None,
    untie: bool = False,
) -> nn.Module:
    """Build the network alone, from a folder, the id of a model on the hub, or the content of a config.json.

    >>> model = build("../shared/models/minilm-l6", task="sequence-classification", labels=2)

    Arguments and errors as for `load`. `abstract` returns the shapes of its parameters, and ``model.init``
    draws new ones.
    """
    if isinstance(config, Mapping):
        return architecture_of(config, task, labels, untie=untie).network(dtype, param_dtype, remat, attention)
    folder = fetch(config, revision, (JSON_PATTERN,))
    return read_architecture(folder, task, labels, untie=untie).network(dtype, param_dtype, remat, attention)


def tensor_names(model: nn.Module) -> ModelTensorNames:
    """The PyTorch names of a network's leaves, in transformers 5 and in checkpoints; see `jlora.files.tensor_names`.

    Raises:
      ModelError: if the network is not one of `jlora.models`.
    """
    found = architecture(model)
    kind = found.config.attributes["model_type"]
    return ModelTensorNames(found.tensor_names(), f"transformers.models.{kind}.modeling_{kind}", found.class_name)


def sharding_rules(model: nn.Module) -> ShardingRules:
    """The sharding rules of a network of `jlora.models`; see `jlora.shardings`.

    The first linear layer of a pair is split over the mesh axis ``tensor`` along its outputs, the second along its
    inputs (Shoeybi et al. 2019), and both over ``fsdp`` along the other axis (Rajbhandari et al. 2020). Large
    vocabularies are split over ``tensor``; norms, and biases that are added after a sum over ``tensor``, are
    replicated. A third axis ``data`` splits only batches: place them with ``P(("data", "fsdp"))``, and activations
    follow.

    >>> mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    >>> model = build(path)
    >>> places = jlora.shardings(abstract(model), mesh, sharding_rules(model))
    >>> model, params = load(path, shardings=places)

    The axes must be Auto: with Explicit axes a program must state the shardings of its products, and these networks
    do not.

    Raises:
      ModelError: if the network is not one of `jlora.models`.
    """
    paths = tensor_names(model)
    return tuple(
        rule for rule in architecture(model).family.sharding_rules if any(re.search(rule[0], path) for path in paths)
    )


def abstract(model: nn.Module) -> PyTree:
    """The shapes and dtypes of a network's parameters, without computing them."""
    return jax.eval_shape(lambda: draw(model, jax.random.key(0)))


def example_inputs(model: nn.Module, shape: tuple[int, int] = _EXAMPLE_SHAPE) -> Array:
    """A small input of zeros: tokens int32 of ``shape`` [batch, length], cut to the network's maximum length; or a
    batch of images, float32 [batch, height, width, channels]."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(config, "image_size"):
        return jnp.zeros((shape[0], config.image_size, config.image_size, config.num_channels))
    most = getattr(config, "max_length", None)
    return jnp.zeros(shape if most is None else (shape[0], min(shape[1], most)), jnp.int32)


def fetch(path: str | Path, revision: str | None = None, files: Sequence[str] = CHECKPOINT_PATTERNS) -> Path:
    """The folder of a checkpoint: ``path`` itself, or a download from a bucket or of the model with that id on the hub.

    Args:
      path: a folder, a URL as ``gs://bucket/folder``, or an id.
      revision: of a model on the hub: branch, tag or commit.
      files: patterns of the files to download.

    Raises:
      ModelError: if there is no such folder and the download fails, or huggingface_hub is not installed.
      TensorError: for a URL, if gcsfs is not installed.
    """
    if is_in_bucket(path):
        try:
            return download(located(path), files=files)
        except OSError as error:
            raise ModelError(f"{text(path)} cannot be downloaded: {error}") from error
    if (folder := Path(path)).is_dir():
        return folder
    if folder.is_absolute() or str(path).startswith((".", "~")) or str(path).count("/") > 1:  # never an id
        siblings = sorted(str(one) for one in folder.parent.glob("*") if one.is_dir())
        raise ModelError(
            f"there is no folder {str(path)!r}{nearest(str(path), siblings)}; expected a folder with {CONFIG} and "
            f"{WEIGHTS}, or an id such as `FacebookAI/roberta-base`"
        )
    hub = import_hub(f"{str(path)!r} is not a local folder, and a download from the hub")
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hub.snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{str(path)!r} is not a folder, and could not be downloaded from the hub: {str(error).splitlines()[0]} "
            f"Expected a folder with {CONFIG} and {WEIGHTS}, or an id such as `FacebookAI/roberta-base`; without a "
            "network, download it elsewhere and pass its folder."
        ) from error


def import_hub(what: str) -> Any:
    """The package huggingface_hub, imported on use: it is optional, and slow to import.

    Raises:
      ModelError: if it is not installed; the message starts with ``what``.
    """
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise ModelError(f'{what} needs huggingface_hub; run: pip install "jlora[hub]"') from error
    return huggingface_hub


def architecture(model: nn.Module) -> Architecture:
    """The architecture of a network.

    Raises:
      ModelError: if it is not a network of `jlora.models`.
    """
    config: Any = getattr(model, "config", None)
    model_type: Any = config.attributes.get("model_type") if isinstance(config, ModelConfig) else None
    if model_type not in FAMILIES:
        raise ModelError(f"{type(model).__name__} is not a network of jlora.models; expected one from load or build")
    family = FAMILIES[model_type]
    return Architecture(family, config, next(task for task, kind in family.networks.items() if type(model) is kind))


def read_architecture(folder: Path, task: TaskName | None, labels: Labels, *, untie: bool = False) -> Architecture:
    """The architecture of a checkpoint; raises as `architecture_of`, naming the file."""
    try:
        found = architecture_of(read_json(folder / CONFIG), task, labels, untie=untie)
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG}: {error}") from error
    generation = read_optional(folder, GENERATION_CONFIG)
    if generation is None:
        return found
    return found._replace(config=dataclasses.replace(found.config, generation=json.dumps(generation)))


def architecture_of(
    hf: Mapping[str, Any], task: TaskName | None, labels: Labels, *, untie: bool = False
) -> Architecture:
    """The architecture described by a config.json; ``task``, ``labels`` and ``untie`` override it.

    Raises:
      ModelError: if the network is unknown, or lacks the task, labels or head.
    """
    family = _family_of(hf)
    hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    if labels is not None:
        hf = {**{name: value for name, value in hf.items() if name != "num_labels"}, **_label_ids(labels)}
    config = family.config({**hf, "tie_word_embeddings": False} if untie else hf)
    task = task or task_of(hf)
    if task not in family.networks:
        raise ModelError(
            f"{hf['model_type']} has no network for the task {task!r}; expected one of {', '.join(family.networks)}: "
            "pass task=..."
        )
    if untie and task != "causal-lm":
        raise ModelError(f"untie: a network for {task!r} has no tied output projection; leave it out")
    return Architecture(family, config, task)


def _family_of(hf: Mapping[str, Any]) -> Family:
    """The family of a config.json; raises a ModelError if there is none, or its weights are quantized in another way
    than those that `load` reads."""
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type = {kind!r} is not a network of jlora.models{nearest(kind, FAMILIES)}; expected one of "
            f"{', '.join(sorted(FAMILIES))}. jlora.lora adapts any other JAX network."
        )
    if (quantized := hf.get("quantization_config")) is not None and (why := why_unsupported(quantized)):
        raise ModelError(
            f"quantization_config: {why}. Expected plain weights, NF4 or int8 of bitsandbytes, or float8 with scales: "
            "load the original checkpoint."
        )
    return FAMILIES[kind]


def _label_ids(labels: int | Sequence[str]) -> dict[str, dict[str, Any]]:
    """The attributes of a config.json that name labels."""
    words = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
    if not words or len(set(words)) != len(words):
        raise ModelError(f"labels = {labels!r}; expected a number, or distinct names")
    return {
        "id2label": {str(i): word for i, word in enumerate(words)},
        "label2id": {word: i for i, word in enumerate(words)},
    }


def draw(model: nn.Module, key: Array) -> PyTree:
    """New parameters of a network."""
    return {"params": model.init(key, example_inputs(model))["params"]}
