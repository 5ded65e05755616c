"""Random adapters, in both directions against the real peft: equal logits, or a refusal that names the cause.

The suite runs a fixed sample. All 300 draws, with a table of what came of them:

    JLORA_PEFT_DRAWS=300 python -m pytest tests/peft/test_peft_fuzz.py -s

Adapters are stored in the draw's dtype, over weights rounded to it. Both sides compute in float32, so that differences
come from reading and writing, not from bfloat16 rounding.
"""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jlora import peft
from tests.peft_cases import needs_peft
from tests.peft_draws import BASES, Base, Draw, base, draw_config, draw_ours, logits, make_peft, read_peft

DRAWS = int(os.environ.get("JLORA_PEFT_DRAWS", "24"))
EXACT = 2e-4

REFUSALS: dict[str, tuple[str, float, Callable[[str, dict[str, Any]], bool]]] = {
    "stacked": (
        r"'params/[^']+': '[^']+\.weight' is trained whole, and other layers of this leaf by factors.*",
        0.2,
        lambda name, config: name.startswith(("llama", "gpt2")) and bool(config.get("modules_to_save")),
    ),
    "tied": (r"'params/[^']+/embedding': .+ for the lookup, .+ for '[^']+'", 0.15, lambda name, config: "tied" in name),
    "tied DoRA": (
        r"'params/[^']+/embedding' has DoRA and is also 'lm_head.weight', whose magnitude in PEFT is by rows",
        0.1,
        lambda name, config: "tied" in name and config["use_dora"],
    ),
    "vLLM": (
        r"'params/[^']+' (has DoRA|is a convolution|is trained whole|is stored whole for this task_type)",
        0.2,
        lambda name, config: config["uniform_rank"],
    ),
}
"""Every refusal: what each line says, the largest share of draws, and where it may be."""


