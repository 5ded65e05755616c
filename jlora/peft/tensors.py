"""An adapter's tensors sorted by what they are in our model, and everything that is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora._src.config import HEADS
from jlora._src.types import Path as LeafPath
from jlora.files.safetensors import Tensor, TensorError, open_tensors
from jlora.files.tensor_names import Kind, TensorName, TensorNames, to_torch, torch_axes, torch_shape
from jlora.messages import bullets, nearest
from jlora.peft import layout
from jlora.peft.config import PeftConfig, PeftError
from jlora.peft.layout import Part

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAX_LISTED = 40
_FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, layout.SUFFIXES))})")
_ADAPTER = re.compile(
    r"(?<=\.lora_[AB])\.[^.]+(?=\.weight$)|(?<=\.lora_embedding_[AB])\.[^.]+$|(?<=\.lora_magnitude_vector)(\.[^.]+)?\.weight$"
)
"""The adapter's name in a key of ``state_dict()``, which `PeftModel.from_pretrained` reads as it does its own keys."""
_NO_VOCABULARY = re.compile(r"position|token_type|wpe")
_UNLOAD = "`PeftModel.from_pretrained(base, folder).unload().save_pretrained(new_folder)` in PyTorch"
_COPY = re.compile(r"\.(original_module|modules_to_save)\.")


class Spelling(NamedTuple):
    """How names of the adapted model differ from ours: theirs begin with ``cut``, ours with ``put``."""

    cut: str = ""
    put: str = ""

    def ours(self, name: str) -> str:
        return self.put + name.removeprefix(self.cut)

    def theirs(self, name: str) -> str:
        return self.cut + name.removeprefix(self.put)


class Found(NamedTuple):
    """A file's tensors.

    Attributes:
      layers: of each module that has factors, by our name of it, its arrays.
      whole: by our name, those that replace a weight.
      spelling: of the names.
      leaves: the parameters, or shapes of them; at least of all that have a tensor.
    """

    layers: dict[str, dict[Part, Tensor]]
    whole: dict[str, Tensor]
    spelling: Spelling
    leaves: Mapping[LeafPath, Any]


def module_of(tensor: str) -> str:
    """The module whose weight a tensor is, or whose bias."""
    return tensor.rpartition(".")[0]


