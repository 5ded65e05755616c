"""Adapters as Hugging Face's PEFT stores them, in both directions: PyTorch, vLLM and the hub read and write these.

>>> names = models.names(model)
>>> peft.save("my_adapter", names, params, adapters, config, base_model="FacebookAI/roberta-base")
>>> adapters, config = peft.load("my_adapter", names, params)

A folder has an ``adapter_config.json`` and an ``adapter_model.safetensors``. The name table (see
`jlora.files.tensor_names`; of a network of `jlora.models`, its `names`) says which PyTorch module each leaf is; nothing
is ever unpickled. Neither torch nor peft is needed.

An embedding that is also the output projection is one leaf here, and one adapter acts in both of its uses. PEFT has two
modules: `save` writes both, and `load` reads what trains both alike. For one of them alone, give the network a
projection of its own: ``models.load(path, untie=True)``.
"""

from jlora.peft.config import PeftError
from jlora.peft.read import load
from jlora.peft.write import save

__all__ = ["PeftError", "load", "save"]
