"""`extract`: adapters from two checkpoints, read one leaf at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jlora._src.algebra.extract import EnergyKept, differ, energy_kept, extracted, refuse_changed
from jlora._src.algebra.ranks import check_options
from jlora._src.config import LoraConfig
from jlora._src.engine.trace import trace
from jlora._src.paths import named_leaves, path_key
from jlora._src.tree.plan import Plan, plan
from jlora._src.types import Array, LoraFactors, PyTree, Uses
from jlora._src.types import Path as LeafPath
from jlora.files.errors import ModelError
from jlora.files.quantized_tensors import QuantizedTensor
from jlora.messages import bullets
from jlora.models._checkpoint import stored_tensors
from jlora.models._family import TaskName
from jlora.models._matching import match_tensors
from jlora.models._network import Architecture, abstract, example_inputs, fetch, read_architecture
from jlora.models._reading import read_leaf


class Extraction(NamedTuple):
    """What `extract` returns.

    Attributes:
      model: the tuned network.
      params: the base's, for `jlora.peft.save`: the leaves without factors (zeros where the base lacks one), and the
        shapes of the rest.
      adapters: as from `jlora.init`.
      kept: the energy kept, by path.
      config: what was adapted.
    """

    model: nn.Module
    params: PyTree
    adapters: dict[LeafPath, LoraFactors | Array]
    kept: EnergyKept
    config: LoraConfig


def extract(
    base: str | Path,
    tuned: str | Path,
    config: LoraConfig | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    niter: int | None = None,
    key: Array | None = None,
    task: TaskName | None = None,
) -> Extraction:
    """Adapters from a fully fine-tuned checkpoint and its base, as `jlora.extract`, reading one leaf at a time.

    Neither model is ever in memory: at most one leaf of each is (of a decoder, the matrices of one kind of all layers).

    >>> found = models.extract("base", "tuned", rank=16)
    >>> print(found.kept)
    >>> peft.save("adapter", models.tensor_names(found.model), found.params, found.adapters, found.config)

    Args:
      base, tuned: folders, URLs, or ids of models on the hub. The base may lack the head of the tuned network, which is
        then taken whole.
      config: what gets factors and what is taken whole; by default factors for every matrix and table, and all other
        leaves and the head whole. Tables with no more rows or columns than the rank are taken whole too.
      rank, energy, niter, key: as in `jlora.extract`; without a config, one of rank and energy is needed.
      task: the kind of output; by default that of the tuned checkpoint.

    Raises:
      ModelError: if a checkpoint does not fit the tuned network, is quantized, or the base lacks leaves that get
        factors; listing all.
      ValueError: as `jlora.extract` and `jlora.plan`.
      TypeError: for other options than those of `jlora.extract`.
    """
    check_options("extract", rank, energy, optional=config is not None)
    if (niter is None) != (key is None):
        raise TypeError("extract: niter and key belong together")
    folders = fetch(base), fetch(tuned)
    found = read_architecture(folders[1], task, None)
    model = found.network(jnp.float32, jnp.float32, "none", "plain")
    tree = abstract(model)
    shapes, treedef = named_leaves(tree)
    uses = trace(model.apply, tree, example_inputs(model))
    chosen = plan(tree, config or _everything(found, uses, rank or 1), uses)
    before, after = (_Leaves(folder, found, shapes, may_start=i == 0) for i, folder in enumerate(folders))
    _check_base(before, chosen, folders[0])
    adapters, norms, params, changed = {}, {}, {}, []
    for path, shape in shapes.items():
        old = before[path] if path in before else jnp.zeros(shape.shape, shape.dtype)
        params[path] = old if path not in chosen or chosen[path].axes is None else shape
        if path not in chosen:
            changed += [path] if differ(old, after[path]) else []
            continue
        own = None if key is None else path_key(key, path)
        value, norm = extracted(old, after[path], chosen[path], chosen.config, rank, energy, niter, own)
        if norm is None or float(norm[1]) > 0:  # factors of weights that did not change are left out
            adapters[path], norms[path] = value, norm
    refuse_changed(changed, "Or pass no config, for all leaves.")
    return Extraction(model, treedef.unflatten(params.values()), adapters, energy_kept(adapters, norms), chosen.config)


class _Leaves(Mapping[LeafPath, Array]):
    """The leaves of a checkpoint, float32 or as wide as stored, each read when it is asked for."""

    def __init__(self, folder: Path, found: Architecture, shapes: Mapping[LeafPath, Any], *, may_start: bool):
        self._names, self._shapes = found.tensor_names(), shapes
        ties = {head: name.files[0] for name in self._names.values() for head in name.tied}
        tensors = stored_tensors(folder, None)
        if quantized := [repr(name) for name, x in tensors.items() if isinstance(x, QuantizedTensor)]:
            raise ModelError(
                f"{folder}: {len(quantized)} tensors are quantized:{bullets(quantized[:5])}\nExpected the original "
                "checkpoint: the error of the quantization is no change that was trained."
            )
        self._tensors = match_tensors(folder, tensors, self._names, shapes, found.family, ties, may_start=may_start)

    def __getitem__(self, path: LeafPath) -> Array:
        return read_leaf(self._tensors[path], self._names[path], self._shapes[path].shape, jnp.float32, None)

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _everything(found: Architecture, uses: Uses, rank: int) -> LoraConfig:
    """Factors for all matrices and tables that are larger than the rank, and the rest whole."""

    def gets_factors(path: LeafPath) -> bool:
        use = uses[path]
        if use.axes is None or use.kind not in ("matmul", "lookup") or re.search(found.family.heads, path):
            return False
        _, inputs, outputs = use.axes.sizes(use.shape)
        return min(math.prod(inputs), math.prod(outputs)) > rank

    factors = tuple(f"^{re.escape(path)}$" for path in uses if gets_factors(path))
    whole = tuple(f"^{re.escape(path)}$" for path in uses if not gets_factors(path))
    return LoraConfig(rank=rank, alpha=rank, targets=factors, exclude=(), train_also=whole)


def _check_base(before: Mapping[LeafPath, Array], chosen: Plan, folder: Path) -> None:
    """Raises a ModelError listing every leaf that the base lacks and that is not taken whole."""
    lacking = [p for p, target in chosen.items() if p not in before and target.axes is not None]
    if lacking:
        raise ModelError(
            f"{folder} lacks {len(lacking)} leaves that would get factors:{bullets(map(repr, lacking))}\nName them in "
            "train_also of the config, to take them whole from the tuned checkpoint."
        )
