"""Adapters in the format of Hugging Face's PEFT, which PyTorch, vLLM and the hub read.

- `save`: write adapters.
- `load`: read adapters written by PEFT or `save`.
- `PeftError`: an adapter that PEFT or jlora cannot represent.

>>> names = models.tensor_names(model)
>>> peft.save("my_adapter", names, params, adapters, config, base_model="FacebookAI/roberta-base")
>>> adapters, config = peft.load("my_adapter", names, params)

A folder has an ``adapter_config.json`` and an ``adapter_model.safetensors``. The name table (see
`jlora.files.tensor_names`; `models.tensor_names` for a network of `jlora.models`) maps each leaf to its PyTorch module.
Nothing is unpickled, and neither torch nor peft is needed.

An embedding that is also the output projection is one leaf here, and one adapter acts on both uses. In PEFT it is two
modules: `save` writes both, and `load` accepts adapters that train both alike. To adapt only one of them, load the
network with a separate projection: ``models.load(path, untie=True)``.
"""

from jlora.files.errors import PeftError
from jlora.peft.read import load
from jlora.peft.write import save

__all__ = ["PeftError", "load", "save"]