def kind_of(error: peft.PeftError, name: str, config: dict[str, Any]) -> str:
    """The kind of refusal; it must be listed in `REFUSALS`, with all of its lines."""
    lines = [line.removeprefix("  - ") for line in str(error).splitlines() if line.startswith("  - ")]
    for kind, (pattern, _, may_be) in REFUSALS.items():
        if lines and all(re.fullmatch(pattern, line) for line in lines) and may_be(name, config):
            return kind
    raise AssertionError(f"refused for a reason that is not listed:\n{error}")


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest logit."""
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def from_theirs(name: str, b: Base, draw: Draw, dtype: str, folder: Path) -> str:
    """An adapter that peft wrote: read here, and written again."""
    config = draw_config(draw, b)
    try:
        adapted = make_peft(config, draw, b, dtype, folder / "theirs")
        expected = read_peft(b, folder / "theirs")
    except Exception as error:  # whatever peft raises
        assert type(error) is not AssertionError, error
        return "peft refuses"
    outcome = "agrees"
    if dtype == "float32" and distance(logits(b, adapted), expected) > EXACT:
        # It sorts the patterns that it writes, and the first match counts.
        assert max(len(config.get(table, ())) for table in ("rank_pattern", "alpha_pattern")) > 1, config
        outcome = "peft reads something else than it wrote, and so do we"
    side = b.ours
    try:
        adapters, ours = peft.load(folder / "theirs", side.names, side.params)
    except peft.PeftError as error:
        kind = kind_of(error, name, config)
        if kind != "tied":
            return f"load refuses: {kind}"
        assert b.untied is not None and "models.load(path, untie=True)" in str(error)
        outcome, side = "load refuses: tied; untied agrees", b.untied
        adapters, ours = peft.load(folder / "theirs", side.names, side.params)
    assert distance(side.logits(adapters), expected) <= EXACT, config
    peft.save(folder / "again", side.names, side.params, adapters, ours, task_type=config.get("task_type"))
    assert distance(read_peft(b, folder / "again", whole=True), expected) <= EXACT, f"written again: {config}"
    return outcome


def from_ours(name: str, b: Base, draw: Draw, dtype: str, folder: Path) -> str:
    """An adapter that was made here: read by peft, and by us again."""
    config, adapters, options = draw_ours(draw, b, dtype)
    side, said = b.ours, f"{config} {options}"
    expected = side.logits(adapters)
    assert distance(side.logits(), expected) > EXACT
    try:
        peft.save(folder / "ours", side.names, side.params, adapters, config, **options)
    except peft.PeftError as error:
        assert not (folder / "ours").exists()
        return f"save refuses: {kind_of(error, name, {'use_dora': config.use_dora, **options})}"
    assert distance(read_peft(b, folder / "ours", whole=True), expected) <= EXACT, said
    assert distance(side.logits(peft.load(folder / "ours", side.names, side.params)[0]), expected) <= EXACT, said
    return "agrees"


def table(outcomes: dict[str, Counter[str]]) -> str:
    """The number of outcomes of each kind, by network."""
    lines = []
    for outcome in sorted(set().union(*outcomes.values())):
        counts = {name: outcomes[name][outcome] for name in outcomes}
        lines.append(f"{sum(counts.values()):4}  {outcome}: {', '.join(f'{n} {c}' for n, c in counts.items() if c)}")
    return "\n".join(lines)


@pytest.mark.slow
@needs_peft
def test_drawn_adapters_agree_or_are_refused_by_name(tmp_path: Path) -> None:
    """For every draw the logits of both sides are equal, or one side refuses; and most are not refused."""
    directions = {"theirs": from_theirs, "ours": from_ours}
    outcomes = {direction: {name: Counter[str]() for name in BASES} for direction in directions}
    wrong = []
    for seed in range(DRAWS):
        name = list(BASES)[seed % len(BASES)]
        dtype = "bfloat16" if seed // len(BASES) % 3 == 2 else "float32"
        for direction, check in directions.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                b, draw = base(name, dtype), Draw(seed)
                try:
                    outcome = check(name, b, draw, dtype, tmp_path / str(seed))
                except Exception as error:
                    outcome = "wrong"
                    wrong.append(f"draw {seed}, {name}, {dtype}, {direction}: {type(error).__name__}: {error}")
            outcomes[direction][name][outcome] += 1
    for direction, found in outcomes.items():
        print(f"\n{direction}:\n{table(found)}")
    assert not wrong, "\n".join(wrong)
    for direction, found in outcomes.items():
        total = sum(found.values(), Counter())
        assert total["agrees"] >= 0.6 * DRAWS, direction
        assert total["peft refuses"] <= 0.2 * DRAWS
        for kind, (_, share, _) in REFUSALS.items():
            refused = sum(count for outcome, count in total.items() if outcome.partition(": ")[2].split(";")[0] == kind)
            assert refused <= max(2, share * DRAWS), (direction, kind)


@pytest.mark.sampled(1)
@needs_peft
@pytest.mark.parametrize("name", BASES)
def test_the_class_of_the_model_is_known_without_a_task_type(name: str, tmp_path: Path) -> None:
    """`AutoPeftModel` makes the network from what is written; with a task type, the class of that task does."""
    import peft as theirs

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = base(name, "float32")
        b.network.save_pretrained(tmp_path / "base")
        drawn = (draw_ours(Draw(seed), b, "float32") for seed in range(99))
        config, adapters, _ = next(one for one in drawn if not one[0].use_dora)
        expected = b.ours.logits(adapters)
        for task in {None, b.task}:
            options = {"base_model": str(tmp_path / "base"), "task_type": task}
            peft.save(tmp_path / "it", b.ours.names, b.ours.params, adapters, config, **options)
            auto = {"CAUSAL_LM": "ForCausalLM", "SEQ_CLS": "ForSequenceClassification", None: ""}[task]
            found = getattr(theirs, f"AutoPeftModel{auto}").from_pretrained(tmp_path / "it")
            assert type(found.get_base_model()).__name__ == BASES[name][0]
            assert distance(logits(b, found), expected) <= EXACT
