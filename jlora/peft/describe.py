"""Finds the shortest PEFT config that computes the same as given adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from jlora.files.tensor_names import module_of
from jlora.peft.config import PeftConfig, matches, modules_above


def describe(
    ranks: Mapping[str, int], alphas: Mapping[str, Any], modules: Collection[str], **fields: Any
) -> PeftConfig:
    """The config by which PEFT gives each module its rank and alpha.

    Args:
      ranks, alphas: by the name of the module, for modules with factors.
      modules: all modules of the model, also those that contain others.
      fields: the other fields of `PeftConfig`.
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
    """The values of ``bias`` and ``modules_to_save`` that cover the tensors trained whole."""
    biases = {tensor for tensor in tensors if tensor.endswith(".bias")}
    bias = "none"
    if biases and biases <= trained:
        bias, trained = "all", trained - biases
    elif any(module_of(tensor) in adapted for tensor in biases & trained):
        bias, trained = "lora_only", {t for t in trained if t not in biases or module_of(t) not in adapted}
    modules = {module_of(tensor) for tensor in trained}
    for module in sorted({above for m in modules for above in modules_above(m)}, key=len):
        inside = {module_of(t) for t in tensors if t.startswith(f"{module}.")}
        is_list = any(t.removeprefix(f"{module}.")[0].isdigit() for t in tensors if t.startswith(f"{module}."))
        if inside <= modules and not is_list:  # PEFT does not wrap a ModuleList
            modules = (modules - inside) | {module}
    known = {above for tensor in tensors for above in modules_above(module_of(tensor))}
    modules |= {head for head in heads if any(module.endswith(head) for module in known)}
    return bias, tuple(sorted(m for m in modules if not any(m.startswith(f"{other}.") for other in modules)))


def _shortest(group: set[str], others: set[str]) -> tuple[str, ...] | None:
    """The shortest ends of names that match all modules of ``group`` and none of ``others``; None if there are none."""
    found = set()
    for module in group:
        parts = module.split(".")
        ends = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        end = next((end for end in ends if not any(matches((end,), other) for other in others)), None)
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
