"""The README is true: every block of Python runs, in order, as one program; what it prints is what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], str]:
    """The names that the README's program defines, and what it prints."""
    names: dict[str, Any] = {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for i, code in enumerate(body for language, body in BLOCKS if language == "python"):
            exec(compile(code, f"README.md, block {i + 1}", "exec"), names)
    return names, out.getvalue()


def test_every_block_runs_and_prints_what_it_says(ran: tuple[dict[str, Any], str]) -> None:
    printed = [body for language, body in BLOCKS if language == "text"]
    assert ran[1] == "".join(printed)


def test_its_claims_hold(ran: tuple[dict[str, Any], str]) -> None:
    """Fresh adapters changed nothing; training lowered the loss; merging, detaching and stacking agree."""
    n, _ = ran
    apply, attach, params, tokens = n["apply"], n["jlora"].attach, n["params"], n["tokens"]
    np.testing.assert_array_equal(n["logits"], n["model"].apply(params, tokens))
    assert n["loss"] < 0.1
    np.testing.assert_allclose(n["served"], apply(attach(params, n["adapters"]), tokens), atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, n["base"], params)
    np.testing.assert_allclose(n["answers"][0], n["served"], atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, n["again"], n["learnt"])
    assert max(n["report"].values()) < 1e-3
    with pytest.raises(n["peft"].PeftError, match=r"vLLM(.|\n)*classifier/dense/kernel' is trained whole"):
        n["peft"].save("nowhere", n["names"], n["weights"], n["learnt"], n["config"], uniform_rank=True)
    for one, place in zip(jax.tree.leaves(n["divided"]), jax.tree.leaves(n["own"]), strict=True):
        assert one.sharding == place
    assert any("fsdp" in place.spec for place in jax.tree.leaves(n["own"]))


def test_there_are_exactly_two_set_up_commands() -> None:
    first = next(body for language, body in BLOCKS if language == "bash").strip().splitlines()
    commands = [line.split("#")[0].strip() for line in first]
    assert commands == ["pip install -e . && python -m train", 'pip install -e ".[test]" && pytest']
