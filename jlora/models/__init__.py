"""Networks for Hugging Face checkpoints, in Flax Linen: `load` one, adapt it with `jlora.lora`, `save` it back.

A family is a folder with the network (``modeling``) and the names of its tensors (``table``). The networks know
nothing of LoRA; any other model in JAX is adapted just as well.
"""

from jlora._tensors import TensorError
from jlora.models._checkpoint import abstract, build, example_inputs, fetch, load, names, save
from jlora.models._export import export
from jlora.models._family import ModelError, Task
from jlora.models._generate import generate

__all__ = [
    "ModelError",
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
    "save",
]
