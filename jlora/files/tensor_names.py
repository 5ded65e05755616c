"""Where a leaf lies in the PyTorch world: its tensor names there, and how the array is laid out.

One table of these serves loading, saving, merged export and PEFT adapters in both directions. The families of
`jlora.models` bring theirs (`jlora.models.names`); for a model of your own, write one with the functions below, by the
names that the parameters have in PyTorch's model:

>>> names = {**linear("params/Dense_0", "model.up"), **embedding("params/Embed_0", "model.tokens")}
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from jlora._src.types import Path

Kind = Literal["linear", "conv1d", "conv2d", "embedding", "array"]
"""The PyTorch module that a weight belongs to; ``conv1d`` is the transposed linear layer of GPT-2."""

_FROM_TORCH: dict[str, tuple[int, ...]] = {"linear": (1, 0), "conv2d": (2, 3, 1, 0)}
"""The axes of PyTorch's array, in the order in which ours has them; those of other kinds stay as they are."""


class TensorName(NamedTuple):
    """Where one leaf lies.

    Attributes:
      tensors: names in PyTorch's model, as ``named_parameters()`` gives them, by which PEFT goes too: one, or one for
        each layer of a stacked leaf.
      kind: of the module, which says how its array is laid out; ``array`` for biases, norms and all that is no matrix.
      stacked: whether the leaf has a leading axis of layers.
      stored: names in checkpoint files, where they are others; see `stored_as`.
      tied: of an embedding, the weights of linear layers that are this same array: output projections, as ``lm_head``.
    """

    tensors: tuple[str, ...]
    kind: Kind = "array"
    stacked: bool = False
    stored: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """The names in checkpoint files."""
        return self.stored or self.tensors


TensorNames: TypeAlias = Mapping[Path, TensorName]


class ModelNames(dict[Path, TensorName]):
    """The table of a network that knows its class in PyTorch too, so that others can make the model by it.

    Attributes:
      library: the module that has the class.
      class_name: its name there.
    """

    def __init__(self, names: TensorNames, library: str, class_name: str) -> None:
        super().__init__(names)
        self.library, self.class_name = library, class_name


def linear(path: Path, module: str, *, bias: bool = True, layers: int | None = None) -> dict[Path, TensorName]:
    """``kernel`` [in, out] and ``bias`` below ``path``, of ``torch.nn.Linear``, whose weight is [out, in].

    Args:
      path: of the module's parameters in our tree.
      module: the name of PyTorch's module; with ``layers``, ``{}`` in it stands for the number of the layer.
      bias: whether there is one.
      layers: the size of the leading axis of a stacked leaf.
    """
    return _module(path, module, ("kernel", "linear"), bias, layers)


def conv1d(path: Path, module: str, *, layers: int | None = None) -> dict[Path, TensorName]:
    """As `linear`, for the layer that GPT-2 calls ``Conv1D``, whose weight is [in, out] as ours is."""
    return _module(path, module, ("kernel", "conv1d"), True, layers)


def conv2d(path: Path, module: str, *, bias: bool = True) -> dict[Path, TensorName]:
    """``kernel`` [height, width, in, out] and ``bias``, of ``torch.nn.Conv2d`` with its [out, in, height, width]."""
    return _module(path, module, ("kernel", "conv2d"), bias, None)


def norm(path: Path, module: str, *, bias: bool = True, layers: int | None = None) -> dict[Path, TensorName]:
    """``scale`` and ``bias``, of ``torch.nn.LayerNorm``, or without bias of an RMS norm."""
    return _module(path, module, ("scale", "array"), bias, layers)


def embedding(path: Path, module: str, *, tied: str | None = None) -> dict[Path, TensorName]:
    """``embedding`` [rows, features], of ``torch.nn.Embedding``.

    Args:
      path: of the module's parameters in our tree.
      module: the name of PyTorch's module.
      tied: that of the linear layer whose weight is this table too, where one leaf is both.
    """
    found = _module(path, module, ("embedding", "embedding"), False, None)
    if tied is None:
        return found
    return {leaf: name._replace(tied=(f"{tied}.weight",)) for leaf, name in found.items()}


def array(path: Path, tensor: str) -> dict[Path, TensorName]:
    """A leaf that is the same array on both sides."""
    return {path: TensorName((tensor,))}


def stored_as(names: TensorNames, *replacements: tuple[str, str]) -> dict[Path, TensorName]:
    """The same table, for a model whose checkpoint files name some tensors otherwise than the model itself.

    Args:
      names: by the names in the model.
      replacements: pairs of a text in these names and what stands for it in files; each is replaced, in this order.
    """

    def in_file(tensor: str) -> str:
        return functools.reduce(lambda name, pair: name.replace(*pair), replacements, tensor)

    return {path: name._replace(stored=tuple(map(in_file, name.tensors))) for path, name in names.items()}


def _module(
    path: Path, module: str, weight: tuple[str, Kind], bias: bool, layers: int | None
) -> dict[Path, TensorName]:
    leaf, kind = weight
    modules = (module,) if layers is None else tuple(module.format(i) for i in range(layers))
    stacked = layers is not None
    found = {f"{path}/{leaf}": TensorName(tuple(f"{m}.weight" for m in modules), kind, stacked)}
    if bias:
        found[f"{path}/bias"] = TensorName(tuple(f"{m}.bias" for m in modules), "array", stacked)
    return found


def torch_axes(kind: Kind, ndim: int) -> tuple[int, ...]:
    """The axes of PyTorch's array (without layers), in the order in which ours has them."""
    return _FROM_TORCH.get(kind, tuple(range(ndim)))


def from_torch(array: np.ndarray, kind: Kind) -> np.ndarray:
    """One layer's array as our leaf has it; a view."""
    return array.transpose(torch_axes(kind, array.ndim))


def to_torch(array: np.ndarray, kind: Kind) -> np.ndarray:
    """One layer of our leaf as PyTorch has it; a view, the inverse of `from_torch`."""
    return array.transpose(np.argsort(torch_axes(kind, array.ndim)))


def torch_shape(shape: tuple[int, ...], name: TensorName) -> tuple[int, ...]:
    """The shape of each of a leaf's tensors in PyTorch, from the shape of our leaf."""
    one = shape[1:] if name.stacked else shape
    return tuple(one[i] for i in np.argsort(torch_axes(name.kind, len(one))))
