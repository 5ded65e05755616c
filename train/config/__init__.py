"""The configuration of a run, the schema of the files in ``configs/``.

``fields``    types with constraints, and the check of every field
``tasks``     classification, regression, language modelling
``networks``  checkpoints, and networks trained from scratch
``sweep``     several trainings in one program
``training``  data, training, devices, checkpoints; `TrainConfig` holds them all

Each field is declared once: its type with its constraint, its default, and below it the text of ``--help``. Constraints
between fields are in the method `conflicts` of their dataclass.
"""

from pathlib import Path

from jlora import LoraConfig
from train.config.fields import ConfigError, flag, refuse
from train.config.networks import Mlp, NetworkConfig, PatchTransformer, Pretrained
from train.config.sweep import SweepConfig
from train.config.tasks import CausalLM, Domain, ImageClassification, SequenceClassification, TaskConfig
from train.config.training import (
    EVERYTHING,
    NEW_HEAD,
    ComputeConfig,
    DataConfig,
    FitConfig,
    FrozenBase,
    LearningRates,
    ProcessesConfig,
    Remat,
    SaveConfig,
    Schedule,
    TrainConfig,
)

ASSETS = Path(__file__).resolve().parents[1] / "assets"

__all__ = [
    "ASSETS",
    "EVERYTHING",
    "NEW_HEAD",
    "CausalLM",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "Domain",
    "FitConfig",
    "FrozenBase",
    "ImageClassification",
    "LearningRates",
    "LoraConfig",
    "Mlp",
    "NetworkConfig",
    "PatchTransformer",
    "Pretrained",
    "ProcessesConfig",
    "Remat",
    "SaveConfig",
    "Schedule",
    "SequenceClassification",
    "SweepConfig",
    "TaskConfig",
    "TrainConfig",
    "flag",
    "refuse",
]
