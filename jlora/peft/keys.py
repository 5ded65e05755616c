"""Parses the keys of an adapter's file: the tensor of PyTorch's model, and the part of its update."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from jlora._src.types import Path as LeafPath
from jlora.files.safetensors import Tensor
from jlora.files.tensor_names import TensorNames, module_of
from jlora.peft import layout
from jlora.peft.config import PeftConfig
from jlora.peft.layout import Part

PREFIX = "base_model.model."
_FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, layout.SUFFIXES))})")
_ADAPTER = re.compile(
    r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)|(?<=\.lora_embedding_[AB])\.[^.]+$|(?<=\.lora_magnitude_vector)(\.[^.]+)?\.weight$"
)
"""The adapter's name in the keys of a model's ``state_dict()``, which `PeftModel.from_pretrained` also accepts."""
_COPY = re.compile(r"\.(original_module|modules_to_save)\.")


class Key(NamedTuple):
    """A parsed key.

    Attributes:
      weight: the tensor of PyTorch's model.
      suffix: what PEFT appends to the module's name for this factor; None for the tensor itself, stored whole.
    """

    weight: str
    suffix: str | None


class Spelling(NamedTuple):
    """How the adapter's tensor names differ from ours: theirs begin with ``cut``, ours with ``put``."""

    cut: str = ""
    put: str = ""

    def ours(self, name: str) -> str:
        return self.put + name.removeprefix(self.cut)

    def theirs(self, name: str) -> str:
        return self.cut + name.removeprefix(self.put)


class AdapterTensors(NamedTuple):
    """The tensors of a file by their place in our model.

    Attributes:
      layers: for each module with factors, by our name, its tensors.
      whole: the tensors that replace a weight, by our name.
      spelling: from the file's names to ours.
      leaves: the parameters or their shapes, at least for all leaves with a tensor.
    """

    layers: dict[str, dict[Part, Tensor]]
    whole: dict[str, Tensor]
    spelling: Spelling
    leaves: Mapping[LeafPath, Any]


def parse_keys(keys: Iterable[str], config: PeftConfig) -> dict[str, Key]:
    """The parsed keys, without PEFT's prefix and wrappers."""
    stems = {key: _ADAPTER.sub("", key.removeprefix(PREFIX).replace(".base_layer.", ".")) for key in keys}
    if config.modules_to_save:  # with bias="all" PEFT stores some biases again, under its wrapper's names
        stems = {key: stem for key, stem in stems.items() if not _COPY.search(stem)}
    return {
        key: Key(f"{match[1]}.weight", match[2]) if (match := _FACTOR.fullmatch(stem)) else Key(stem, None)
        for key, stem in stems.items()
    }


def find_spelling(weights: Iterable[str], ours: Mapping[str, Any]) -> Spelling:
    """The spelling that finds most of ``weights`` in ``ours``; unchanged names on a tie."""
    weights = set(weights)

    def first_parts(names: Iterable[str]) -> list[str]:
        return sorted({name.partition(".")[0] + "." for name in names})

    prefixed = (Spelling(put=part) for part in first_parts(ours))
    candidates = [Spelling(), *prefixed, *(Spelling(cut=part) for part in first_parts(weights))]
    return max(candidates, key=lambda s: sum(s.ours(weight) in ours for weight in weights))


def named_as(names: TensorNames, keys: Collection[str]) -> TensorNames:
    """The table with an adapter's names: those in PyTorch's model, or in checkpoint files.

    Older versions of transformers used the latter in the model too, and PEFT writes the names of the model.
    """
    stored = {path: name._replace(tensors=name.files) for path, name in names.items()}

    def known(table: TensorNames) -> int:
        modules = {module_of(tensor) for name in table.values() for tensor in name.tensors}
        return sum(any(f".{module}." in key for key in keys) for module in modules)

    return names if stored == names else max((names, stored), key=known)