def open_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors in an adapter's folder.

    Raises:
      TensorError: if there are none that can be read, or only pickled ones.
    """
    file = folder / TENSORS
    if not file.is_file() and (pickled := sorted(f.name for f in folder.glob("*.bin"))):
        raise TensorError(
            f"{folder} has no {TENSORS}; it has {', '.join(pickled)}, which is pickled: reading it could run any code, "
            "so it is not read. Convert it where you trust it: `model = PeftModel.from_pretrained(base, folder)`, then "
            "`model.save_pretrained(new_folder)`, which writes safetensors."
        )
    return open_tensors(file)


def named_as(names: TensorNames, keys: Collection[str]) -> TensorNames:
    """The table by the names that an adapter has: those in PyTorch's model, or in files.

    Older versions of transformers had the latter in the model too, and PEFT writes what is there.
    """
    stored = {path: name._replace(tensors=name.files) for path, name in names.items()}

    def known(table: TensorNames) -> int:
        modules = {module_of(tensor) for name in table.values() for tensor in name.tensors}
        return sum(any(f".{module}." in key for key in keys) for module in modules)

    return names if stored == names else max((names, stored), key=known)


def sort_tensors(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, Tensor],
    names: TensorNames,
    leaves: Mapping[LeafPath, Any] | None,
) -> Found:
    """What each tensor of an adapter is in our model; without ``leaves``, their shapes are those of the file.

    Raises:
      PeftError: naming every tensor that is missing, superfluous, of another shape, rank or dtype.
    """
    at = {tensor: (path, name) for path, name in names.items() for tensor in name.tensors}
    stems = {key: _ADAPTER.sub("", key.removeprefix(PREFIX).replace(".base_layer.", ".")) for key in tensors}
    if config.modules_to_save:  # beside bias="all" PEFT stores some biases again, under the names of its wrapper
        stems = {key: stem for key, stem in stems.items() if not _COPY.search(stem)}
    weights = {key: f"{m[1]}.weight" if (m := _FACTOR.fullmatch(stem)) else stem for key, stem in stems.items()}
    spelling = _spelling(weights.values(), at)
    weights = {key: spelling.ours(weight) for key, weight in weights.items()}
    unknown = {key for key, weight in weights.items() if weight not in at or not key.startswith(PREFIX)}

    layers: dict[str, dict[Part, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    wrong: list[str] = []
    for key, weight in weights.items():
        if key in unknown:
            continue
        if (match := _FACTOR.fullmatch(stems[key])) is None:
            wrong += [f"{key!r} and {whole[weight].name!r} are one tensor of the model"] if weight in whole else []
            whole[weight] = tensors[key]
            continue
        kind = at[weight][1].kind
        suffixes = layout.parts(kind) if kind in layout.NDIM else {}
        part = next((part for part, suffix in suffixes.items() if suffix == match[2]), None)
        if part is None:
            wrong.append(f"{key!r}: {at[weight][0]!r} is of kind {kind!r}, which has no {match[2]!r}")
        else:
            here = layers.setdefault(module_of(weight), {})
            wrong += [f"{key!r} and {here[part].name!r} are one tensor of the model"] if part in here else []
            here[part] = tensors[key]
    wrong += [] if tensors else [f"{TENSORS} holds no tensor at all"]
    wrong += _mixed(layers, whole, names)
    leaves = _shapes_in(layers, whole, names) if leaves is None else leaves
    found = Found(layers, whole, spelling, leaves)
    _check_vocabulary(folder, found, at)

    theirs = {t: spelling.theirs(t) for t in at if t.startswith(spelling.put)}
    wrong += _wrong_layers(config, found, theirs, at)
    wrong += _wrong_whole(config, found, theirs, at)
    stored = [tensor for weight, tensor in whole.items() if at[weight][1].kind == "embedding"]
    unknown = sorted(key for key in unknown if not _is_tied(tensors[key], stored))
    count = len(wrong) + len(unknown)
    wrong += [_unknown(key, stems[key], at, spelling) for key in unknown[: max(0, MAX_LISTED - len(wrong))]]
    if count:
        raise PeftError(
            f"{folder}: {count} tensor(s) do not fit the model or the adapter's own config:"
            + bullets(wrong[:MAX_LISTED])
            + (f"\n  - and {count - MAX_LISTED} more" if count > MAX_LISTED else "")
            + "\nExpected an adapter of this model, whole, as PEFT wrote it; nothing was loaded."
        )
    return found


def _check_vocabulary(folder: Path, found: Found, at: Mapping[str, tuple[LeafPath, TensorName]]) -> None:
    """Raises a PeftError if the adapter is of another number of tokens than the parameters, naming every module."""
    wrong = {}
    for weight, (path, name) in at.items():
        is_table = name.kind == "embedding" and not _NO_VOCABULARY.search(weight)
        if path in found.leaves and (is_table or weight.endswith("lm_head.weight")):
            ours = torch_shape(tuple(found.leaves[path].shape), name)[0]
            theirs = _rows(found, weight, "a" if is_table else "b") - {ours}
            for rows in theirs:  # one, unless the file is damaged
                wrong[weight] = rows, ours
    if wrong:
        lines = [f"{module_of(w)!r} has {theirs} rows, {at[w][0]!r} has {ours}" for w, (theirs, ours) in wrong.items()]
        raise PeftError(
            f"{folder}: the vocabulary was resized before the adapter was trained:{bullets(lines)}\nExpected one of "
            f"the same size. Resize the base too (`base.resize_token_embeddings({next(iter(wrong.values()))[0]})`), "
            f"write it with the rows that the adapter was trained with ({_UNLOAD}), and load that. Nothing was loaded."
        )


def _rows(found: Found, weight: str, part: Part) -> set[int]:
    """How many rows a weight has by the file's tensors for it, ``part`` being the factor that has as many."""
    factor = found.layers.get(module_of(weight), {}).get(part)
    shapes = [found.whole[weight].shape[:1]] if weight in found.whole else []
    shapes += [] if factor is None else [factor.shape[1:2] if part == "a" else factor.shape[:1]]
    return {rows for shape in shapes for rows in shape}


