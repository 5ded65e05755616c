# ruff: noqa: I001  (the README's order)
"""Every public name, in the README's order. `jlora` imports this at once if jax is there, else with its first use."""

# What to adapt, and fresh adapters.
from jlora._src.config import HEADS, LoraConfig, Override
from jlora._src.engine.trace import trace
from jlora._src.tree.plan import Plan, plan
from jlora._src.tree.init import init

# Adapters that start from the weights, or from data.
from jlora._src.inits.decompose import decompose
from jlora._src.inits.moments import InputMoments, input_moments
from jlora._src.inits.plain import to_plain

# The adapted model.
from jlora._src.engine.lora import lora
from jlora._src.tree.attach import attach, detach

# Adapters in terms of other trained values.
from jlora._src.updates.rule import UpdateRule
from jlora._src.updates.tied import TiedLora, tied_lora
from jlora._src.updates.vera import Vera, vera

# Optimizers over a whole tree.
from jlora._src.tree.labels import combine, freeze, labels, partition, trainable_mask

# Merged weights, and several adapters.
from jlora._src.tree.merge import Rounding, merge, rounding, unmerge
from jlora._src.tree.stack import stack, unstack
from jlora._src.tree.select import select
from jlora._src.engine.rows import per_row
from jlora._src.tree.pool import AdapterPool

# Algebra: adapters combined, extracted, shortened, compared.
from jlora._src.algebra.weighted import add_weighted
from jlora._src.algebra.extract import EnergyKept, extract
from jlora._src.algebra.linear import negate, rescale, truncate
from jlora._src.algebra.measures import cosine, distance, norms

# A base in few bits.
from jlora._src.quantization.scheme import Scheme
from jlora._src.quantization.tree import dequantize, quantize
from jlora._src.quantization.array import quantize_array
from jlora._src.quantization.loss import QuantizationLoss, quantization_loss
from jlora._src.quantization.qwix import from_qwix
from jlora._src.quantized import QuantizedArray

# Running a model with its adapters.
from jlora._src.engine.lora import Explanation, explain
from jlora._src.engine.interpreter import MaterializeError, MaterializeWarning
from jlora._src.engine.factors.adapted_product import checkpoint_policy
from jlora._src.engine.factors.product import low_rank_product

# On disk, and on a mesh.
from jlora._src.tree.save import load, save
from jlora._src.tree.sharding import ShardingRules, adapter_shardings, shardings

# Paths and types.
from jlora._src.paths import named_leaves, path_key
from jlora._src.types import (
    Adapters,
    Axes,
    FullWeight,
    LoraFactors,
    LoraWeight,
    RowAdapters,
    RowWeight,
    Target,
    Use,
    WeightUse,
)

# Registers the types with jax.export and flax.serialization.
from jlora._src.tree import serialize as _serialize  # noqa: F401

__all__ = [
    # What to adapt, and fresh adapters.
    "HEADS",
    "LoraConfig",
    "Override",
    "trace",
    "Plan",
    "plan",
    "init",
    # Adapters that start from the weights, or from data.
    "decompose",
    "InputMoments",
    "input_moments",
    "to_plain",
    # The adapted model.
    "lora",
    "attach",
    "detach",
    # Adapters in terms of other trained values.
    "UpdateRule",
    "TiedLora",
    "tied_lora",
    "Vera",
    "vera",
    # Optimizers over a whole tree.
    "combine",
    "freeze",
    "labels",
    "partition",
    "trainable_mask",
    # Merged weights, and several adapters.
    "Rounding",
    "merge",
    "rounding",
    "unmerge",
    "stack",
    "unstack",
    "select",
    "per_row",
    "AdapterPool",
    # Algebra: adapters combined, extracted, shortened, compared.
    "add_weighted",
    "EnergyKept",
    "extract",
    "negate",
    "rescale",
    "truncate",
    "cosine",
    "distance",
    "norms",
    # A base in few bits.
    "Scheme",
    "dequantize",
    "quantize",
    "quantize_array",
    "QuantizationLoss",
    "quantization_loss",
    "from_qwix",
    "QuantizedArray",
    # Running a model with its adapters.
    "Explanation",
    "explain",
    "MaterializeError",
    "MaterializeWarning",
    "checkpoint_policy",
    "low_rank_product",
    # On disk, and on a mesh.
    "load",
    "save",
    "ShardingRules",
    "adapter_shardings",
    "shardings",
    # Paths and types.
    "named_leaves",
    "path_key",
    "Adapters",
    "Axes",
    "FullWeight",
    "LoraFactors",
    "LoraWeight",
    "RowAdapters",
    "RowWeight",
    "Target",
    "Use",
    "WeightUse",
]
