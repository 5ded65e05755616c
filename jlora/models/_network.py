"""From a configuration to a network; where its files, its names and its shapes are."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jlora._src.paths import nearest
from jlora._src.tree.sharding import ShardingRules
from jlora._src.types import Array, PyTree
from jlora.files.safetensors import read_json
from jlora.files.tensor_names import ModelNames
from jlora.models._family import Family, ModelConfig, ModelError, Task, ending_of, task_of
from jlora.models._layers import Remat
from jlora.models._registry import FAMILIES

FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
GENERATION = "generation_config.json"
EXAMPLE = (1, 8)


def build(
    config: str | Path | Mapping[str, Any],
    *,
    task: Task | None = None,
    labels: int | Sequence[str] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    remat: Remat = "none",
    revision: str | None = None,
    untie: bool = False,
) -> nn.Module:
    """The network alone, from a folder, the id of a model on the hub, or the content of a config.json.

    The arguments are those of `load`. Its parameters' shapes are `abstract`'s; ``model.init`` draws new ones.
    """
    if isinstance(config, Mapping):
        return network_of(*family_of(config, task, labels, untie=untie), dtype, param_dtype, remat)
    folder = fetch(config, revision, FILES[:1])
    return network_of(*described(folder, task, labels, untie=untie), dtype, param_dtype, remat)


def names(model: nn.Module) -> ModelNames:
    """Where each leaf of a network lies in transformers 5 and in checkpoints; see `jlora.files.tensor_names`."""
    family, task = family_and_task(model)
    config: ModelConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
    kind = json.loads(config.hf)["model_type"]
    library = f"transformers.models.{kind}.modeling_{kind}"
    return ModelNames(family.names(config, task), library, class_of(family, task))


def sharding_rules(model: nn.Module) -> ShardingRules:
    """How the parameters of a network of `jlora.models` are split over a mesh; see `jlora.shardings`.

    The first linear layer of a pair is split over the mesh axis ``tensor`` by its outputs, the second by its inputs
    (Shoeybi et al. 2019), and both over ``fsdp`` along the other axis (Rajbhandari et al. 2020). Large vocabularies are
    split over ``tensor``; norms, and biases that are added after a sum over ``tensor``, are whole on every device. A
    third axis ``data`` is for batches alone: place them with ``P(("data", "fsdp"))``, and activations stay so.

    >>> mesh = jax.make_mesh((1, 8, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    >>> model = build(path)
    >>> places = jlora.shardings(abstract(model), mesh, sharding_rules(model))
    >>> model, params = load(path, shardings=places)

    The axes are Auto: with Explicit ones a program has to say where its products lie, and the networks do not.
    """
    family, _ = family_and_task(model)
    paths = names(model)
    return tuple(rule for rule in family.rules if any(re.search(rule[0], path) for path in paths))


def abstract(model: nn.Module) -> PyTree:
    """The shapes and dtypes of a network's parameters, as ``model.init`` would make them, from no computation."""
    return jax.eval_shape(lambda: draw(model, jax.random.key(0)))


def example_inputs(model: nn.Module, shape: tuple[int, int] = EXAMPLE) -> Array:
    """A small input of a network, of zeros: tokens of ``shape`` [batch, length], no more than it has positions for, or
    as many images."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(config, "image_size"):
        return jnp.zeros((shape[0], config.image_size, config.image_size, config.num_channels))
    most = getattr(config, "max_length", None)
    return jnp.zeros(shape if most is None else (shape[0], min(shape[1], most)), jnp.int32)


def fetch(path: str | Path, revision: str | None = None, files: Sequence[str] = FILES) -> Path:
    """The folder of a checkpoint: ``path`` itself, or where the files of that id on the hub were put.

    Raises:
      ModelError: if it is neither, or an id without huggingface_hub to download it.
    """
    if (folder := Path(path)).is_dir():
        return folder
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError as error:
        raise ModelError(
            f"{str(path)!r} is not a folder here, and a download from the hub needs huggingface_hub; run: "
            'pip install "jlora[hub]"'
        ) from error

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ModelError(
            f"{str(path)!r} is no folder here, and as a model on the hub it could not be had: "
            f"{str(error).splitlines()[0]} Expected a folder with config.json and model.safetensors, or an id such as "
            "`FacebookAI/roberta-base`; without a network, fetch it elsewhere and give its folder."
        ) from error


def family_and_task(model: nn.Module) -> tuple[Family, Task]:
    """The family of a network of `jlora.models`, and what it ends in.

    Raises:
      ModelError: if it is of none.
    """
    model_type = json.loads(getattr(getattr(model, "config", None), "hf", "{}")).get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(f"{type(model).__name__} is no network of jlora.models; expected one that load or build made")
    family = FAMILIES[model_type]
    return family, next(task for task, network in family.networks.items() if type(model) is network)


def described(
    folder: Path, task: Task | None, labels: int | Sequence[str] | None, *, untie: bool = False
) -> tuple[Family, ModelConfig, Task]:
    """What a checkpoint's config.json describes; raises as `family_of`, naming the file."""
    file = folder / "config.json"
    try:
        family, config, task = family_of(read_json(file), task, labels, untie=untie)
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error
    return family, with_generation(config, folder), task


def family_of(
    hf: Mapping[str, Any], task: Task | None, labels: int | Sequence[str] | None, *, untie: bool = False
) -> tuple[Family, ModelConfig, Task]:
    """What the content of a config.json describes; ``task``, ``labels`` and ``untie`` override what it says.

    Raises:
      ModelError: if it is no network that there is here, or has no such task, labels or head.
    """
    kind = str(hf.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"model_type = {kind!r} is no network that jlora.models has{nearest(kind, FAMILIES)}; expected one of "
            f"{', '.join(sorted(FAMILIES))}. jlora.lora adapts any other network in JAX that you have."
        )
    family = FAMILIES[kind]
    if (quantized := hf.get("quantization_config")) is not None:
        method = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ModelError(
            f"quantization_config: the checkpoint is quantized ({method!r}). Expected plain weights: load the "
            "checkpoint that it was made from."
        )
    hf = {name: value for name, value in hf.items() if name != "quantization_config"}
    if labels is not None:
        words = [f"LABEL_{i}" for i in range(labels)] if isinstance(labels, int) else list(labels)
        if not words or len(set(words)) != len(words):
            raise ModelError(f"labels = {labels!r}; expected how many there are, or their names, each once")
        ids = {
            "id2label": {str(i): word for i, word in enumerate(words)},
            "label2id": {w: i for i, w in enumerate(words)},
        }
        hf = {**{n: v for n, v in hf.items() if n != "num_labels"}, **ids}
    config = family.config({**hf, "tie_word_embeddings": False} if untie else hf)
    task = task or task_of(hf)
    if task not in family.networks:
        raise ModelError(
            f"{kind} has no network for the task {task!r}; expected one of {', '.join(family.networks)}: pass task=..."
        )
    if untie and task != "causal-lm":
        raise ModelError(f"untie: a network for {task!r} has no output projection that could be tied; leave it out")
    return family, config, task


def with_generation(config: ModelConfig, folder: Path) -> ModelConfig:
    """The configuration with the content of the folder's generation_config.json, for whoever writes the network."""
    file = folder / GENERATION
    return dataclasses.replace(config, generation=json.dumps(read_json(file))) if file.is_file() else config


def network_of(
    family: Family, config: ModelConfig, task: Task, dtype: Any, param_dtype: Any, remat: Remat
) -> nn.Module:
    """The network of a family for a task."""
    return family.networks[task](config, dtype=dtype, param_dtype=param_dtype, remat=remat)


def class_of(family: Family, task: Task) -> str:
    """The class of transformers that a config.json names."""
    if task == "causal-lm" and family.architecture == "GPT2":
        return "GPT2LMHeadModel"
    return family.architecture + ending_of(task)


def draw(model: nn.Module, key: Array) -> PyTree:
    """New parameters of a network."""
    return {"params": model.init(key, example_inputs(model))["params"]}
