"""LoRA for any JAX program: a pure transform of parameter trees. See the README for the first five lines."""

from jlora._src.config import LoraConfig, Override
from jlora._src.engine.interpreter import MaterializeError, MaterializeWarning
from jlora._src.engine.lora import Explanation, explain, lora
from jlora._src.engine.product import low_rank_product
from jlora._src.engine.trace import trace
from jlora._src.tree import serialize as serialize
from jlora._src.tree.attach import attach, detach
from jlora._src.tree.init import init
from jlora._src.tree.labels import combine, freeze, labels, partition, trainable_mask
from jlora._src.tree.merge import Rounding, merge, rounding, unmerge
from jlora._src.tree.plan import Plan, plan
from jlora._src.tree.save import load, save
from jlora._src.tree.sharding import ShardingRules, adapter_shardings, shardings
from jlora._src.tree.stack import stack, unstack
from jlora._src.types import Adapters, Axes, FullWeight, LoraFactors, LoraWeight, Target, Use, WeightUse

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
    "Override",
    "ShardingRules",
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
