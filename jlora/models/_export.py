"""`export`: a merged checkpoint with its tokenizer and a model card."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import flax.linen as nn

from jlora._src.paths import named_leaves
from jlora._src.tree.merge import Rounding, merge, rounding
from jlora._src.types import Adapters, LoraFactors, PyTree
from jlora._src.types import Path as LeafPath
from jlora.files import hub_files
from jlora.files.errors import ModelError
from jlora.files.hub_files import GENERATION_CONFIG, MODEL_CARD, TOKENIZER_FILES
from jlora.files.json_files import read_json
from jlora.messages import bullets
from jlora.models._causal import CausalConfig
from jlora.models._checkpoint import check_leaves, write
from jlora.models._family import ending_of
from jlora.models._network import architecture, fetch, import_hub

_TAG = "jlora"
_CARD = """\
# {name}

Low-rank adapters, merged by jlora into the weights{of_base}. It loads like any other checkpoint:

```python
model = transformers.{auto}.from_pretrained("{name}")
```

## What was merged

- low-rank updates of {factors} weights{ranks}
- {whole} leaves trained whole
- {trained:,} trained parameters; the network has {total:,}

## Rounding

Each update was added in float32, and the sum was rounded once to the dtype of the weight. The last column is the share
of the update lost to this rounding.

```
{rounding}
```
"""


def export(
    folder: str | Path,
    model: nn.Module,
    params: PyTree,
    adapters: Adapters,
    *,
    tokenizer: Any = None,
    base_model: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Rounding:
    """Write the merged network as a checkpoint for transformers, vLLM and `load`, with a model card.

    >>> print(models.export("out/merged", model, params, adapters, tokenizer="../shared/models/minilm-l6"))

    Merges the weights one by one while writing: summed in float32, rounded once to the base's dtype.

    Args:
      folder: created if it does not exist; a checkpoint in it is replaced.
      model, params: as from `load`.
      adapters: as from `jlora.init`.
      tokenizer: None, an object with ``save_pretrained``, or a folder or the id of a model on the hub, whose tokenizer
        or image processor is copied, and whose generation_config.json replaces the base's. Its padding token is added
        to the config.json of a decoder without one: transformers' classifiers need it for batches.
      base_model: the id of the base on the hub, for the model card.
      max_shard_bytes: the size above which the tensors are divided into several files with an index.

    Returns:
      The rounding errors, as from `jlora.rounding`; the model card lists them too.

    Raises:
      KeyError, ValueError: as `jlora.merge`, if an adapter does not fit or holds NaN or infinity. Nothing is written.
      ModelError: if ``params`` do not match ``model``, are not finite, or exceed the range of their dtype when
        merged, listing every leaf; if ``tokenizer`` has no files; if ``folder`` has a README.md that `export` did not
        write; or if huggingface_hub is not installed. Nothing is written.
    """
    folder = Path(folder)
    leaves, _ = named_leaves(params)
    check_leaves(leaves, model)
    lost = rounding(params, adapters)
    if beyond := [f"{path!r} of dtype {leaves[path].dtype}" for path, share in lost.items() if math.isinf(share)]:
        raise ModelError(
            f"export: {len(beyond)} merged weights exceed the range of their dtype:{bullets(beyond)}\nMerge into "
            'parameters of a larger range: load(..., param_dtype="float32").'
        )
    files = _tokenizer_files(tokenizer)
    _check_card(folder / MODEL_CARD)
    pad = _pad_token(model, tokenizer, files)

    @lru_cache(maxsize=1)
    def merged(path: LeafPath) -> Any:
        return merge({path: leaves[path]}, {path: adapters[path]})[path] if path in adapters else leaves[path]

    generation = next((read_json(file) for file in files if file.name == GENERATION_CONFIG), None)
    write(folder, model, leaves, merged, max_shard_bytes, {} if pad is None else {"pad_token_id": pad}, generation)
    for file in files:
        if file.name != GENERATION_CONFIG and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    _write_card(folder, model, leaves, adapters, lost, base_model)
    return lost


def _tokenizer_files(tokenizer: Any) -> list[Path]:
    """The files to copy: a tokenizer's, and its generation_config.json."""
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return []
    folder = fetch(tokenizer, files=(*TOKENIZER_FILES, GENERATION_CONFIG))
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ModelError(
            f"{folder} has no file of a tokenizer. Expected one of {', '.join(TOKENIZER_FILES)}; or pass an object "
            "with save_pretrained."
        )
    return [folder / name for name in (*TOKENIZER_FILES, GENERATION_CONFIG) if (folder / name).is_file()]


