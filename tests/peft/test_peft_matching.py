"""Which modules a config of PEFT targets, and their ranks and alphas: as peft's own functions find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jlora import peft
from jlora.files.hub_files import ADAPTER_CONFIG
from jlora.peft.config import PeftConfig
from jlora.peft.config_file import read_config
from tests.peft_cases import assert_same, base, edited, loaded, needs_peft

MATCHING = (
    {"target_modules": ["query", "output.dense"]},
    {"target_modules": ["query"], "exclude_modules": ["layer.1.attention.self.query"]},
    {"target_modules": r".*\.(key|value)", "exclude_modules": r".*0.*"},
    {"target_modules": ["dense"], "layers_to_transform": [0, 2]},
    {"target_modules": ["dense", "classifier.dense"], "layers_to_transform": 1},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": "layer"},
    {"target_modules": ["query", "dense"], "layers_to_transform": [1], "layers_pattern": ["h", "encoder.layer"]},
    {"target_modules": ["dense"], "modules_to_save": ["classifier", "output"]},
    {"target_modules": "dense"},
    {"target_modules": ["self"]},
    {
        "target_modules": ["key"],
        "rank_pattern": {"key": 2, "layer.1.attention.self.key": 3},
        "alpha_pattern": {"ey": 5},
    },
    {"target_modules": ["key"], "rank_pattern": {"layer.[01].*": 2, "query|value": 3}, "alpha_pattern": {"^key": 5}},
    {"target_modules": ["key"], "alpha_pattern": {r".*\.1\..*": 5, "self.query": 6}, "use_rslora": True, "r": 3},
)


@needs_peft
@pytest.mark.parametrize("fields", MATCHING, ids=str)
def test_modules_are_matched_as_peft_matches_them(fields: dict[str, Any], tmp_path: Path) -> None:
    """Targets, ranks and alphas of every module are those of peft's own functions."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    theirs = LoraConfig(**fields)
    theirs.save_pretrained(str(tmp_path))
    ranks, alphas = theirs.rank_pattern or {}, theirs.alpha_pattern or {}
    ours: PeftConfig = read_config(tmp_path / ADAPTER_CONFIG)
    for path, name in base("roberta").names.items():
        if name.kind == "array":
            continue
        module = name.tensors[0].removesuffix(".weight")
        found = check_target_module_exists(theirs, module)
        assert ours.targets(module, name.kind) == bool(found), (path, found)
        rank = ranks.get(get_pattern_key(list(ranks), module), theirs.r)
        alpha = alphas.get(get_pattern_key(list(alphas), module), theirs.lora_alpha)
        assert (ours.rank(module), ours.scale(module)) == (rank, alpha / (rank**0.5 if theirs.use_rslora else rank))


def test_all_linear_leaves_heads_out(tmp_path: Path) -> None:
    """``target_modules="all-linear"`` in a file is read as the list that peft makes of it."""
    b = base("llama")
    folder = edited(tmp_path / "it", "llama", lambda c, t: c.update(target_modules="all-linear"))
    assert_same(peft.load(folder, b.names, b.params)[0], loaded("llama")[0])
