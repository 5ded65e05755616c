"""Maps each leaf of a parameter tree to PyTorch tensors, and their axes to ours.

One table serves loading, saving, merged export, and PEFT adapters in both directions. `jlora.models.tensor_names`
returns it for a network of `jlora.models`; for a model of your own, write it with the functions below, using the
parameter names of the PyTorch model:

>>> names = {**linear("params/Dense_0", "model.up"), **embedding("params/Embed_0", "model.tokens")}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from jlora._src.types import Path

ModuleKind = Literal["linear", "conv1d", "conv2d", "embedding", "array"]
"""The type of PyTorch module that a tensor belongs to; ``conv1d`` is the transposed linear layer of GPT-2."""

_FROM_TORCH: dict[str, tuple[int, ...]] = {"linear": (1, 0), "conv2d": (2, 3, 1, 0)}
"""PyTorch's axes in our order; other kinds have the same order."""


class TensorName(NamedTuple):
    """The PyTorch tensors of one leaf.

    Attributes:
      tensors: names in PyTorch's model, as in ``named_parameters()`` and PEFT: one, or one for each layer of a
        stacked leaf.
      kind: of the module, which determines the order of the axes; ``array`` for biases, norms and other non-matrices.
      stacked: whether the leaf has a leading axis of layers.
      stored: names in checkpoint files, if they differ; see `stored_as`.
      tied: of an embedding, the weights of linear layers that share its array: output projections such as ``lm_head``.
    """

    tensors: tuple[str, ...]
    kind: ModuleKind = "array"
    stacked: bool = False
    stored: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names in checkpoint files."""
        return self.stored or self.tensors


TensorNames: TypeAlias = Mapping[Path, TensorName]


class ModelTensorNames(dict[Path, TensorName]):
    """A table of tensor names, and the network's PyTorch class, which ``AutoPeftModel`` instantiates.

    Attributes:
      library: the Python module of the class.
      class_name: its name.
    """

    def __init__(self, names: TensorNames, library: str, class_name: str) -> None:
        super().__init__(names)
        self.library, self.class_name = library, class_name


def linear(path: Path, module: str, *, bias: bool = True, layers: int | None = None) -> dict[Path, TensorName]:
    """``kernel`` [in, out] and ``bias`` below ``path``, from ``torch.nn.Linear``, whose weight is [out, in].

    Args:
      path: of the module's parameters in our tree.
      module: the name of PyTorch's module; with ``layers``, ``{}`` in it is the layer's index.
      bias: whether the module has one.
      layers: of a stacked leaf, the size of its leading axis.
    """
    return _module(path, module, ("kernel", "linear"), bias, layers)


def conv1d(path: Path, module: str, *, layers: int | None = None) -> dict[Path, TensorName]:
    """As `linear`, from GPT-2's ``Conv1D``, whose weight is [in, out] like ours."""
    return _module(path, module, ("kernel", "conv1d"), True, layers)


def conv2d(path: Path, module: str, *, bias: bool = True) -> dict[Path, TensorName]:
    """``kernel`` [height, width, in, out] and ``bias``, from ``torch.nn.Conv2d``, [out, in, height, width]."""
    return _module(path, module, ("kernel", "conv2d"), bias, None)


def norm(path: Path, module: str, *, bias: bool = True, layers: int | None = None) -> dict[Path, TensorName]:
    """``scale`` and ``bias``, from ``torch.nn.LayerNorm``; without bias from an RMS norm."""
    return _module(path, module, ("scale", "array"), bias, layers)


def embedding(path: Path, module: str, *, tied: str | None = None) -> dict[Path, TensorName]:
    """``embedding`` [rows, features], from ``torch.nn.Embedding``.

    Args:
      path: of the module's parameters in our tree.
      module: the name of PyTorch's module.
      tied: the name of the linear layer that shares this table as its weight.
    """
    found = _module(path, module, ("embedding", "embedding"), False, None)
    if tied is None:
        return found
    return {leaf: name._replace(tied=(f"{tied}.weight",)) for leaf, name in found.items()}


def array(path: Path, tensor: str) -> dict[Path, TensorName]:
    """A leaf whose array is the same in PyTorch."""
    return {path: TensorName((tensor,))}


def stored_as(names: TensorNames, *replacements: tuple[str, str]) -> dict[Path, TensorName]:
    """The same table with different names in checkpoint files.

    Args:
      names: with the names in the model.
      replacements: pairs of a part of these names and its spelling in files, applied in order.
    """

    def in_file(tensor: str) -> str:
        return functools.reduce(lambda name, pair: name.replace(*pair), replacements, tensor)

    return {path: name._replace(stored=tuple(map(in_file, name.tensors))) for path, name in names.items()}


def _module(
    path: Path, module: str, weight: tuple[str, ModuleKind], bias: bool, layers: int | None
) -> dict[Path, TensorName]:
    leaf, kind = weight
    modules = (module,) if layers is None else tuple(module.format(i) for i in range(layers))
    stacked = layers is not None
    found = {f"{path}/{leaf}": TensorName(tuple(f"{m}.weight" for m in modules), kind, stacked)}
    if bias:
        found[f"{path}/bias"] = TensorName(tuple(f"{m}.bias" for m in modules), "array", stacked)
    return found


def torch_axes(kind: ModuleKind, ndim: int) -> tuple[int, ...]:
    """PyTorch's axes (one layer) in our order."""
    return _FROM_TORCH.get(kind, tuple(range(ndim)))


def from_torch(array: np.ndarray, kind: ModuleKind) -> np.ndarray:
    """One layer's array in our order of axes; a view."""
    return array.transpose(torch_axes(kind, array.ndim))


def to_torch(array: np.ndarray, kind: ModuleKind) -> np.ndarray:
    """One layer of our leaf in PyTorch's order of axes; a view. The inverse of `from_torch`."""
    return array.transpose(np.argsort(torch_axes(kind, array.ndim)))


def torch_shape(shape: tuple[int, ...], name: TensorName) -> tuple[int, ...]:
    """The shape of each PyTorch tensor of a leaf of shape ``shape``."""
    one = shape[1:] if name.stacked else shape
    return tuple(one[i] for i in np.argsort(torch_axes(name.kind, len(one))))


def to_tensor(leaf: Any, name: TensorName, layer: int) -> np.ndarray:
    """The PyTorch array of one of a leaf's tensors, ``name.tensors[layer]``."""
    return to_torch(np.asarray(leaf[layer] if name.stacked else leaf), name.kind)


class LayerOfLeaf(NamedTuple):
    """The part of a leaf for one PyTorch tensor: the layer at that index in ``name.tensors``."""

    path: Path
    name: TensorName
    layer: int


def by_tensor(names: TensorNames) -> dict[str, LayerOfLeaf]:
    """The part of a leaf for each PyTorch tensor of a table."""
    return {tensor: LayerOfLeaf(path, name, i) for path, name in names.items() for i, tensor in enumerate(name.tensors)}


def module_of(tensor: str) -> str:
    """The PyTorch module whose weight or bias is the tensor."""
    return tensor.rpartition(".")[0]
