"""PEFT's LoRA config: the adapted modules, their ranks and scales, by PEFT's own name matching."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from jlora._src.config import HEADS
from jlora.files.errors import PeftError
from jlora.files.tensor_names import ModuleKind
from jlora.messages import bullets

TASK_HEADS: Mapping[str, tuple[str, ...]] = {
    "CAUSAL_LM": (),
    "FEATURE_EXTRACTION": (),
    "QUESTION_ANS": ("qa_outputs",),
    "SEQ_2_SEQ_LM": (),
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
}
"""PEFT's task types, and the modules that PEFT trains whole for each by default."""

_EMBEDDINGS = ("embed_tokens", "lm_head")
"""The module names that PEFT's ``ensure_weight_tying`` recognizes as embeddings."""


def refuse(problems: Collection[str], reader: str = "PEFT") -> None:
    """Raises a PeftError that lists the problems, if there are any."""
    if problems:
        raise PeftError(
            f"peft.save: {len(problems)} problem(s) that {reader} cannot represent:{bullets(problems)}\nNothing was "
            "written. Instead, merge the adapter: jlora.merge, then save the model."
        )


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The fields of an adapter's config that affect the computation, by PEFT's names.

    Module names are those of ``named_modules()`` in the adapted PyTorch model, without PEFT's prefix.
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
        """The scale of a module's update."""
        rank = self.rank(module)
        return _by_pattern(self.alpha_pattern, module, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, name: str) -> bool:
        """Whether a module or tensor is inside a module trained whole."""
        return is_saved(name, self.modules_to_save)

    def targets(self, module: str, kind: ModuleKind) -> bool:
        """Whether a module gets low-rank factors."""
        if self.saves(module) or matches(self.exclude_modules, module):
            return False
        if self.target_modules is None:
            return False
        if self.target_modules == "all-linear":
            return kind in ("linear", "conv1d") and not re.search(HEADS[0], module.replace(".", "/"))
        if not matches(self.target_modules, module):
            return False
        # PEFT does not check the layer of a module listed by its full name.
        return not self.layers_to_transform or module in self.target_modules or self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        patterns = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for p in patterns if (match := re.match(p, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform

    def tying(self, projections: Collection[str]) -> PeftConfig:
        """This config with ``ensure_weight_tying`` applied: ``projections`` train like the embedding."""
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
        """The tensors of a model that PEFT trains and stores whole; ``adapted`` are the modules with factors."""
        biases = {"all": lambda module: True, "lora_only": lambda module: module in adapted}.get(self.bias)
        return {
            tensor
            for tensor in tensors
            if self.saves(tensor) or (biases and tensor.endswith(".bias") and biases(tensor.removesuffix(".bias")))
        }


def is_saved(name: str, modules_to_save: Collection[str]) -> bool:
    """Whether a module or tensor is inside a module in ``modules_to_save``, by PEFT's matching."""
    return any(module.endswith(saved) for module in modules_above(name) for saved in modules_to_save)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def matches(names: str | tuple[str, ...], module: str) -> bool:
    """Whether PEFT matches a module with ``names``: a regular expression, or a list of (ends of) names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def modules_above(module: str) -> list[str]:
    """A module and all modules that contain it, the outermost first."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def exact_alpha(scale: float, rank: int, use_rslora: bool) -> float | None:
    """The alpha for which PEFT computes exactly ``scale``, an integer if possible; None if there is none."""
    divisor = math.sqrt(rank) if use_rslora else rank
    near = scale * divisor
    for alpha in (round(near), near, math.nextafter(near, -math.inf), math.nextafter(near, math.inf)):
        if alpha / divisor == scale:
            return alpha
    return None
