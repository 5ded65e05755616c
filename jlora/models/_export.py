"""A merged checkpoint that stands alone: weights, config.json, tokenizer and model card."""

from __future__ import annotations

import json
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
from jlora.files.safetensors import read_json
from jlora.messages import bullets
from jlora.models._causal import CausalConfig
from jlora.models._checkpoint import check_leaves, write
from jlora.models._family import ModelError, ending_of
from jlora.models._network import GENERATION, family_and_task, fetch

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""The files of a tokenizer, and of what prepares images."""


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
    """Write the merged network as a checkpoint that transformers, vLLM and `load` read, with a model card.

    >>> print(models.export("out/merged", model, params, adapters, tokenizer="../shared/models/minilm-l6"))

    The weights are merged one by one as they are written, in float32 with one rounding to the base's dtype.

    Args:
      folder: made if it is not there; a checkpoint that is there is replaced.
      model, params: as from `load`.
      adapters: as from `jlora.init`.
      tokenizer: None, an object with ``save_pretrained``, or a folder or the id of a model on the hub, whose files of
        a tokenizer or image processor are copied, and its generation_config.json in place of the base's. Its padding
        token goes into the config.json of a decoder that has none: classifiers of transformers take no batch without.
      base_model: the id of the base on the hub, for the model card.
      max_shard_bytes: the size above which the tensors are divided into several files with an index.

    Returns:
      What the rounding lost, as `jlora.rounding` tells it; the model card has it too.

    Raises:
      KeyError, ValueError: as `jlora.merge`, if an adapter does not fit or holds NaN or infinity; nothing is written.
      ModelError: if ``params`` are not those of ``model``, hold NaN or infinity, or leave the range of their dtype
        when merged, naming every leaf; ``tokenizer`` has no files; or ``folder`` has a README.md that `export` did not
        write. Nothing is written.
    """
    folder = Path(folder)
    leaves, _ = named_leaves(params)
    check_leaves(leaves, model)
    report = rounding(params, adapters)
    if beyond := [f"{path!r} of dtype {leaves[path].dtype}" for path, lost in report.items() if math.isinf(lost)]:
        raise ModelError(
            f"export: {len(beyond)} merged weights leave the range of their dtype:{bullets(beyond)}\nMerge into "
            'parameters of a larger range: load(..., param_dtype="float32").'
        )
    files = _tokenizer_files(tokenizer)
    _check_readme(folder / "README.md")
    pad = _pad_token(model, tokenizer, files)

    @lru_cache(maxsize=1)
    def merged(path: LeafPath) -> Any:
        return merge({path: leaves[path]}, {path: adapters[path]})[path] if path in adapters else leaves[path]

    own = {file.name: read_json(file) for file in files if file.name == GENERATION}
    pad = {} if pad is None else {"pad_token_id": pad}
    write(folder, model, leaves, merged, max_shard_bytes, pad, own.get(GENERATION))
    for file in files:
        if file.name != GENERATION and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(_card(folder.resolve().name, model, leaves, adapters, report, base_model))
    return report


def _tokenizer_files(tokenizer: Any) -> list[Path]:
    if tokenizer is None or hasattr(tokenizer, "save_pretrained"):
        return []
    folder = fetch(tokenizer, files=(*TOKENIZER_FILES, GENERATION))
    if not (files := [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]):
        raise ModelError(
            f"{folder} has no file of a tokenizer. Expected one of {', '.join(TOKENIZER_FILES)}; or pass an object "
            "with save_pretrained."
        )
    return files + [file for file in (folder / GENERATION,) if file.is_file()]


def _pad_token(model: nn.Module, tokenizer: Any, files: Sequence[Path]) -> int | None:
    """The token that a tokenizer pads with, for a decoder whose configuration says none and that has the token."""
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    if not isinstance(config, CausalConfig) or config.pad_token_id is not None:
        return None
    pad = getattr(tokenizer, "pad_token_id", None) if hasattr(tokenizer, "save_pretrained") else _stored_pad(files)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else None


def _stored_pad(files: Sequence[Path]) -> int | None:
    """The id of the padding token by the files of a tokenizer, or None where they do not tell."""
    content = {file.name: read_json(file) for file in files if file.suffix == ".json"}
    stated = content.get("special_tokens_map.json", {}) | content.get("tokenizer_config.json", {})
    token = stated.get("pad_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    fast = content.get("tokenizer.json", {})
    ids = {entry.get("content"): entry.get("id") for entry in fast.get("added_tokens") or []}
    vocab = (fast.get("model") or {}).get("vocab")
    more = [
        content.get("added_tokens.json", {}),
        content.get("vocab.json", {}),
        vocab if isinstance(vocab, dict) else {},
    ]
    return next((found[token] for found in (ids, *more) if token in found), None)


def _check_readme(file: Path) -> None:
    """Raises a ModelError if there is a README.md that `export` did not write."""
    if file.exists() and "- jlora" not in file.read_text(errors="replace").splitlines():
        raise ModelError(
            f"export: {file} is not of jlora (it has no tag `- jlora`), and the model card would replace it; expected "
            "none, or that of an earlier export. Nothing was written: export into a new folder."
        )


def _card(
    name: str,
    model: nn.Module,
    leaves: Mapping[LeafPath, Any],
    adapters: Adapters,
    report: Rounding,
    base_model: str | None,
) -> str:
    """The text of README.md; JSON strings are YAML too."""
    _, task = family_and_task(model)
    auto = "AutoModel" + ending_of(task).removeprefix("Model")
    front = [f"base_model: {json.dumps(base_model)}"] if base_model else []
    front += ["library_name: transformers", "tags:", "- lora", "- jlora"]
    factors = [value for value in adapters.values() if isinstance(value, LoraFactors)]
    ranks = ", ".join(map(str, sorted({value.rank for value in factors})))
    whole = len(adapters) - len(factors)
    trained = sum(_size(value) for value in adapters.values())
    total = sum(map(_size, leaves.values()))
    base = f" of `{base_model}`" if base_model else ""
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# {name}",
            "",
            f"Low-rank adapters, merged by jlora into the weights{base}; it loads like any other checkpoint:",
            "",
            "```python",
            f'model = transformers.{auto}.from_pretrained("{name}")',
            "```",
            "",
            "## What was merged",
            "",
            f"- low-rank updates of {len(factors)} weights" + (f", rank {ranks}" if factors else ""),
            f"- {whole} leaves trained whole",
            f"- {trained:,} trained parameters, beside {total:,} of the network",
            "",
            "## What rounding lost",
            "",
            "Each update was added in float32, and the sum rounded once to the dtype of the weight. The last column is "
            "the share of the update that the rounding took.",
            "",
            "```",
            str(report),
            "```",
            "",
        ]
    )


def _size(value: Any) -> int:
    if isinstance(value, LoraFactors):
        return sum(_size(x) for x in (value.a, value.b, value.magnitude) if x is not None)
    return math.prod(value.shape)
