"""File names in a Hugging Face folder (a checkpoint or an adapter), and a reader of its JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jlora.files.json_files import read_json

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_PATTERN = "model{suffix}.safetensors"
MODEL_CARD = "README.md"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
VOCABULARY = "vocab.json"
TOKENIZER_FILES = (
    ADDED_TOKENS,
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    PREPROCESSOR_CONFIG,
    SPECIAL_TOKENS,
    "spiece.model",
    TOKENIZER,
    "tokenizer.model",
    TOKENIZER_CONFIG,
    VOCABULARY,
    "vocab.txt",
)
"""Files of a tokenizer or an image processor."""

JSON_PATTERN = "*.json"
CHECKPOINT_PATTERNS = (JSON_PATTERN, "*.safetensors", "*.txt", "*.model", "*.jinja")
"""Patterns of the files to download from a model on the hub."""

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_optional(folder: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in a file of ``folder``, or None if there is no such file.

    Raises:
      TensorError: if the file holds no JSON object.
    """
    return read_json(folder / name) if (folder / name).is_file() else None


def pickled_files(folder: Path) -> list[str]:
    """The names of the files in ``folder`` that hold pickled weights."""
    return sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
