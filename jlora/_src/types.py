"""Shared types: adapters, attached leaves, uses of a weight. No algorithms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias

import jax

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Path: TypeAlias = str
"""The keys of a leaf joined by ``/``, such as ``params/block_0/query/kernel``."""


class Axes(NamedTuple):
    """The roles of a weight's axes; together they name each axis once.

    Attributes:
      batch: axes along which the weight is a stack of independent matrices (scanned layers, experts).
      inputs: axes that the model contracts with its activations.
      outputs: axes that the result keeps.
    """

    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)

    def sizes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """``shape`` split into the sizes of the batch, input and output axes."""
        return tuple(tuple(shape[i] for i in group) for group in self)

    def flipped(self) -> Axes:
        """The axes of the transposed use: an embedding reused as the output projection."""
        return Axes(self.batch, self.outputs, self.inputs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors:
    """The trainable low-rank update of one weight, ``delta = scale * a @ b`` (Hu et al. 2021, eq. 3).

    Attributes:
      a: float array of shape ``batch + inputs + (rank,)``.
      b: float array of shape ``batch + (rank,) + outputs``.
      magnitude: None, or DoRA's column norms of shape ``batch + outputs`` (Liu et al. 2024, eq. 5).
      scale: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA. Static.
      axes: the axes of the weight that the factors' own axes follow. Static, and recorded so that merging never
        guesses.
      dropout: rate in [0, 1) on the adapter's input, active where `attach` is given a key. Static.
    """

    a: Array
    b: Array
    magnitude: Array | None = None
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})
    axes: Axes = dataclasses.field(default=Axes(), metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        return self.a.shape[-1]


Adapters: TypeAlias = Mapping[Path, LoraFactors | Array]
"""Everything that trains, in a flat dict by path: `LoraFactors`, or an array for a leaf trained whole."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowAdapters:
    """The adapters of one weight for the rows of a batch, as `select` returns them for `attach`.

    The rows are in groups of one size; those of a group have one adapter.

    Attributes:
      value: `LoraFactors` or an array, with one more axis: of groups, after any batch axes of the weight, so that a
        loop over layers finds these first. Zero for a group without an adapter.
      adapted: bool [groups], False for a group of the base alone.
      rows: int32 [groups, size], the rows of each group; a place that is left over repeats one. None if group i is
        row i alone.
      places: None, or int32 [rows], the place of each row in the flattened ``rows``.
    """

    value: Any
    adapted: Array
    rows: Array | None = None
    places: Array | None = None

    @property
    def row_count(self) -> int:
        return self.adapted.shape[0] if self.places is None else self.places.shape[0]

    @property
    def axis(self) -> int:
        """The axis of groups in each array of ``value``."""
        return len(self.value.axes.batch) if isinstance(self.value, LoraFactors) else 0


_NOT_WRAPPED = (
    "the weight at {path!r} carries LoRA factors, and was passed to a function that does not support them.  "
    "Wrap the function that takes the parameters: `apply = jlora.lora(model.apply)`, then call "
    "`apply(jlora.attach(params, adapters), ...)`; or give the plain function `jlora.merge(params, adapters)`."
)


_LABELS = (
    "these are labels from jlora.labels, and the one at {path!r} was used as an array. A module of labels with a "
    "__call__ is itself callable, and optax calls it: pass the function `jlora.labels` to optax.partition instead."
)


