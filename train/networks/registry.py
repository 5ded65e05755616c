"""The network of a configuration."""

from __future__ import annotations

from jlora.models import ModelError, TensorError
from train.config import ConfigError, ImageClassification, Pretrained, TrainConfig
from train.networks.network import Network
from train.networks.pretrained import pretrained
from train.networks.scratch import from_scratch


def make_network(config: TrainConfig, *, tokenizer: bool = True) -> Network:
    """The network of a configuration completed by `train.tasks.registry.resolved`. Does not read the weights yet.

    Raises:
      ConfigError: if a checkpoint cannot be used.
    """
    remat = config.compute.remat
    if not isinstance(config.model, Pretrained):
        assert isinstance(config.task, ImageClassification)
        return from_scratch(config.model, config.task, remat)
    try:
        return pretrained(config.model, config.task, remat, tokenizer=tokenizer, quantize=config.quantize)
    except (ModelError, TensorError) as error:
        raise ConfigError(f"model.path: {error}") from error
