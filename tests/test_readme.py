"""The README is true: every block of Python runs, in order, as one program; what it prints is what it says."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from tests.documents import blocks
from tests.documents import ran as run
from tests.peft_cases import needs_peft


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], str]:
    """The names that the README's program defines, and what it prints."""
    return run("README.md")


def test_every_block_runs_and_prints_what_it_says(ran: tuple[dict[str, Any], str]) -> None:
    printed = [body for language, body in blocks("README.md") if language == "text"]
    assert ran[1] == "".join(printed)


def test_its_claims_hold(ran: tuple[dict[str, Any], str]) -> None:
    """Fresh adapters changed nothing; training lowered the loss; what was merged and saved is what was trained."""
    n, _ = ran
    apply, attach, params, tokens = n["apply"], n["jlora"].attach, n["params"], n["tokens"]
    np.testing.assert_array_equal(n["logits"], n["model"].apply(params, tokens))
    assert n["loss"] < 0.1
    np.testing.assert_allclose(n["served"], apply(attach(params, n["adapters"]), tokens), atol=1e-4)
    chex.assert_trees_all_equal(n["jlora"].load(f"{n['folder']}/adapters"), n["adapters"])
    chex.assert_trees_all_equal(n["again"], n["tuned"])
    assert max(n["report"].values()) < 1e-3
    with pytest.raises(n["peft"].PeftError, match=r"vLLM(.|\n)*classifier/dense/kernel' is trained whole"):
        n["peft"].save("nowhere", n["names"], n["weights"], n["tuned"], n["config"], uniform_rank=True)


@needs_peft
def test_pytorch_opens_what_it_says_that_it_opens(ran: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    """The saved adapter in `PeftModel`, the merged export in `AutoModel`, `peft`'s own adapter here: equal logits."""
    import peft as theirs
    import torch
    import transformers

    n, _ = ran
    folder, tokens = n["folder"], n["tokens"]

    def logits(network: Any) -> Any:
        with torch.no_grad():
            return network.eval()(torch.tensor(np.asarray(tokens))).logits.numpy()

    def expected(adapters: Any) -> Any:
        return n["roberta"].apply(n["jlora"].merge(n["weights"], adapters), tokens)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = transformers.AutoModelForSequenceClassification
        base = auto.from_pretrained(n["checkpoint"])  # its head is a new one; that of the adapter takes its place
        moved = {path: jax.tree.map(lambda x: x + 0.1, value) for path, value in n["tuned"].items()}
        n["peft"].save(f"{folder}/peft", n["names"], n["weights"], moved, n["config"], task_type="SEQ_CLS")
        adapted = theirs.PeftModel.from_pretrained(base, f"{folder}/peft")
        np.testing.assert_allclose(logits(adapted), expected(moved), atol=1e-5)
        merged = auto.from_pretrained(f"{folder}/merged")
        np.testing.assert_allclose(logits(merged), expected(n["tuned"]), atol=1e-5)
        assert merged.config.id2label == {0: "bad", 1: "good"}

        config = theirs.LoraConfig(r=2, target_modules=["key"], init_lora_weights=False, task_type="SEQ_CLS")
        adapted = theirs.get_peft_model(auto.from_pretrained(n["checkpoint"]), config)
        adapted.save_pretrained(str(tmp_path))
        loaded, _ = n["peft"].load(tmp_path, n["names"], n["weights"])
        np.testing.assert_allclose(logits(adapted), expected(loaded), atol=1e-5)


def test_there_are_exactly_two_set_up_commands() -> None:
    first = next(body for language, body in blocks("README.md") if language == "bash").strip().splitlines()
    commands = [line.split("#")[0].strip() for line in first]
    assert commands == ['pip install -e ".[train]" && python -m train', 'pip install -e ".[test]" && pytest']