def read_tensors(folder: Path, found: Found) -> dict[str, np.ndarray]:
    """The arrays of all tensors that were found, by their names in the file.

    Raises:
      PeftError: naming every tensor that holds NaN or infinity.
    """
    arrays, wrong = {}, []
    for tensor in (*(tensor for parts in found.layers.values() for tensor in parts.values()), *found.whole.values()):
        try:
            arrays[tensor.name] = tensor.read()
        except TensorError:
            wrong.append(repr(tensor.name))
    if wrong:
        raise PeftError(
            f"{folder}: {len(wrong)} tensor(s) hold NaN or infinity:{bullets(wrong)}\nExpected finite values; the file "
            "is damaged, or the training that wrote it diverged. Nothing was loaded."
        )
    return arrays


def _spelling(weights: Iterable[str], ours: Mapping[str, Any]) -> Spelling:
    """The one by which most names are ours; unchanged where that is as good as any."""
    weights = set(weights)

    def first(names: Iterable[str]) -> list[str]:
        return sorted({name.partition(".")[0] + "." for name in names})

    candidates = [Spelling(), *(Spelling(put=p) for p in first(ours)), *(Spelling(cut=c) for c in first(weights))]
    return max(candidates, key=lambda s: sum(s.ours(weight) in ours for weight in weights))


def _mixed(layers: Collection[str], whole: Collection[str], names: TensorNames) -> list[str]:
    """Stacked leaves of which PEFT trained some layers whole and others by factors; here a leaf is one or the other."""
    return [
        f"{path!r}: {next(t for t in name.tensors if t in whole)!r} is trained whole, and other layers of this leaf by "
        "factors; merge it where it was trained (`model.merge_and_unload().save_pretrained(folder)`) and load the "
        "merged model"
        for path, name in names.items()
        if name.stacked
        and any(tensor in whole for tensor in name.tensors)
        and any(module_of(tensor) in layers and tensor.endswith(".weight") for tensor in name.tensors)
    ]


def _shapes_in(
    layers: Mapping[str, dict[Part, Tensor]], whole: Mapping[str, Tensor], names: TensorNames
) -> dict[LeafPath, jax.ShapeDtypeStruct]:
    """The shapes of the leaves that have a tensor in the file, as the first of their tensors tells them."""
    found = {}
    for path, name in names.items():
        for tensor in name.tensors:
            parts = layers.get(module_of(tensor), {}) if name.kind in layout.NDIM else {}
            if "a" in parts and "b" in parts:
                one = layout.leaf_shape(name.kind, parts["a"].shape, parts["b"].shape)
            elif tensor in whole:
                one = tuple(whole[tensor].shape[i] for i in torch_axes(name.kind, len(whole[tensor].shape)))
            else:
                continue
            shape = (len(name.tensors), *one) if name.stacked else one
            found.setdefault(path, jax.ShapeDtypeStruct(shape, np.float32))
    return found


