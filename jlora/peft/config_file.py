"""PEFT's ``adapter_config.json``: read with every value checked, and written."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jlora.fields import fits
from jlora.files.errors import PeftError
from jlora.files.json_files import read_json
from jlora.files.tensor_names import ModelTensorNames, TensorNames
from jlora.messages import bullets, shown
from jlora.peft import options
from jlora.peft.config import TASK_HEADS, PeftConfig


class _Field(NamedTuple):
    """A key's allowed values: in words, and as a predicate."""

    expected: str
    fits: Callable[[Any], bool]


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_table(value: Any, fits: Any) -> bool:
    return isinstance(value, dict) and all(_is_regex(k) and fits(v) for k, v in value.items())


def _is_regex(value: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # re warns of a set in a set
        try:
            return isinstance(value, str) and bool(re.compile(f"({value})"))
        except (re.error, FutureWarning, OverflowError, RecursionError):
            return False


_NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
"""Keys whose null and empty values PEFT ignores."""

_NAMES_OR_REGEX = _Field("a list of names or a regular expression", lambda v: _is_names(v) or _is_regex(v))
_FLAG = _Field("true or false", lambda v: type(v) is bool)
_FIELDS = {
    "r": _Field("an integer above 0", _is_rank),
    "lora_alpha": _Field("a finite number", lambda v: fits(v, float)),
    "target_modules": _NAMES_OR_REGEX,
    "exclude_modules": _NAMES_OR_REGEX,
    "lora_dropout": _Field("a rate in [0, 1)", lambda v: fits(v, float) and 0 <= v < 1),
    "bias": _Field("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "use_rslora": _FLAG,
    "use_dora": _FLAG,
    "ensure_weight_tying": _FLAG,
    "modules_to_save": _Field("a list of names", _is_names),
    "layers_to_transform": _Field(
        "an integer or a list of them",
        lambda v: type(v) is int or (isinstance(v, list) and all(type(i) is int for i in v)),
    ),
    "layers_pattern": _Field(
        "a name or a list of names", lambda v: _is_regex(v) or (_is_names(v) and all(map(_is_regex, v)))
    ),
    "rank_pattern": _Field("ranks by regular expression", lambda v: _is_table(v, _is_rank)),
    "alpha_pattern": _Field("numbers by regular expression", lambda v: _is_table(v, lambda x: fits(x, float))),
}


def read_start(file: Path) -> str | None:
    """The initialization that changed the base weights, by its name; None if none did.

    Raises:
      TensorError: if the file cannot be read.
    """
    start = read_json(file).get("init_lora_weights", True)
    return str(start) if options.changes_base(start) else None


def read_config(file: Path, *, base_known: bool = False) -> PeftConfig:
    """The config in a file.

    Args:
      base_known: whether an initialization that changed the base weights is accepted.

    Raises:
      TensorError: if the file cannot be read.
      PeftError: listing every key with an invalid value, or with a computation that jlora lacks.
    """
    content = read_json(file)
    values = {name: value for name, value in content.items() if name in _FIELDS and not _is_unset(name, value)}
    wrong = [
        f"{name} = {shown(value)}; expected {_FIELDS[name].expected}"
        for name, value in values.items()
        if not _FIELDS[name].fits(value)
    ]
    others = {name: value for name, value in content.items() if name not in _FIELDS}
    if lacking := options.lacking(others, base_known=base_known):
        raise PeftError(
            f"{file}: the adapter uses features that jlora lacks:{bullets(lacking + wrong)}\nExpected LoRA, rsLoRA or "
            "DoRA. To merge: `PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained("
            "new_folder)` in PyTorch; models.load reads the new folder."
        )
    if wrong:
        raise PeftError(f"{file}: {len(wrong)} invalid value(s):{bullets(wrong)}\nExpected an unchanged PEFT file.")
    for name in ("layers_to_transform", "layers_pattern"):
        if name in values and not isinstance(values[name], list):
            values[name] = [values[name]]
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    # PEFT trains a task's heads whole even if modules_to_save does not list them; unknown names have no effect.
    heads = TASK_HEADS.get(str(content.get("task_type")), ())
    values["modules_to_save"] = tuple(dict.fromkeys((*values.get("modules_to_save", ()), *heads)))
    return PeftConfig(**values)


def _is_unset(name: str, value: Any) -> bool:
    """Whether PEFT treats the value as the field's default."""
    empty = value is None or (value in ("", [], {}) and name != "target_modules")
    return empty and name not in _NEVER_NULL


def config_json(
    config: PeftConfig, names: TensorNames, *, fan_in_fan_out: bool, base_model: str | None, task_type: str | None
) -> dict:
    """The content to write: only keys that older versions of PEFT and other readers know too."""
    auto = None
    if task_type is None and isinstance(names, ModelTensorNames):  # a task type determines the class
        auto = {"base_model_class": names.class_name, "parent_library": names.library}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    del fields["exclude_modules"], fields["ensure_weight_tying"]
    or_null = {name: fields[name] or None for name in ("modules_to_save", "layers_to_transform", "layers_pattern")}
    return {
        **fields,
        **or_null,
        "auto_mapping": auto,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "revision": None,
        "task_type": task_type,
    }
