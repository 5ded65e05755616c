"""PEFT's ``adapter_config.json``: what it says of each module, by PEFT's own matching, and what has no meaning here."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora._src.config import HEADS
from jlora.fields import fits
from jlora.files.safetensors import read_json
from jlora.files.tensor_names import Kind, ModelNames, TensorNames
from jlora.messages import bullets, shown
from jlora.peft import options

CONFIG = "adapter_config.json"
TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
"""PEFT's task types, and the modules that it trains whole for each, unasked."""

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""The modules by whose names ``ensure_weight_tying`` finds out whether it has anything to do."""


class PeftError(ValueError):
    """An adapter that PEFT and we do not both understand; the message names every part of it, and the way out."""


def refuse(wrong: Collection[str], reader: str = "PEFT") -> None:
    if wrong:
        raise PeftError(
            f"peft.save: {len(wrong)} thing(s) that {reader} has no form for:{bullets(wrong)}\nNothing was written. "
            "Any adapters can be merged: jlora.merge, then save the model."
        )


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The part of an adapter's config that determines what is computed; the fields are PEFT's own.

    A module is named as in ``named_modules()`` of the PyTorch model that was adapted, without PEFT's prefix.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ensure_weight_tying: bool = False

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What multiplies the product of a module's factors."""
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether a module or tensor lies in a module that is trained whole."""
        return is_saved(name, self.modules_to_save)

    def targets(self, module: str, kind: Kind) -> bool:
        """Whether a module gets low-rank factors."""
        if self.saves(module) or _matches(self.exclude_modules, module):
            return False
        if self.target_modules is None:
            return False
        if self.target_modules == "all-linear":
            return kind in ("linear", "conv1d") and not re.search(HEADS[0], module.replace(".", "/"))
        if not _matches(self.target_modules, module):
            return False
        # PEFT does not ask for the layer where the whole name is listed.
        return not self.layers_to_transform or module in self.target_modules or self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for p in patterns if (match := re.match(p, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform

    def tying(self, projections: Collection[str]) -> PeftConfig:
        """What ``ensure_weight_tying`` makes of this config: what it asks of the embedding, of these modules too."""
        targets = self.target_modules or ()
        if not self.ensure_weight_tying or not projections:
            return self
        if any(module.split(".")[-1] in _EMBEDDINGS for module in self.modules_to_save):
            return dataclasses.replace(self, modules_to_save=(*self.modules_to_save, *projections))
        if isinstance(targets, str):
            if not any(re.fullmatch(targets, name) for name in _EMBEDDINGS):
                return self
            return dataclasses.replace(self, target_modules="|".join((f"(?:{targets})", *map(re.escape, projections))))
        if not any(module.split(".")[-1] in _EMBEDDINGS for module in targets):
            return self
        return dataclasses.replace(self, target_modules=(*targets, *projections))

    def whole(self, tensors: Iterable[str], adapted: Collection[str]) -> set[str]:
        """Those of a model's tensors that PEFT trains and stores whole, given the modules that have factors."""
        biases = {"all": lambda module: True, "lora_only": lambda module: module in adapted}.get(self.bias)
        return {
            tensor
            for tensor in tensors
            if self.saves(tensor) or (biases and tensor.endswith(".bias") and biases(tensor.removesuffix(".bias")))
        }


def is_saved(name: str, modules_to_save: Collection[str]) -> bool:
    """Whether a module or tensor lies in a module that ``modules_to_save`` names, as PEFT matches it."""
    parts = name.split(".")
    above = (".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return any(module.endswith(saved) for module in above for saved in modules_to_save)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


# ---- reading


class _Field(NamedTuple):
    expected: str
    fits: Any


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_table(value: Any, fits: Any) -> bool:
    return isinstance(value, dict) and all(_is_regex(k) and fits(v) for k, v in value.items())


def _is_regex(value: Any) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of a set in a set, which re would print
        try:
            return isinstance(value, str) and bool(re.compile(f"({value})"))
        except (re.error, FutureWarning, OverflowError, RecursionError):
            return False


_NEVER_NULL = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora")
"""Keys for which PEFT itself has no other meaning than that of their values."""

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


def read_config(file: Path) -> PeftConfig:
    """The config in a file.

    Raises:
      TensorError: if there is none that can be read.
      PeftError: naming every key whose value cannot be, or that asks for a computation that we lack.
    """
    given = read_json(file)
    wrong, values = [], {}
    for name, value in given.items():
        if name not in _FIELDS:
            continue
        nothing = value is None or (value in ("", [], {}) and name != "target_modules")
        if nothing and name not in _NEVER_NULL:
            continue
        if not _FIELDS[name].fits(value):
            wrong.append(f"{name} = {shown(value)}; expected {_FIELDS[name].expected}")
        values[name] = value
    if lacking := options.lacking({name: value for name, value in given.items() if name not in _FIELDS}):
        raise PeftError(
            f"{file}: the adapter computes what jlora does not have:{bullets(lacking + wrong)}\nExpected LoRA, rsLoRA "
            "or DoRA. To merge is `PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained("
            "new_folder)` in PyTorch; models.load reads the new folder."
        )
    if wrong:
        raise PeftError(
            f"{file}: {len(wrong)} value(s) cannot be:{bullets(wrong)}\nExpected the file as PEFT wrote it."
        )
    for name in ("layers_to_transform", "layers_pattern"):
        if name in values and not isinstance(values[name], list):
            values[name] = [values[name]]
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    # PEFT trains a task's heads whole, also when modules_to_save does not list them; names of no module do nothing.
    heads = TASK_HEADS.get(str(given.get("task_type")), ())
    values["modules_to_save"] = tuple(dict.fromkeys((*values.get("modules_to_save", ()), *heads)))
    return PeftConfig(**values)


# ---- writing


def exact_alpha(scale: float, rank: int, use_rslora: bool) -> float | None:
    """The alpha from which PEFT computes exactly ``scale``, an integer where one does; None where no number does."""
    divisor = math.sqrt(rank) if use_rslora else rank
    near = scale * divisor
    for alpha in (round(near), near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf)):
        if alpha / divisor == scale:
            return alpha
    return None