def _wrong_layers(config: PeftConfig, found: Found, theirs: Mapping[str, str], at: Mapping[str, Any]) -> list[str]:
    wrong, leaves = [], found.leaves
    for weight, their_weight in theirs.items():
        path, name = at[weight]
        kind: Kind = name.kind
        if kind not in layout.NDIM or not weight.endswith(".weight"):
            continue
        module = module_of(their_weight)
        targeted, have = config.targets(module, kind), found.layers.get(module_of(weight))
        if have is None and not targeted:
            continue
        if have is not None and not targeted and config.target_modules is not None:
            wrong.append(f"{module!r} has factors, but target_modules does not name it: PEFT would ignore them")
            continue
        if path not in leaves:
            factors = [part for part in layout.parts(kind) if part != "magnitude" and part not in (have or {})]
            wrong += [f"{f'{PREFIX}{module}.{layout.parts(kind)[part]}'!r} is missing" for part in factors]
            continue
        shape = tuple(leaves[path].shape)[int(name.stacked) :]
        if len(shape) != layout.NDIM[kind]:
            wrong.append(f"{path!r} has shape {shape} a layer; {kind!r} of the name table has {layout.NDIM[kind]} axes")
            continue
        rank = config.rank(module)
        for part, expected in layout.shapes(kind, shape, rank).items():
            key = f"{PREFIX}{module}.{layout.parts(kind)[part]}"
            tensor = (have or {}).get(part)
            if part == "magnitude" and not config.use_dora:
                wrong += [f"{key!r}: the config has no use_dora"] if tensor else []
            elif tensor is None:
                wrong.append(f"{key!r} of shape {expected} is missing")
            elif tensor.shape != expected:
                axis = 0 if part == "a" else 1
                other_rank = part != "magnitude" and tensor.shape[axis : axis + 1] != (rank,)
                why = f": the config gives it rank {rank}" if other_rank else f": {path!r} has shape {shape}"
                wrong.append(f"{key!r} has shape {tensor.shape}, expected {expected}{why}")
            elif not jnp.issubdtype(tensor.dtype, jnp.floating):
                wrong.append(f"{key!r} is {tensor.dtype}, expected floating numbers")
        here = [t for t in name.tensors if module_of(t) in found.layers]
        if config.use_dora and here[:1] == [weight] and here != list(name.tensors) and _is_shape(leaves[path]):
            wrong.append(f"{path!r}: only some of its layers have DoRA, for the others give params with values")
    return wrong


def _wrong_whole(config: PeftConfig, found: Found, theirs: Mapping[str, str], at: Mapping[str, Any]) -> list[str]:
    adapted = {found.spelling.theirs(module) for module in found.layers}
    owed = config.whole(theirs.values(), adapted)
    wrong, leaves = [], found.leaves
    for weight, their_weight in theirs.items():
        path, name = at[weight]
        key, tensor = f"{PREFIX}{their_weight}", found.whole.get(weight)
        if path not in leaves:
            wrong += [f"{key!r} is missing"] if their_weight in owed else []
            continue
        expected = torch_shape(tuple(leaves[path].shape), name)
        if tensor is None:
            wrong += [f"{key!r} of shape {expected} is missing"] if their_weight in owed else []
        elif tensor.shape != expected:
            wrong.append(f"{key!r} has shape {tensor.shape}, expected {expected}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            wrong.append(f"{key!r} is {tensor.dtype}, expected floating numbers")
        elif module_of(weight) in found.layers and weight.endswith(".weight"):
            # PEFT stores an embedding's base beside its factors; that says nothing new unless it was changed.
            leaf = leaves[path]
            if _is_shape(leaf):
                wrong.append(f"{tensor.name!r} is stored beside factors: give params with values, to compare it with")
            elif not np.array_equal(tensor.read(), to_torch(np.asarray(leaf), name.kind)):
                wrong.append(
                    f"{tensor.name!r} has other values than {path!r}, and factors that were trained over these: "
                    f"{_UNLOAD} writes the base with them; load that"
                )
            del found.whole[weight]
        elif their_weight not in owed and not _is_embedding(their_weight, name.kind):
            wrong.append(f"{key!r} is stored, but neither bias nor modules_to_save names it")
        elif not all(t in found.whole for t in name.tensors) and _is_shape(leaves[path]):
            wrong.append(f"{path!r}: only some of its layers are stored, for the others give params with values")
    return wrong


def _is_embedding(weight: str, kind: Kind) -> bool:
    """Whether ``save_embedding_layers`` stores it: a table, what embeds the patches of images, an output projection."""
    looked_up = kind == "embedding" or ".patch_embeddings." in weight
    return looked_up or re.search(HEADS[0], weight.replace(".", "/")) is not None


def _is_tied(tensor: Tensor, stored: list[Tensor]) -> bool:
    """Whether a tensor that we do not have is the same as a stored table: a tied output projection."""
    return any(t.shape == tensor.shape and np.array_equal(t.read(), tensor.read()) for t in stored)


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _unknown(key: str, stem: str, at: Mapping[str, Any], spelling: Spelling) -> str:
    if not key.startswith(PREFIX):
        return f"{key!r}: PEFT's names start with {PREFIX!r}"
    name = spelling.ours(m[1] + ".weight" if (m := _FACTOR.fullmatch(stem)) else stem)
    return f"{key!r}: the model has no such tensor{nearest(name, at)}"