def _pad_token(model: nn.Module, tokenizer: Any, files: Sequence[Path]) -> int | None:
    """The tokenizer's padding token, for a decoder whose configuration has none, if the token is in its vocabulary."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(config, CausalConfig) or config.pad_token_id is not None:
        return None
    pad = getattr(tokenizer, "pad_token_id", None) if hasattr(tokenizer, "save_pretrained") else _stored_pad(files)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else None


def _stored_pad(files: Sequence[Path]) -> int | None:
    """The id of the padding token in a tokenizer's files; None if missing."""
    content = {file.name: read_json(file) for file in files if file.suffix == ".json"}
    stated = content.get(hub_files.SPECIAL_TOKENS, {}) | content.get(hub_files.TOKENIZER_CONFIG, {})
    token = stated.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    fast = content.get(hub_files.TOKENIZER, {})
    ids = {entry.get("content"): entry.get("id") for entry in fast.get("added_tokens") or []}
    vocab = (fast.get("model") or {}).get("vocab")
    more = [
        content.get(hub_files.ADDED_TOKENS, {}),
        content.get(hub_files.VOCABULARY, {}),
        vocab if isinstance(vocab, dict) else {},
    ]
    return next((found[token] for found in (ids, *more) if token in found), None)


def _check_card(file: Path) -> None:
    """Raises a ModelError if there is a model card that `export` did not write, or if writing one is impossible."""
    hub = import_hub("export: a model card")
    if file.exists() and _TAG not in _tags(file, hub):
        raise ModelError(
            f"export: {file} was not written by jlora (it has no tag `{_TAG}`), and the model card would replace it; "
            "expected no such file, or that of an earlier export. Nothing was written: export into a new folder."
        )


def _tags(card: Path, hub: Any) -> Sequence[str]:
    """The tags of a model card; none if it has no valid metadata."""
    try:
        return (hub.metadata_load(card) or {}).get("tags") or ()
    except Exception:  # any error of the YAML parser or the codec
        return ()


def _write_card(
    folder: Path,
    model: nn.Module,
    leaves: Mapping[LeafPath, Any],
    adapters: Adapters,
    lost: Rounding,
    base_model: str | None,
) -> None:
    factors = [value for value in adapters.values() if isinstance(value, LoraFactors)]
    text = _CARD.format(
        name=folder.resolve().name,
        of_base=f" of `{base_model}`" if base_model else "",
        auto="AutoModel" + ending_of(architecture(model).task).removeprefix("Model"),
        factors=len(factors),
        ranks=f", rank {', '.join(map(str, sorted({value.rank for value in factors})))}" if factors else "",
        whole=len(adapters) - len(factors),
        trained=sum(map(_size, adapters.values())),
        total=sum(map(_size, leaves.values())),
        rounding=lost,
    )
    hub = import_hub("export: a model card")
    data = hub.ModelCardData(base_model=base_model, library_name="transformers", tags=["lora", _TAG])
    hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(folder / MODEL_CARD)


def _size(value: Any) -> int:
    if isinstance(value, LoraFactors):
        return sum(_size(x) for x in (value.a, value.b, value.magnitude) if x is not None)
    return math.prod(value.shape)