class StandsForArray:
    """Base of leaves that only `jlora.lora` understands: the size of an array, and an error for use as one.

    A subclass has a shape, and says in ``_advice`` what to do.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def _advice(self) -> str:
        raise NotImplementedError

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(self._advice())

    # As a method, __jax_array__ would make lax functions fail with advice about __jax_array__, which does not apply;
    # as a property that raises, they name this class.
    __jax_array__ = property(_refuse)
    __array__ = __getitem__ = __len__ = __iter__ = __neg__ = astype = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse
    __truediv__ = __rtruediv__ = __matmul__ = __rmatmul__ = __pow__ = _refuse
    reshape = transpose = swapaxes = T = property(_refuse)  # pyright: ignore[reportAssignmentType]


class _Attached(StandsForArray):
    """Base of attached leaves, with the weight's shape and dtype."""

    base: Any
    path: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def _advice(self) -> str:
        return (_LABELS if isinstance(self.base, str) else _NOT_WRAPPED).format(path=self.path)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraWeight(_Attached):
    """A frozen base weight with its factors: replaces the weight in the parameter tree.

    Attributes:
      base: the frozen weight, any float dtype.
      factors: the trainable update.
      strength: None, or a scalar array that multiplies the update at run time.
      dropout_key: None, or a PRNG key; if given, dropout at rate ``factors.dropout`` acts on the adapter's input.
      path: of the weight. Static.
      split_inputs: the mesh axes over which a local shard's inputs are split, or None if they are not known. Static.
    """

    base: Any
    factors: LoraFactors
    strength: Array | None = None
    dropout_key: Array | None = None
    path: Path = dataclasses.field(default="", metadata={"static": True})
    split_inputs: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FullWeight(_Attached):
    """A leaf trained whole: the model uses ``value``, cast to the dtype of ``base``; `detach` restores ``base``.

    Attributes:
      base: the original leaf, frozen.
      value: the trainable leaf of the same shape.
      path: of the leaf. Static.
    """

    base: Any
    value: Array
    path: Path = dataclasses.field(default="", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RowWeight(_Attached):
    """A weight with adapters for the rows of a batch (`select`).

    Attributes:
      base: the frozen weight.
      adapters: of the rows.
      strength: as in `LoraWeight`.
      dropout_key: None, or a PRNG key for each group of rows.
      path, split_inputs: as in `LoraWeight`. Static.
    """

    base: Any
    adapters: RowAdapters
    strength: Array | None = None
    dropout_key: Array | None = None
    path: Path = dataclasses.field(default="", metadata={"static": True})
    split_inputs: tuple[str, ...] | None = dataclasses.field(default=None, metadata={"static": True})


def is_attached(x: Any) -> bool:
    """Whether ``x`` is a leaf created by `attach`."""
    return isinstance(x, LoraWeight | FullWeight | RowWeight)


class Use(NamedTuple):
    """One place where a weight is consumed.

    Attributes:
      primitive: the JAX primitive, such as ``dot_general``.
      axes: the weight's axes in this use, or None when the use has no matrix form.
      source: file and line of the user's code.
      note: why ``axes`` is None, or why the weight is materialized for this product.
      summed: whether an adapted weight is materialized (summed to its full shape) for it.
      gradient: whether the gradient of a floating result reaches the weight through this use.
      work: the multiplications of a product with data, which weight the uses. 0 for any other use: where the other
        operand is not data with a gradient, such as the vectors of a power iteration, or where the result affects the
        function only through a scalar that multiplies a weight, such as the norm estimated by that iteration.
    """

    primitive: str
    axes: Axes | None
    source: str
    note: str = ""
    summed: bool = False
    gradient: bool = True
    work: int = 0


NO_FORM = "the primitive has no matrix form"
"""The note of a use by a primitive that is neither a product nor a rearrangement of the weight."""
MATMULS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})


@dataclasses.dataclass(frozen=True)
class WeightUse:
    """How a model consumes one weight; returned by `trace`.

    Attributes:
      shape, dtype: of the weight.
      uses: every use, in program order; empty when the weight is never read.
    """

    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...] = ()

    @property
    def learning(self) -> tuple[Use, ...]:
        """The uses through which a gradient reaches the weight."""
        return tuple(use for use in self.uses if use.gradient)

    @property
    def axes(self) -> Axes | None:
        """The axes with the most multiplications, summed over the products that share them; the first on a tie. For a
        table that is looked up first, the axes of the lookup. None if no use has a matrix form."""
        first = next((use for use in self.learning if use.axes is not None), None)
        if first is None or first.primitive not in MATMULS:
            return first and first.axes
        work: dict[Axes, int] = {}
        for use in self.uses:
            if use.primitive in MATMULS and use.axes is not None:
                work[use.axes] = work.get(use.axes, 0) + use.work
        return max(work, key=lambda axes: work[axes])  # the first on a tie

    @property
    def kind(self) -> str:
        """``matmul``, ``lookup``, ``stopped`` (no gradient reaches the weight), ``unread`` or ``other``, from the first
        matrix use through which a gradient reaches the weight."""
        for use in self.learning:
            if use.axes is not None:
                return "matmul" if use.primitive in MATMULS else "lookup"
        if not self.uses:
            return "unread"
        return "other" if self.learning else "stopped"

    @property
    def flipped(self) -> bool:
        """Whether another use contracts the outputs, as a tied output projection does."""
        axes = self.axes
        return axes is not None and any(u.axes == axes.flipped() for u in self.uses)

    @property
    def materialized(self) -> tuple[Use, ...]:
        """Uses for which an adapted weight is materialized, under the policy of `lora`."""
        return tuple(use for use in self.uses if use.summed)


Uses: TypeAlias = Mapping[Path, WeightUse]


@dataclasses.dataclass(frozen=True)
class Target:
    """What `init` creates for one weight.

    Attributes:
      path, shape, dtype: of the weight.
      axes: the roles of its axes; None for a leaf trained whole.
      rank, scale, dropout, dora: of the factors; rank 0 for a leaf trained whole.
      trainable: the number of trainable parameters.
      used_by: what consumes the weight, in words.
      lookup: whether the weight is a table whose rows are looked up.
      init: how its factors are drawn, as in `LoraConfig`.
      scheme: of a quantized weight; "" for any other.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: Any
    axes: Axes | None
    rank: int
    scale: float
    dropout: float
    dora: bool
    trainable: int
    used_by: str
    lookup: bool = False
    init: str = "kaiming"
    scheme: str = ""

    def describe(self) -> tuple[str, ...]:
        """The cells of this target's row in the plan's table."""
        how = "whole" if self.axes is None else f"r={self.rank} s={self.scale:g}" + (" DoRA" if self.dora else "")
        how += f" {self.init}" if self.init != "kaiming" and not self.lookup else ""
        shape = "x".join(map(str, self.shape)) + (f" {self.scheme}" if self.scheme else "")
        return (self.path, shape, how, f"{self.trainable:,}", self.used_by)
