"""Networks for Hugging Face checkpoints, in Flax Linen: `load` one, adapt it with `jlora.lora`, `save` it back.

A family is a folder with the network (``modeling``) and the names of its tensors (``table``). The networks know
nothing of LoRA; any other model in JAX is adapted just as well.
"""

from jlora.files.safetensors import TensorError
from jlora.models._checkpoint import load, save
from jlora.models._export import export
from jlora.models._family import ModelError, Task
from jlora.models._generate import generate
from jlora.models._layers import Remat, recomputed
from jlora.models._network import abstract, build, example_inputs, fetch, names, sharding_rules

__all__ = [
    "ModelError",
    "Remat",
    "Task",
    "TensorError",
    "abstract",
    "build",
    "example_inputs",
    "export",
    "fetch",
    "generate",
    "load",
    "names",
    "recomputed",
    "sharding_rules",
    "save",
]