def make_config(
    ranks: Mapping[str, int], alphas: Mapping[str, Any], modules: Collection[str], **fields: Any
) -> PeftConfig:
    """The config with which PEFT gives each module its rank and alpha.

    Args:
      ranks, alphas: of the modules that have factors.
      modules: all modules of the model, also those that hold others.
      fields: the others of `PeftConfig`.
    """
    r, lora_alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    targets = _shortest(set(ranks), set(modules) - set(ranks))
    return PeftConfig(
        r=r,
        lora_alpha=lora_alpha,
        target_modules="|".join(map(re.escape, sorted(ranks))) if targets is None else targets,
        rank_pattern=_patterns(ranks, r),
        alpha_pattern=_patterns(alphas, lora_alpha),
        **fields,
    )


def whole_modules(
    trained: set[str], adapted: Collection[str], tensors: Collection[str], heads: Collection[str]
) -> tuple[str, tuple[str, ...]]:
    """PEFT's ``bias`` and ``modules_to_save`` that cover the tensors trained whole."""
    biases = {tensor for tensor in tensors if tensor.endswith(".bias")}
    bias = "none"
    if biases and biases <= trained:
        bias, trained = "all", trained - biases
    elif any(_module_of(tensor) in adapted for tensor in biases & trained):
        bias, trained = "lora_only", {t for t in trained if t not in biases or _module_of(t) not in adapted}
    modules = {_module_of(tensor) for tensor in trained}
    for module in sorted({above for m in modules for above in modules_above(m)}, key=len):
        inside = {_module_of(t) for t in tensors if t.startswith(f"{module}.")}
        is_list = any(t.removeprefix(f"{module}.")[0].isdigit() for t in tensors if t.startswith(f"{module}."))
        if inside <= modules and not is_list:  # PEFT wraps no ModuleList
            modules = (modules - inside) | {module}
    known = {above for tensor in tensors for above in modules_above(_module_of(tensor))}
    modules |= {head for head in heads if any(module.endswith(head) for module in known)}
    return bias, tuple(sorted(m for m in modules if not any(m.startswith(f"{other}.") for other in modules)))


def modules_above(module: str) -> list[str]:
    """A module and those that hold it."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def config_json(
    config: PeftConfig, names: TensorNames, *, fan_in_fan_out: bool, base_model: str | None, task_type: str | None
) -> dict:
    """What to write: only keys that PEFT and its readers have long known."""
    auto = None
    if task_type is None and isinstance(names, ModelNames):  # of a task type PEFT knows the class
        auto = {"base_model_class": names.class_name, "parent_library": names.library}
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}
    del fields["exclude_modules"], fields["ensure_weight_tying"]
    empty = {name: fields[name] or None for name in ("modules_to_save", "layers_to_transform", "layers_pattern")}
    return {
        **fields,
        **empty,
        "auto_mapping": auto,
        "base_model_name_or_path": base_model,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "revision": None,
        "task_type": task_type,
    }


def _shortest(group: set[str], others: set[str]) -> tuple[str, ...] | None:
    """The shortest ends of names that match each module of ``group`` and none of ``others``; None if there are none."""
    found = set()
    for module in group:
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        end = next((end for end in ends if not any(_matches((end,), other) for other in others)), None)
        if end is None:
            return None
        found.add(end)
    return tuple(sorted(found))


def _patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    found = {}
    for value in set(values.values()) - {default}:
        group = {module for module in values if values[module] == value}
        ends = _shortest(group, set(values) - group)
        keys = [f"^{re.escape(m)}" for m in group] if ends is None else map(re.escape, ends)
        found |= dict.fromkeys(keys, value)
    return dict(sorted(found.items()))
