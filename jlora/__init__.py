"""LoRA for any JAX program: a pure transform of parameter trees. See the README for the first five lines."""

from jlora import _serialize as _serialize
from jlora._interpret import MaterializeError, MaterializeWarning
from jlora._product import low_rank_product
from jlora._types import Adapters, Axes, FullWeight, LoraFactors, LoraWeight, Target, Use, WeightUse
from jlora.apply import Explanation, explain, lora
from jlora.attach import attach, detach
from jlora.checkpoint import load, save
from jlora.config import LoraConfig, Rule
from jlora.init import init
from jlora.merge import Rounding, merge, rounding, unmerge
from jlora.optim import combine, freeze, labels, partition, trainable_mask
from jlora.sharding import Rules, adapter_shardings, shardings
from jlora.stack import stack, unstack
from jlora.targets import Plan, plan
from jlora.trace import trace

__version__ = "0.1.0"

__all__ = [
    "Adapters",
    "Axes",
    "Explanation",
    "FullWeight",
    "LoraConfig",
    "LoraFactors",
    "LoraWeight",
    "MaterializeError",
    "MaterializeWarning",
    "Plan",
    "Rounding",
    "Rule",
    "Rules",
    "Target",
    "Use",
    "WeightUse",
    "adapter_shardings",
    "attach",
    "combine",
    "detach",
    "explain",
    "freeze",
    "init",
    "labels",
    "load",
    "lora",
    "low_rank_product",
    "merge",
    "partition",
    "plan",
    "rounding",
    "save",
    "shardings",
    "stack",
    "trace",
    "trainable_mask",
    "unmerge",
    "unstack",
]
