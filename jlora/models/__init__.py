"""Networks for Hugging Face checkpoints, in Flax Linen: BERT, RoBERTa, ViT, GPT-2, Llama, Mistral, Qwen and Gemma.

- `load`, `save`: convert a checkpoint to a network and its parameters, and back.
- `build`: the network alone, from a checkpoint or a configuration.
- `export`: a merged checkpoint with tokenizer and model card.
- `extract`: adapters from a fully fine-tuned checkpoint and its base.
- `generate`: text from a language model, compiled once.
- `tensor_names`: the PyTorch names of a network's leaves, for `jlora.peft`.
- `sharding_rules`: rules that split its parameters over a mesh.
- `abstract`, `example_inputs`: the shapes of its parameters, and a small input.
- `fetch`: the folder of a checkpoint, downloaded if necessary.
- `TokenLosses`: what a language model returns for labels.
- `ModelError`, `TensorError`: a network or a file that cannot be used.
- `TaskName`, `Remat`, `AttentionForm`: the values of ``task``, ``remat`` and ``attention``.

Each family is a folder with its network (``modeling``) and tensor names (``table``). The networks contain no LoRA code;
`jlora.lora` adapts any other JAX model too.
"""

from jlora.files.errors import ModelError, TensorError
from jlora.models._checkpoint import load, save
from jlora.models._export import export
from jlora.models._extract import Extraction, extract
from jlora.models._family import TaskName
from jlora.models._generate import generate
from jlora.models._layers import Remat, recomputed
from jlora.models._loss import TokenLosses
from jlora.models._network import abstract, build, example_inputs, fetch, sharding_rules, tensor_names
from jlora.models.attention.mask import AttentionForm

__all__ = [
    "AttentionForm",
    "Extraction",
    "ModelError",
    "Remat",
    "TaskName",
    "TensorError",
    "TokenLosses",
    "abstract",
    "build",
    "example_inputs",
    "export",
    "extract",
    "fetch",
    "generate",
    "load",
    "recomputed",
    "save",
    "sharding_rules",
    "tensor_names",
]
