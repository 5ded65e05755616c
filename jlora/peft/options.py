"""PEFT's features that jlora lacks, by the keys of ``adapter_config.json``, with advice for each.

PEFT can merge some of these; `tests/peft/test_peft_options.py` tries every advice in peft 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jlora.messages import shown

_INERT = frozenset(
    """auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode init_lora_weights
    lora_ga_config loftq_config megatron_core peft_type peft_version qalora_group_size revision runtime_config
    task_type""".split()
)
"""Keys that are checked elsewhere, or have no effect on a trained adapter."""

_EMPTY = frozenset(
    "alora_invocation_tokens layer_replication megatron_config target_parameters trainable_token_indices".split()
)
"""Keys for which an empty list or table has no effect; for other keys it means a config with all defaults."""

_PLAIN_INITS = (True, False, None, "gaussian", "eva", "mica", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base weights unchanged."""

REPEATED_INITS = ("pissa", "olora")
"""Values for which PEFT repeats its change of the base weights whenever it loads the adapter, as `load` does."""

MERGE = "merge it in PyTorch"
_IN_PROCESS = "in the process that trained it, merge it (`model.merge_and_unload().save_pretrained(new_folder)`)"
_CHANGED_BASE = (
    "save the changed base in the process that trained it (`model.unload().save_pretrained(new_base)`), load that, and "
    "set init_lora_weights to true in the adapter's config"
)
_ADVICE: Mapping[str, str] = {
    "alora_invocation_tokens": "acts only after these tokens, so it cannot be merged; use it in PyTorch",
    "arrow_config": "chooses among adapters by the input, so it cannot be merged; load each adapter by itself",
    "layer_replication": "the repeated layers share their weights; first give each its own, `for m in "
    "list(model.modules()):` and in it `for name, p in list(m.named_parameters(recurse=False)): setattr(m, name, "
    f"torch.nn.Parameter(p.data.clone()))`, then {MERGE}",
    "lora_bias": f"{MERGE}, over a base with biases in the adapted layers (Llama: `from_pretrained(path, "
    "attention_bias=True, mlp_bias=True)` makes them, of zero)",
    "use_qalora": "PEFT cannot merge it into a GPTQ base: use it in PyTorch; over any other base it has no effect: "
    "set it to false",
}
"""Advice other than to merge."""

_UNMERGED = frozenset(
    """ADAPTION_PROMPT CARTRIDGE CPT LILY MULTITASK_PROMPT_TUNING POLY PREFIX_TUNING PROMPT_TUNING P_TUNING SHADOW
    XLORA""".split()
)
"""Methods other than LoRA that PEFT cannot merge."""


def changes_base(start: Any) -> bool:
    """Whether ``init_lora_weights`` is an initialization that changed the base weights."""
    return start not in _PLAIN_INITS


def lacking(given: Mapping[str, Any], *, base_known: bool = False) -> list[str]:
    """One line per setting that jlora lacks, with advice.

    Args:
      given: the content of an ``adapter_config.json``.
      base_known: whether a change of the base weights can be undone.
    """
    method, start = given.get("peft_type"), given.get("init_lora_weights", True)
    found = []
    if method != "LORA":
        advice = "it cannot be merged; use it in PyTorch" if str(method) in _UNMERGED else MERGE
        found.append(f"peft_type = {shown(method)}; expected 'LORA': {advice}")
    if changes_base(start) and not base_known:
        found.append(f"init_lora_weights = {shown(start)}, which changed the base weights too: {_of_init(start)}")
    for name, value in given.items():
        if name in _INERT or value is None or value is False or (name in _EMPTY and not value):
            continue
        found.append(f"{name} = {shown(value)}: {_ADVICE.get(name, MERGE)}")
    return found


def _of_init(start: Any) -> str:
    if start in REPEATED_INITS:
        return f"pass the values of the base weights as params, and it is converted; or {MERGE}"
    if start == "loftq":  # PEFT's conversion starts from the weights before quantization
        return f"{_CHANGED_BASE}; or {_IN_PROCESS}; PEFT cannot convert it"
    return (
        "pass the adapter as it was saved before the training, `peft.load(folder, names, params, start=start_folder)`, "
        f"and it is converted; or {_CHANGED_BASE}; or {_IN_PROCESS}"
    )
